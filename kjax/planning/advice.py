"""What does not fit, and the knob that makes it fit: found by planning the changed run again, so it is true."""

import bisect
import dataclasses
import functools
from collections.abc import Callable

from kjax.config import Config
from kjax.errors import ConfigError
from kjax.lora import size
from kjax.planning.formats import QUANTISED, Format
from kjax.planning.machine import Machine
from kjax.planning.report import Row, total
from kjax.planning.sizes import Sizes
from kjax.startup import CONTEXT, FRACTION

MOST = 0.95  # of a GPU that JAX can be told to take
INT4 = QUANTISED["int4_group32"]

Needs = tuple[Sizes, list[Row], list[Row], list[Row]]  # rows of main memory, of page cache, of the device
Replan = Callable[[Config, Machine, Format | None], Needs]  # None: the routed experts in the checkpoint's format
Change = dict[tuple[str, str], object]  # (group, setting) -> value, as ("train", "micro_rows") -> 1


def problems(config: Config, on: Machine, replan: Replan) -> list[str]:
    """One text for each memory that is too small, with the first change after which the whole plan fits."""
    needs = replan(config, on, None)
    lacks = _lacks(needs, on)
    if not lacks:
        return []
    if on.device is not None and on.share < MOST:
        if not _lacks(replan(config, wider := dataclasses.replace(on, share=MOST), None), wider):
            return [f"{'; '.join(lacks)}. It fits with {FRACTION}={MOST} in the environment"]

    @functools.cache  # a plan takes seconds, and what helps one memory is sought among the same changes
    def planned(change: tuple, form: Format | None):
        try:
            return replan(_changed(config, dict(change)), on, form)
        except ConfigError:  # settings that exclude each other
            return None

    def needs_with(change: Change, form: Format | None = None):
        return planned(tuple(change.items()), form)

    def fits(change: Change) -> bool:
        return (found := needs_with(change)) is not None and not _lacks(found, on)

    change = None if _hopeless(needs, on) else _first(_steps(config, needs, on), fits)
    way_out = _apart(config, needs, on, needs_with) if change is None else f"It fits with {_named(change)}"
    return [f"{'; '.join(lacks)}. {way_out}"]


def _apart(config: Config, needs: Needs, on: Machine, needs_with) -> str:
    """Where no settings make all of it fit: what helps each memory."""
    found, change = [], {}
    if _short(needs[3], on):
        change = _first(_steps(config, needs, on),
                        lambda c: (less := needs_with(c)) is not None and not _short(less[3], on))
        if change is None:
            found.append("No setting makes it fit the device: use a GPU with more memory")
            change = {}
        else:
            found.append(f"It fits the device with {_named(change)}")
    if _full(needs_with(change), on):
        found.append(_main_memory(config, change, on, needs_with))
    return ". ".join(found)


def _main_memory(config: Config, change: Change, on: Machine, needs_with) -> str:
    """What helps main memory, with the change that the device needs: settings, experts of fewer bits, or both."""
    def fits(more: Change, form: Format | None) -> bool:
        return (found := needs_with({**change, **more}, form)) is not None and not _full(found, on)

    for form in (None, INT4):
        needs = needs_with(change, form)
        if _hopeless(needs, on):
            continue
        enough = functools.partial(fits, form=form)
        steps = [step for step in _steps(_changed(config, change), needs, on)
                 if on.device is None or ("model", "weights") not in step]  # low-bit ones add the embedding table
        more = {} if enough({}) else _first(steps, enough)
        if more is None:
            continue
        if form is None:
            return f"It fits main memory with {_named(more)}"
        return (f"It fits main memory with a checkpoint of fewer bits: INT4 experts take {size(needs[0].experts)} "
                f"(`kjax quantize --format int4` makes one){', and ' if more else ''}{_named(more)}")
    return "No setting makes it fit main memory: use a machine with more memory"


def _first(steps: list[Change], fits: Callable[[Change], bool]) -> Change | None:
    """The cheapest change that fits: as few of the steps, from the cheapest to the dearest, as do together, without
    those that are not needed."""
    together: list[Change] = [{}]
    for step in steps:
        together.append({**together[-1], **step})
    if not fits(together[-1]):
        return None
    change = together[bisect.bisect_left(together, True, key=fits, lo=1, hi=len(together) - 1)]
    for setting in reversed(change):
        less = {name: value for name, value in change.items() if name != setting}
        if less and fits(less):
            change = less
    return change


def _lacks(needs: Needs, on: Machine) -> list[str]:
    _, host, cache, device = needs
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


def _full(needs: Needs, on: Machine) -> bool:
    _, host, cache, _ = needs
    return total(host) + total(cache) > on.host


def _hopeless(needs: Needs, on: Machine) -> bool:
    """Whether the routed experts alone are too much for main memory."""
    return needs[0].experts * needs[0].hosted > on.host


def _steps(config: Config, needs: Needs, on: Machine) -> list[Change]:
    """From the cheapest to the dearest: time, then precision, then what is trained. needs: of the config."""
    train, model, adapters = config.train, config.model, config.lora
    steps: list[Change] = []
    if model.storage == "resident":
        steps.append({("model", "storage"): "mapped"})
    if adapters.experts_home == "device" and model.experts == "host":
        steps.append({("lora", "experts_home"): "host"})
    sizes, host, cache, _ = needs
    stash = total(row for row in host if row.name == "stash")
    if 0 < (less := sizes.proposed(on.host - total(host) - total(cache) + stash)) * 1e9 < stash:
        steps.append({("model", "stash_gb"): less})
    if model.stash_gb is None or model.stash_gb > 0:
        steps.append({("model", "stash_gb"): 0.0})
    if (train.micro_rows or train.rows_per_step) > 1:
        steps.append({("train", "micro_rows"): 1})
    if train.loss_chunk > 256:
        steps.append({("train", "loss_chunk"): 256})
    for weights in ("8bit", "nf4")[{"full": 0, "8bit": 1}.get(model.weights, 2):]:
        steps.append({("model", "weights"): weights})
    rows, length = train.rows_per_step, config.data.max_length
    while rows > 1:
        rows //= 2
        steps.append({("train", "rows_per_step"): rows, ("train", "micro_rows"): 1})
    while length > 256:
        length //= 2
        steps.append({("data", "max_length"): length})
    return steps


def _changed(config: Config, change: Change) -> Config:
    for (group, name), value in change.items():
        config = dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **{name: value})})
    return config


def _named(change: Change) -> str:
    return ", ".join(f"{group.capitalize()}.{name} = {value!r}" for (group, name), value in change.items())
