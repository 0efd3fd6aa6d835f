"""The names of a checkpoint's weights, and their places in the stacked parameter tree."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from flax.traverse_util import flatten_dict

from kjax.weights.files import quote

STACKS = ("dense_layers", "moe_layers")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

_LAYER = re.compile(r"model\.layers\.(0|[1-9]\d{0,8})\.")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor goes: `tree[leaf][index]`, of the given shape. A routed expert kept on the host has leaf None."""

    leaf: str | None
    index: tuple[int, ...]
    shape: tuple[int, ...]


def places(abstract: Mapping, prefix: str = "") -> dict[str, Place]:
    """Checkpoint name -> place, for every tensor that a tree of shapes asks for.

    The tree's paths are the Hugging Face names: `moe_layers/self_attn/o_proj/weight` [L, ...] stacks
    `model.layers.{first + l}.self_attn.o_proj.weight`, where the MoE stack begins after the dense one. prefix: of all
    names, as a multimodal checkpoint has it (`Family.prefix`).
    """
    found = _places(abstract)
    return {prefix + name: place for name, place in found.items()} if prefix else found


def _places(abstract: Mapping) -> dict[str, Place]:
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
        prefix = f"{config.family.prefix}model.layers.{config.num_dense_layers + layer}.mlp.experts"
        for expert in range(config.n_routed_experts):
            for projection in PROJECTIONS:
                yield layer, expert, projection, f"{prefix}.{expert}.{projection}.weight", shapes[projection]


def skipped(name: str, config) -> str | None:
    """Why a tensor of the checkpoint is not loaded, or None if it must have a place."""
    for pattern, reason in config.family.unused.items():
        if re.fullmatch(pattern, name):
            return reason
    if not name.startswith(config.family.prefix):
        return None
    name = name.removeprefix(config.family.prefix)
    if name.endswith(".rotary_emb.inv_freq"):
        return "a constant that follows from config.json"
    layer = _LAYER.match(name)
    if layer and int(layer[1]) >= config.num_hidden_layers:
        return "multi-token prediction, not part of the model that is fine-tuned"
    if name == "lm_head.weight" and config.tie_word_embeddings:
        return "the output head is tied to the embedding"
    return None


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
