"""The memory, the work and the time of a run, from config.json and the settings alone: `kjax plan`.

Nothing is loaded; of an adapter that the run goes on from (Model.adapter) config and headers are read. Parameters are
the shapes that the modules declare; device memory and device operations are read off the real train step, traced on
those shapes; the experts are counted in the bytes of their checkpoint format.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from kjax import hosted, job, lora, models, optimizer, step
from kjax.config import Config, Train
from kjax.fit import saves_to_come
from kjax.offload import host_lora
from kjax.planning import advice, memory, sizes, speed
from kjax.planning.formats import Format, formats
from kjax.planning.machine import Machine, machine
from kjax.planning.report import Plan, Row, total
from kjax.startup import CONTEXT, FRACTION

__all__ = ["FRACTION", "Machine", "Plan", "Row", "machine", "plan"]

LONG_RUN = 1000  # steps; an optimiser needs a number, and its state has the same size for any


class _Store(NamedTuple):
    """Stands for the expert store while the step is traced: no weights, never called."""

    width: int
    transport: str
    id: int = -1


class _HostLora(NamedTuple):
    """Stands for the adapters on the host while the step is traced."""

    id: int = -1


class Traced(NamedTuple):
    """The step as traced: bytes on the device, operations there, and bytes written and read."""

    weights: int
    state: int
    batch: int
    saved: int
    working: int
    operations: float
    traffic: float

    @property
    def total(self) -> int:
        return self.weights + self.state + self.batch + self.saved + self.working


def hosts_adapters(config: Config, model: models.ModelConfig, spec: lora.LoraSpec, on_cpu: bool) -> bool:
    """Whether the adapters of routed experts, if there are any, live on the host."""
    adapted = any(lora.group(path) == "experts" for path in spec.paths)
    stored = config.model.experts == "host" and model.num_moe_layers > 0
    return host_lora.on_host(config.lora.experts_home, adapted, stored, accelerator=not on_cpu)


def abstract_step(config: Config, model: models.ModelConfig, spec: lora.LoraSpec, on_cpu: bool):
    """(step, its arguments): the device's train step of a run and the shapes it is called with; the state comes first.

    on_cpu: JAX runs there; else on an accelerator.
    """
    settings, dtype = config.train, jnp.dtype(config.model.dtype)
    hosted_adapters = hosts_adapters(config, model, spec, on_cpu)
    store = _Store(model.hidden_size, "ffi" if on_cpu else "pure_callback") \
        if config.model.experts == "host" and model.num_moe_layers else None
    module = models.Transformer(model, lora=spec, dtype=dtype, store=store, micro_rows=settings.micro_rows,
                                host_lora=_HostLora() if hosted_adapters else None)
    transform = optimizer.optimizer(config.optimizer, LONG_RUN, clipping=not hosted_adapters)
    tree = lora.abstract(spec, models.linears(model))
    if hosted_adapters:
        tree, _ = host_lora.split(tree)
    params = models.abstract_params(model, dtype, config.model.experts, config.model.weights)
    state = jax.eval_shape(lambda tree: step.initial_state(tree, transform), tree)
    shape = (settings.rows_per_step, config.data.max_length)
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in ("tokens", "targets", "positions", "segments")}
    if "embed_tokens" not in params:  # the table stays on the host, its rows are the batch
        batch["tokens"] = jax.ShapeDtypeStruct((*shape, model.hidden_size), dtype)
    common = {"chunk": settings.loss_chunk, "seed": settings.seed,
              "dropout": any(adapter.dropout > 0 for _, adapter in spec.entries)}
    if hosted_adapters:
        run = hosted.device_step(step.gradients(module, models.unembed, **common), transform,
                                 config.optimizer.clip_norm, model.num_moe_layers)
    else:
        run = step.train_step(module, models.unembed, transform, **common)
    return run, (state, params, batch)


def traced(config: Config, model: models.ModelConfig, spec: lora.LoraSpec, on_cpu: bool) -> Traced:
    """Device memory and operations of the train step, by tracing it.

    on_cpu: JAX runs there, whose compiler drops the barriers that keep a checkpoint's recomputation apart.
    """
    run, (state, params, batch) = abstract_step(config, model, spec, on_cpu)
    jaxpr = jax.make_jaxpr(run)(state, params, batch)
    usage = memory.usage(jaxpr, donated=[True] * len(jax.tree.leaves(state)), merge=on_cpu)
    return Traced(_bytes(params), _bytes(state), _bytes(batch), usage.saved, usage.temporaries - usage.saved,
                  memory.operations(jaxpr), max(usage.traffic, 3.0 * _bytes(params)))


def _bytes(tree) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def plan(config: Config, on: Machine) -> Plan:
    """The plan of a run on a machine; Model.directory may be config.json alone or its directory."""
    path = Path(config.model.directory)
    path = path / "config.json" if path.is_dir() else path
    model = models.ModelConfig.from_json(path)
    model.check_row(config.data.max_length, "Data.max_length")
    content = json.loads(path.read_text(encoding="utf-8"))
    experts, others = formats(content, model.quantization, str(path))
    shapes = flatten_dict(models.abstract_params(model, config.model.dtype, "device"), sep="/")
    counts = sizes.parameters(shapes)
    spec = job.lora_spec(config, models.linears(model))
    table = lora.table(spec, models.linears(model), int(counts[-2].amount))
    trained = {row.group: row.parameters for row in table.rows[:-1]}

    traces: dict[str, Traced] = {}

    def needs(changed: Config, machine: Machine, form: Format | None = None):
        """form: of the routed experts, where it is another than the checkpoint's."""
        on_cpu = machine.device is None
        # The settings that change what is traced.
        key = repr((changed.train, changed.data.max_length, changed.model.dtype, changed.model.experts,
                    changed.model.weights, changed.lora.experts_home, on_cpu))
        if key not in traces:
            traces[key] = traced(changed, model, spec, on_cpu)
        found = traces[key]
        hosted_adapters = hosts_adapters(changed, model, spec, on_cpu)
        of_run = sizes.Sizes(changed, model, shapes, form or experts, others, trained, hosted_adapters)
        stash = of_run.stash(machine, found.weights if on_cpu else 0)
        host, cache = of_run.host(machine, stash, found.total if on_cpu else 0)
        return of_run, host, cache, _device(found, machine), found, stash

    of_run, host, cache, device, found, stash = needs(config, on)
    cached = max(0.0, on.host - total(host)) if cache else of_run.experts
    time = speed.step(of_run, on, found.operations, found.traffic, stash, cached)
    return Plan(
        f"{path} ({model.model_type}), {config.train.rows_per_step} rows of {config.data.max_length} tokens", on,
        counts, table, tuple(host), tuple(cache), tuple(device), tuple(of_run.disk(_saves(config.train))),
        tuple(of_run.work(found.operations, stash)), time, _smaller_stashes(of_run, on, stash, cached),
        tuple(advice.problems(config, on, lambda *args: needs(*args)[:4])))


def _saves(train: Train) -> int:
    """How many states a run saves; where the number of its steps hangs on the data, more than it keeps."""
    if train.save_steps is not None and train.steps is None:
        return train.keep + 1
    return saves_to_come(train.save_steps, 0, train.steps or 1)


def _smaller_stashes(of_run: sizes.Sizes, on: Machine, stash: int, cached: float) -> tuple[Row, ...]:
    """What half of the stash and none of it would cost in every step."""
    rows = []
    for name, part in (("half", 0.5), ("none", 0.0)) if stash else ():
        again = of_run.route_operations * 2 / 3 * (of_run.missed(stash * part) - of_run.missed(stash))
        note = f"{again / 1e12:,.4g} T operations more in a step"
        times = [{row.name: row.amount for row in speed.step(of_run, on, 0, 0, size, cached)}.get("experts, again", 0)
                 for size in (stash, stash * part)]
        if on.timed:
            note += f", {times[1] - times[0]:.2f} s"
        rows.append(Row(name, stash * part, note))
    return tuple(rows)


def _device(found: Traced, on: Machine) -> list[Row]:
    rows = [Row("weights", found.weights, "outside the host's experts"),
            Row("adapter and optimiser", found.state, "fp32 masters and two Adam moments"),
            Row("batch", found.batch),
            Row("saved for the backward pass", found.saved, "layer inputs and routes"),
            Row("working set", found.working, "gradients, attention, logits at the fullest moment")]
    return rows if on.device is None else [*rows, Row("context", CONTEXT, "CUDA and its libraries")]


