"""What does not fit, and the knob that makes it fit: found by planning the changed run again, so it is true."""

import dataclasses
from collections.abc import Callable, Iterator

from kjax.config import Config
from kjax.lora import size
from kjax.planning.machine import Machine
from kjax.planning.report import Row, total
from kjax.planning.sizes import Sizes
from kjax.startup import CONTEXT, FRACTION

MOST = 0.95  # of a GPU that JAX can be told to take

# (config, machine) -> what it needs: sizes, rows of main memory, of page cache, of the device.
Replan = Callable[[Config, Machine], tuple[Sizes, list[Row], list[Row], list[Row]]]


def problems(config: Config, on: Machine, replan: Replan) -> list[str]:
    """One text for each memory that is too small, with the first change after which the whole plan fits."""
    lacks = _lacks(replan(config, on), on)
    if not lacks:
        return []
    for changed, machine, named in _knobs(config, on):
        if not _lacks(replan(changed, machine), machine):
            return [f"{'; '.join(lacks)}. It fits with {named}"]
    return [f"{'; '.join(lacks)}. {_hopeless(replan(config, on), on)}"]


def _lacks(needs, on: Machine) -> list[str]:
    sizes, host, cache, device = needs
    found = []
    if _short(device, on):
        found.append(f"device memory: {size(total(device) - CONTEXT)} needed, {size(on.usable)} there for JAX")
    if total(host) > on.host:
        found.append(f"main memory: {size(total(host))} needed, {size(on.host)} free")
    elif total(host) + total(cache) > on.host:
        found.append(f"main memory: the experts take {size(total(cache))} and all else {size(total(host))}, "
                     f"{size(on.host)} are free: {size(2 * (total(host) + total(cache) - on.host))} would be read from "
                     "disk in each step")
    return found


def _short(device: list[Row], on: Machine) -> bool:
    return on.device is not None and total(device) - CONTEXT > on.usable


def _knobs(config: Config, on: Machine) -> Iterator[tuple[Config, Machine, str]]:
    """Changes from the cheapest to the dearest, alone and then together; each with its name for the user."""
    if on.device is not None and on.share < MOST:
        yield config, dataclasses.replace(on, share=MOST), f"{FRACTION}={MOST} in the environment"
    steps = [s for s in _steps(config)]
    for step in steps:
        yield from _named(config, on, step)
    together: dict = {}
    for step in steps:
        together = {**together, **step}
        yield from _named(config, on, together)


def _steps(config: Config) -> Iterator[dict]:
    train, model = config.train, config.model
    if model.storage == "resident":
        yield {("model", "storage"): "mapped"}
    if model.stash_gb is None or model.stash_gb > 0:
        yield {("model", "stash_gb"): 0.0}
    rows = train.micro_rows or train.rows_per_step
    if rows > 1:
        yield {("train", "micro_rows"): 1}
    if train.loss_chunk > 256:
        yield {("train", "loss_chunk"): 256}
    for weights in ("8bit", "nf4")[{"full": 0, "8bit": 1}.get(model.weights, 2):]:
        yield {("model", "weights"): weights}
    rows = train.rows_per_step
    while rows > 1:
        rows //= 2
        yield {("train", "rows_per_step"): rows, ("train", "micro_rows"): 1}
    length = config.data.max_length
    while length > 256:
        length //= 2
        yield {("data", "max_length"): length}


def _named(config: Config, on: Machine, change: dict):
    new = config
    for group in {group for group, _ in change}:
        fields = {field: value for (of, field), value in change.items() if of == group}
        new = dataclasses.replace(new, **{group: dataclasses.replace(getattr(new, group), **fields)})
    names = [f"{group.capitalize()}.{field} = {value!r}" for (group, field), value in change.items()
             if getattr(getattr(config, group), field) != value]
    if names:
        yield new, on, ", ".join(names)


def _hopeless(needs, on: Machine) -> str:
    sizes, host, cache, device = needs
    if _short(device, on):
        return "No setting makes it fit: use a GPU with more memory"
    smaller = sizes.expert_parameters * 0.5625  # INT4 in groups of 32 with bf16 scales: 4.5 bits
    if sizes.experts > smaller and total(host) - _experts(host) + smaller <= on.host:
        return (f"It fits with a checkpoint of fewer bits: INT4 experts take {size(smaller)} "
                "(`kjax quantize --to int4` makes one)")
    return "No setting makes it fit: use a machine with more memory"


def _experts(rows: list[Row]) -> float:
    return total([row for row in rows if row.name == "routed experts"])
