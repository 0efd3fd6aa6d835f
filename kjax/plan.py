"""The memory and the work of a run, from config.json and the settings alone: `kjax plan`.

Nothing is loaded. Parameters are the shapes that the modules declare; device memory and device operations are read off
the real train step, traced on those shapes; the experts are counted in the bytes of their checkpoint format.
"""

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from kjax import env, liveness, lora, models, optimizer, step
from kjax.config import Config
from kjax.errors import CheckpointError, ConfigError
from kjax.lora import size
from kjax.models.quantization import Quantization
from kjax.offload.stash import FREE_SHARE

GIB = 2**30
CONTEXT = GIB  # of the accelerator: the CUDA context and the libraries' workspaces
PROGRAM = GIB  # of the host: Python, JAX, compiled code; 0.6 to 0.9 GB were seen
# The traced working set is a lower bound: XLA orders operations in its own way and leaves gaps between buffers. On
# twelve shapes (CPU backend, fp32; toys, DeepSeek-V3, V2-Lite) it needed 1.1 to 2.4 times as much, most where long rows
# make attention the largest part. Twice puts the whole between 8 % below and 40 % above what XLA allocated; arguments,
# optimiser state and what is saved for the backward pass agree to a per cent and get no margin.
MARGIN = 2.0
FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
JAX_SHARE, MOST = 0.75, 0.95  # of a GPU that JAX takes unless FRACTION says otherwise; what it can be told to take
PARTS = (("routed experts", "/mlp/experts/"), ("shared experts", "/mlp/shared_experts/"), ("router", "/mlp/gate/"),
         ("attention", "/self_attn/"), ("dense layers", "dense_layers/mlp/"), ("embedding", "embed_tokens/"),
         ("output head", "lm_head/"), ("norms", "norm"))


class Machine(NamedTuple):
    """Bytes to plan for. device is None where the CPU is JAX's device: everything then shares the main memory.

    share: the part of the device's memory that JAX takes.
    """

    host: int
    device: int | None
    share: float

    @property
    def usable(self) -> int:
        return int(self.device * self.share)


class Row(NamedTuple):
    """One line of a table."""

    name: str
    amount: float
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """What a run needs; `problems` is empty where it fits.

    Attributes:
      parameters: numbers per part.  trainable: lora.Table.  host, device, disk: bytes per part.
      work: operations and bytes per step.  problems: what does not fit, with the way out.
    """

    title: str
    machine: Machine
    parameters: tuple[Row, ...]
    trainable: lora.Table
    host: tuple[Row, ...]
    device: tuple[Row, ...]
    disk: tuple[Row, ...]
    work: tuple[Row, ...]
    problems: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """For JSON: tables as {name: amount}."""
        tables = {name: {row.name: row.amount for row in getattr(self, name)}
                  for name in ("parameters", "host", "device", "disk", "work")}
        return {"model": self.title, "machine": self.machine._asdict(), **tables,
                "trainable": {row.group: row.parameters for row in self.trainable}, "fits": self.fits,
                "problems": list(self.problems)}

    def print(self, console=None):
        """The tables, with rich."""
        from rich.console import Console
        from rich.table import Table
        console = console or Console()
        console.print(self.title, markup=False, style="bold")
        for heading, rows, show in (
                ("Parameters", self.parameters, lambda n: f"{n:,.0f}"), ("Main memory", self.host, size),
                ("Device memory", self.device, size), ("Disk", self.disk, size),
                ("Work per step", self.work, lambda n: f"{n:,.4g}")):
            table = Table(title=heading, title_justify="left", show_header=False, box=None, pad_edge=False)
            table.add_column(min_width=26)
            table.add_column(justify="right", min_width=12)
            table.add_column(style="dim")
            for row in rows:
                table.add_row(row.name, show(row.amount), row.note)
            console.print(table)
            console.print()
        console.print(self.trainable)
        on = self.machine
        console.print(f"machine: {size(on.host)} of main memory, " + (
            f"{size(on.device)} on the device, {size(on.usable)} of it for JAX" if on.device is not None else
            "which also holds the device part: JAX runs on the CPU"))
        for problem in self.problems:
            console.print(f"does not fit: {problem}", style="bold red", markup=False)
        if self.fits:
            console.print("fits", style="bold green")


def machine(host_gb: float | None = None, device_gb: float | None = None) -> Machine:
    """This machine as far as nothing else is said: free main memory, and the GPU's where JAX has one."""
    memory = env.memory(Path("/"))
    host = min(memory["available"], memory["limit"] or memory["available"])
    try:
        share = min(1.0, float(os.environ.get(FRACTION, JAX_SHARE)))
    except ValueError:
        raise ConfigError(f"{FRACTION}={os.environ[FRACTION]}: expected a number such as 0.9") from None
    device = None
    if device_gb is not None:
        device = int(device_gb * 1e9)
    elif host_gb is None and jax.default_backend() != "cpu":
        limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
        device = None if limit is None else int(limit / share)
    return Machine(int(host_gb * 1e9) if host_gb is not None else host, device, share)


class Format(NamedTuple):
    """How linear layers are stored: bits of a weight, and a scale of some bytes for each group along both axes."""

    name: str
    bits: int
    block: tuple[int, int] = (1, 1)
    scale: int = 0

    def bytes(self, out: int, in_: int) -> int:
        scales = math.ceil(out / self.block[0]) * math.ceil(in_ / self.block[1]) * self.scale
        return out * math.ceil(in_ * self.bits / 8) + scales


WHOLE = {"bfloat16": Format("bf16", 16), "float16": Format("f16", 16), "float32": Format("fp32", 32)}


QUANTISED = {  # by the name in kjax.offload.formats
    "fp8_block": Format("fp8, blocks of 128x128", 8, (128, 128), 4),
    "fp8_channel": Format("fp8, a scale for each row", 8, (1, 1 << 30), 4),
    "int4_group32": Format("int4, groups of 32", 4, (1, 32), 2),
}


def formats(content: dict, quantization: Quantization | None, where: str) -> tuple[Format, Format]:
    """(of the routed experts, of the other linear layers), as quantization_config and dtype say."""
    name = content.get("dtype") or content.get("torch_dtype") or "bfloat16"
    if name not in WHOLE:
        raise CheckpointError(f"{where}: dtype = {name!r}: expected one of {', '.join(WHOLE)}")
    if quantization is None:
        return WHOLE[name], WHOLE[name]
    found = QUANTISED[quantization.format]
    return found, WHOLE[name] if quantization.format == "int4_group32" else found  # published in int4: experts alone


class _AbstractStore(NamedTuple):
    """Stands for the expert store while the step is traced: no weights, never called."""

    width: int
    transport: str = "pure_callback"
    id: int = -1


class _Traced(NamedTuple):
    """The step as traced: bytes on the device, and operations there."""

    weights: int
    state: int
    batch: int
    saved: int
    working: int
    operations: float

    @property
    def total(self) -> int:
        return self.weights + self.state + self.batch + self.saved + math.ceil(self.working * MARGIN)


def _trace(config: Config, model: models.ModelConfig, spec: lora.LoraSpec, linears: dict) -> _Traced:
    settings, dtype = config.train, jnp.dtype(config.model.dtype)
    store = _AbstractStore(model.hidden_size) if config.model.experts == "host" and model.num_moe_layers else None
    module = models.Transformer(model, lora=spec, dtype=dtype, store=store, micro_rows=settings.micro_rows)
    transform = optimizer.optimizer(config.optimizer, 1000)
    params = models.abstract_params(model, dtype, config.model.experts, config.model.weights)
    state = jax.eval_shape(lambda tree: step.initial_state(tree, transform), lora.abstract(spec, linears))
    shape = (settings.rows_per_step, config.data.max_length)
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in ("tokens", "targets", "positions", "segments")}
    if "embed_tokens" not in params:  # the table stays on the host, its rows are the batch
        batch["tokens"] = jax.ShapeDtypeStruct((*shape, model.hidden_size), dtype)
    run = step.train_step(module, models.unembed, transform, chunk=settings.loss_chunk, seed=settings.seed,
                          dropout=config.lora.dropout > 0)
    jaxpr = jax.make_jaxpr(run)(state, params, batch)
    usage = liveness.usage(jaxpr, donated=[True] * len(jax.tree.leaves(state)))
    working = usage.temporaries - usage.saved_at_peak
    return _Traced(_bytes(params), _bytes(state), _bytes(batch), usage.saved, working, liveness.operations(jaxpr))


def _bytes(tree) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def plan(config: Config, on: Machine) -> Plan:
    """The plan of a run on a machine. Only config.json is read: Model.directory may be that file or its directory."""
    path = Path(config.model.directory)
    path = path / "config.json" if path.is_dir() else path
    model = models.ModelConfig.from_json(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    experts_format, others_format = formats(content, model.quantization, str(path))
    linears = models.linears(model)
    spec = lora.resolve(config.lora, linears)
    shapes = flatten_dict(models.abstract_params(model, config.model.dtype, "device"), sep="/")
    parameters = _parameters(shapes)
    table = lora.table(spec, linears, int(parameters[-2].amount))
    traced = _trace(config, model, spec, linears)

    sizes = _Sizes(config, model, shapes, experts_format, others_format, table)
    host, device = sizes.host(traced, on), _device(traced, on)
    problems = _host_problems(config, sizes, host, on)
    if on.device is not None and _total(device) > on.usable:
        problems.append(_device_problem(config, model, spec, linears, device, on))
    return Plan(f"{path} ({model.model_type}), {config.train.rows_per_step} rows of {config.data.max_length} tokens",
                on, parameters, table, tuple(host), tuple(device), tuple(sizes.disk()), tuple(sizes.work(traced)),
                tuple(problems))


def _parameters(shapes: dict) -> tuple[Row, ...]:
    counts = {}
    for name, leaf in shapes.items():
        part = next((part for part, mark in PARTS if mark in f"{name}/"), "norms")
        counts[part] = counts.get(part, 0) + math.prod(leaf.shape)
    rows = [Row(part, counts[part]) for part, _ in PARTS if part in counts]
    return (*rows, Row("total", sum(counts.values())), Row("outside the routed experts",
            sum(counts.values()) - counts.get("routed experts", 0)))


class _Sizes:
    """Bytes and operations that follow from the shapes of one run."""

    def __init__(self, config, model, shapes, experts_format, others_format, table):
        self.config, self.model, self.table, self.format = config, model, table, experts_format
        self.tokens = config.train.rows_per_step * config.data.max_length
        self.itemsize = jnp.dtype(config.model.dtype).itemsize
        routed = {name: leaf for name, leaf in shapes.items() if "/mlp/experts/" in name}
        self.experts = sum(math.prod(leaf.shape[:2]) * experts_format.bytes(*leaf.shape[2:])
                           for leaf in routed.values())
        self.expert_parameters = sum(math.prod(leaf.shape) for leaf in routed.values())
        self.others = 0
        for name, leaf in shapes.items():
            if name not in routed and "_proj" in name.split("/")[-2]:
                self.others += leaf.shape[0] * others_format.bytes(*leaf.shape[1:])
            elif name not in routed:
                kind = 4 if name.endswith("e_score_correction_bias") else 2 if others_format.bits <= 16 else 4
                self.others += math.prod(leaf.shape) * kind
        # Kept from forward to backward: gate and up activations of every route, in the type of the computation.
        kept = 4 if experts_format.bits == 32 else 2
        self.routes = self.tokens * model.num_experts_per_tok
        self.stash_need = 2 * model.moe_intermediate_size * self.routes * kept * model.num_moe_layers
        if config.model.experts == "device":
            self.stash_need = 0

    def stash(self, on: Machine) -> int:
        limit = on.host * FREE_SHARE if self.config.model.stash_gb is None else self.config.model.stash_gb * 1e9
        return int(min(self.stash_need, limit))

    def host(self, traced: _Traced, on: Machine) -> list[Row]:
        rows = [Row("program", PROGRAM, "Python, JAX and compiled code")]
        if self.config.model.experts == "host" and self.model.num_moe_layers:
            stash = self.stash(on)
            note = "gate and up activations from forward to backward" if stash == self.stash_need else \
                f"of {size(self.stash_need)} wanted; the rest is computed twice ({self.recomputed(on):.0%} of routes)"
            # x, y, dy and dx of one layer, and the fp32 sums of one of them.
            call = self.tokens * self.model.hidden_size * (4 * self.itemsize + 4)
            rows = [Row("routed experts", self.experts, f"{self.format.name}, as they lie in the files: page cache"),
                    Row("stash", stash, note), Row("expert activations", call, "of the layer at work"), *rows]
        if on.device is None:
            rows.append(Row("device part", traced.total, "JAX runs on the CPU"))
        return rows

    def recomputed(self, on: Machine) -> float:
        return 1 - self.stash(on) / self.stash_need if self.stash_need else 0.0

    def disk(self) -> list[Row]:
        adapter = self.table.rows[-1].parameters * 4
        saved = adapter * 4 * self.config.train.keep  # the state has masters and two moments, and the adapter beside it
        return [Row("checkpoint of the base", self.experts + self.others,
                    f"experts {self.format.name}; without MTP layers"),
                Row("adapter", adapter, "PEFT, fp32"), Row("saved states", saved, f"{self.config.train.keep} kept")]

    def work(self, traced: _Traced) -> list[Row]:
        model = self.model
        gemm = 2 * 3 * model.hidden_size * model.moe_intermediate_size * self.routes * model.num_moe_layers
        share = 1 - (1 - model.num_experts_per_tok / model.n_routed_experts) ** self.tokens
        rows = [Row("tokens", self.tokens, "places; packing fills almost all of them"),
                Row("device operations", traced.operations, "matrix products, forward, recompute and backward")]
        if self.config.model.experts == "host" and model.num_moe_layers:
            rows += [Row("host operations", 2.0 * gemm, "the experts, forward and backward to x"),
                     Row("tokens per expert", self.routes / model.n_routed_experts, "on average"),
                     Row("expert bytes read", 2.0 * share * self.experts, "once forward, once backward")]
        return rows


def _device(traced: _Traced, on: Machine) -> list[Row]:
    rows = [Row("weights", traced.weights, "outside the host's experts, in Model.dtype"),
            Row("adapter and optimiser", traced.state, "fp32 masters and two Adam moments"),
            Row("batch", traced.batch),
            Row("saved for the backward pass", traced.saved, "layer inputs and routes"),
            Row("working set", math.ceil(traced.working * MARGIN),
                f"gradients, attention, logits: traced {size(traced.working)}, with a margin of {MARGIN - 1:.0%}")]
    return rows if on.device is None else [*rows, Row("context", CONTEXT, "CUDA and its libraries")]


def _host_problems(config: Config, sizes: _Sizes, host: list[Row], on: Machine) -> list[str]:
    total = _total(host)
    if total <= on.host:
        return []
    experts = next((row.amount for row in host if row.name == "routed experts"), 0)
    beside, stash = total - experts, sizes.stash(on)
    if beside > on.host and beside - stash <= on.host:
        return [f"main memory: {size(beside)} beside the experts, {size(on.host)} free. Set Model.stash_gb to "
                f"{max(0.0, (on.host - beside + stash) / 1e9):.0f}: more is computed twice"]
    if beside > on.host:
        return [f"main memory: {size(beside)} beside the experts, {size(on.host)} free. Lower Train.rows_per_step or "
                "Data.max_length, or use a machine with more memory"]
    return [f"main memory: the experts take {size(experts)} and all else {size(beside)}, {size(on.host)} are free: "
            f"they would be read from disk, {size(2 * experts)} per step. Use a checkpoint in fewer bits (INT4 experts "
            f"take about {size(sizes.expert_parameters * 0.5625)}), or more memory"]


def _total(rows: list[Row]) -> float:
    return sum(row.amount for row in rows)


def _device_problem(config: Config, model, spec, linears, device: list[Row], on: Machine) -> str:
    """The first knob that makes the plan fit, found by tracing the changed step: one alone, then all together."""
    need, settings = _total(device), config.train
    text = f"device memory: {size(need)} needed, {size(on.usable)} there for JAX. "
    if need <= on.device * MOST:
        return text + f"Set {FRACTION}={MOST} in the environment: JAX takes {on.share:.0%} of the device now"
    micro, chunk = {"micro_rows": 1}, {"loss_chunk": min(256, settings.loss_chunk)}
    knobs = [micro, chunk, micro | chunk]
    rows = settings.rows_per_step
    while rows > 1:
        rows //= 2
        knobs.append(micro | chunk | {"rows_per_step": rows})
    for knob in knobs:
        tried = dataclasses.replace(config, train=dataclasses.replace(settings, **knob))
        least = _total(_device(_trace(tried, model, spec, linears), on))
        named = ", ".join(f"Train.{name} = {value}" for name, value in knob.items() if getattr(settings, name) != value)
        if least <= on.usable:
            return text + f"It fits with {named}"
    return text + (f"Even with {named} it takes {size(least)}: shorten Data.max_length, or use a GPU with more memory")
