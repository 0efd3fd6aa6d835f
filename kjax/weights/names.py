"""The names of a checkpoint's tensors and their places in the stacked parameter tree; every tensor is accounted for."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from flax.traverse_util import flatten_dict

from kjax.errors import CheckpointError
from kjax.weights.safetensors import Checkpoint, TensorEntry, quote

READABLE = ("BF16", "F16", "F32")
STORABLE = ("BF16", "F32")  # what the host kernels multiply as it is
STACKS = ("dense_layers", "moe_layers")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

_LAYER = re.compile(r"model\.layers\.(0|[1-9]\d{0,8})\.")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor goes: `tree[leaf][index]`, of the given shape. A routed expert kept on the host has leaf None."""

    leaf: str | None
    index: tuple[int, ...]
    shape: tuple[int, ...]


def places(abstract: Mapping) -> dict[str, Place]:
    """Checkpoint name -> place, for every tensor that a tree of shapes asks for.

    The tree's paths are the Hugging Face names: `moe_layers/self_attn/o_proj/weight` [L, ...] stacks
    `model.layers.{first + l}.self_attn.o_proj.weight`, where the MoE stack begins after the dense one.
    """
    leaves = flatten_dict(abstract, sep="/")
    first = {"dense_layers": 0, "moe_layers": _length(leaves, "dense_layers")}
    found = {}
    for path, leaf in leaves.items():
        top, _, rest = path.partition("/")
        name = rest.replace("/", ".")
        if top not in STACKS:
            prefix = "" if top == "lm_head" else "model."
            found[f"{prefix}{top}.{name}"] = Place(path, (), leaf.shape)
            continue
        for layer in range(leaf.shape[0]):
            prefix = f"model.layers.{first[top] + layer}"
            if rest.startswith("mlp/experts/"):
                for expert in range(leaf.shape[1]):
                    tensor = f"{prefix}.mlp.experts.{expert}.{rest.rsplit('/', 1)[1]}.weight"
                    found[tensor] = Place(path, (layer, expert), leaf.shape[2:])
            else:
                found[f"{prefix}.{name}"] = Place(path, (layer,), leaf.shape[1:])
    return found


def _length(leaves: Mapping, stack: str) -> int:
    return next((leaf.shape[0] for path, leaf in leaves.items() if path.startswith(f"{stack}/")), 0)


def experts(config) -> Iterator[tuple[int, int, str, str, tuple[int, int]]]:
    """(l, e, projection, checkpoint name, shape) of every routed expert tensor; l counts MoE layers from 0."""
    width, hidden = config.hidden_size, config.moe_intermediate_size
    shapes = {"gate_proj": (hidden, width), "up_proj": (hidden, width), "down_proj": (width, hidden)}
    for layer in range(config.num_moe_layers):
        prefix = f"model.layers.{config.num_hidden_layers - config.num_moe_layers + layer}.mlp.experts"
        for expert in range(config.n_routed_experts):
            for projection in PROJECTIONS:
                yield layer, expert, projection, f"{prefix}.{expert}.{projection}.weight", shapes[projection]


def skipped(name: str, config) -> str | None:
    """Why a tensor of the checkpoint is not loaded, or None if it must have a place."""
    if name.endswith(".rotary_emb.inv_freq"):
        return "a constant that follows from config.json"
    layer = _LAYER.match(name)
    if layer and int(layer[1]) >= config.num_hidden_layers:
        return "multi-token prediction, not part of the model that is fine-tuned"
    if name == "lm_head.weight" and config.tie_word_embeddings:
        return "the output head is tied to the embedding"
    return None


def account(checkpoint: Checkpoint, config, abstract: Mapping) -> dict[str, Place]:
    """The place of every tensor of the checkpoint that is loaded into the tree.

    Compares the checkpoint with the tree, and with the routed experts where they stay on the host, and raises
    CheckpointError with everything that is missing, extra, misshapen or of a dtype that cannot be read.
    """
    wanted = places(abstract)
    hosted = {}
    if config.num_moe_layers and not any("/experts/" in (place.leaf or "") for place in wanted.values()):
        hosted = {name: Place(None, (layer, expert), shape) for layer, expert, _, name, shape in experts(config)}
    everything = wanted | hosted

    present = set(checkpoint.names())
    report = []
    if missing := [name for name in everything if name not in present]:
        report.append(f"missing: {grouped(missing)}")
    if extra := [name for name in checkpoint.names() if name not in everything and skipped(name, config) is None]:
        report.append(f"not part of this model: {grouped(extra)}")
    entries = [checkpoint.entry(name) for name in everything if name in present]
    report += [f"wrong shape: {line}" for line in _misshapen(entries, everything)]
    report += [f"wrong dtype: {line}" for line in _unreadable(entries, hosted)]
    if report:
        quantised = any(entry.dtype not in READABLE for entry in entries)
        raise CheckpointError(
            f"{checkpoint.directory}: the tensors do not fit config.json (model_type {quote(config.model_type)}):\n  "
            + "\n  ".join(report)
            + ("\nQuantised weights are not read yet: give a BF16 copy of the checkpoint." if quantised else
               "\nUse the config.json that belongs to these weights, or download the checkpoint again.")
        )
    return wanted


def expert_entries(checkpoint: Checkpoint, config) -> list[list[dict[str, TensorEntry]]]:
    """entries[l][e][projection] of all routed experts; raises CheckpointError naming all that do not fit."""
    wanted = {name: Place(None, (layer, expert), shape) for layer, expert, _, name, shape in experts(config)}
    missing = [name for name in wanted if name not in checkpoint]
    found = [checkpoint.entry(name) for name in wanted if name in checkpoint]
    report = [f"missing: {grouped(missing)}"] if missing else []
    report += [f"wrong shape: {line}" for line in _misshapen(found, wanted)]
    report += [f"wrong dtype: {line}" for line in _unreadable(found, wanted)]
    if report:
        raise CheckpointError(f"{checkpoint.directory}: the routed experts do not fit config.json:\n  "
                              + "\n  ".join(report))
    result = [[{} for _ in range(config.n_routed_experts)] for _ in range(config.num_moe_layers)]
    for layer, expert, projection, name, _ in experts(config):
        result[layer][expert][projection] = checkpoint.entry(name)
    return result


def _misshapen(entries: Iterable[TensorEntry], wanted: Mapping[str, Place]) -> list[str]:
    by_shape = {}
    for entry in entries:
        if entry.shape != wanted[entry.name].shape:
            by_shape.setdefault((entry.shape, wanted[entry.name].shape), []).append(entry.name)
    return [f"{list(has)}, expected {list(needs)}: {grouped(found)}" for (has, needs), found in by_shape.items()]


def _unreadable(entries: Iterable[TensorEntry], hosted: Mapping[str, Place]) -> list[str]:
    by_dtype, host_dtypes = {}, {}
    for entry in entries:
        if entry.name in hosted:
            host_dtypes.setdefault(entry.dtype, []).append(entry.name)
        elif entry.dtype not in READABLE:
            by_dtype.setdefault(entry.dtype, []).append(entry.name)
    lines = [f"{dtype}, readable are {', '.join(READABLE)}: {grouped(found)}" for dtype, found in by_dtype.items()]
    for dtype, found in host_dtypes.items():
        if dtype not in STORABLE:
            other = " (experts='device' reads F16)" if dtype == "F16" else ""
            lines.append(f"{dtype}, experts on the host are {' or '.join(STORABLE)}{other}: {grouped(found)}")
    if len(host_dtypes) > 1 and not lines:
        minority = min(host_dtypes.values(), key=len)
        kinds = " and ".join(f"{len(found)} {dtype}" for dtype, found in host_dtypes.items())
        lines.append(f"{kinds} routed experts, all must be of one dtype: {grouped(minority)}")
    return lines


def grouped(names: Iterable[str], limit: int = 20) -> str:
    """All of many names in little space: those that differ in a full grid of numbers become one pattern.

    `a.0.b.weight, a.1.b.weight, a.2.b.weight, a.3.b.weight` becomes `a.{0-3}.b.weight (4)`.
    """
    patterns: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
    for name in names:
        parts = re.split(r"\.(0|[1-9]\d{0,8})(?=\.)", name)
        patterns.setdefault(tuple(parts[::2]), []).append(tuple(int(part) for part in parts[1::2]))
    shown = []
    for parts, numbers in patterns.items():
        axes = [sorted(set(axis)) for axis in zip(*numbers, strict=True)]
        if len(numbers) > 1 and math.prod(map(len, axes)) == len(numbers):
            shown.append(f"{_filled(parts, map(_ranges, axes))} ({len(numbers):,})")
        else:
            few = [_filled(parts, number) for number in numbers[:limit]]
            more = f"... {len(numbers) - limit:,} more like {_filled(parts, ['*'] * len(axes))}"
            shown.append(", ".join(few + [more] * (len(numbers) > limit)))
    return ", ".join(shown[:limit]) + (f", ... {len(shown) - limit:,} more" if len(shown) > limit else "")


def _filled(parts: tuple[str, ...], between: Iterable[object]) -> str:
    """The parts of a name with what stood between them, safe to print."""
    text = parts[0] + "".join(f".{item}{part}" for item, part in zip(between, parts[1:], strict=True))
    return quote(text)[1:-1]


def _ranges(numbers: list[int]) -> str:
    """`{0-3,7}` for 0, 1, 2, 3, 7; a single number stands alone."""
    runs = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return text if len(numbers) == 1 else "{" + text + "}"
