"""Where an adapter's matrices lie in PEFT's files: a pair of tensors for each module, or fused over all experts.

per expert: `...mlp.experts.3.gate_proj.lora_A.weight` [R, in] and `...lora_B.weight` [out, R], as for any other module.
fused: PEFT's adapters of the parameters that transformers 5 keeps experts in. gate_up_proj, rows of gate first, is
    `...mlp.experts.base_layer.lora_{A,B}.weight` and down_proj `...mlp.experts.lora_{A,B}.weight` (a parameter that is
    adapted alone has the latter name).  A [E*R, in], the expert before the rank;  B [out, R*E], the rank before the
    expert. Gate and up share A; made from per-expert adapters it has the ranks of both, and B is block-diagonal.
"""

import functools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import safetensors
from flax.traverse_util import flatten_dict

from kjax.lora import Adapter, Linears, LoraSpec, layer_offset
from kjax.weights.safetensors import DTYPES
from kjax.weights.writer import Part, Tensor

EXPERTS = "moe_layers/mlp/experts/"
GATE, UP, DOWN, GATE_UP = (EXPERTS + name for name in ("gate_proj", "up_proj", "down_proj", "gate_up_proj"))
MATRICES = ("lora_A", "lora_B")

# A text model inside of a multimodal one has a prefix: one in remote code, another in transformers 5.
_KEY = re.compile(r"base_model\.model\.(?:language_model\.model|model\.language_model|model)\."
                  r"(layers\.\d{1,9}\.[^/]+)\.(lora_[AB])\.weight")


def module(path: str, index: tuple[int, ...], linears: Linears) -> str:
    """The Hugging Face module name of one linear of a stack: `model.layers.3.mlp.experts.7.gate_proj`."""
    *parents, last = path.split("/")[1:]
    parts = [*parents, *map(str, index[1:]), last]
    return f"model.layers.{layer_offset(path, linears) + index[0]}." + ".".join(parts)


def modules(path: str, linears: Linears) -> dict[tuple[int, ...], str]:
    """index -> module name of all linears of a stack."""
    return {index: module(path, index, linears) for index in np.ndindex(*linears[path].stack)}


def key(module_: str, matrix: str, prefix: str = "") -> str:
    """The tensor's name in PEFT files: its two wrappers come before the module's own name."""
    return f"base_model.model.{prefix}{module_}.{matrix}.weight"


def parse(key_: str) -> tuple[str, str] | None:
    """(module, matrix) of a tensor's name, without any prefix; None if it is no LoRA of a decoder layer."""
    found = _KEY.fullmatch(key_)
    return (f"model.{found[1]}", found[2]) if found else None


@dataclass(frozen=True)
class Fused:
    """The adapter of one parameter of all experts of all layers, in fused files."""

    parameter: str  # gate_up_proj or down_proj
    wrapper: str  # what follows `mlp.experts` in its tensors' names
    adapter: Adapter
    split: bool = False  # gate has the first half of the ranks for itself, up the second

    def module(self, layer: int, linears: Linears) -> str:
        return f"model.layers.{layer_offset(DOWN, linears) + layer}.mlp.experts{self.wrapper}"

    def shapes(self, linears: Linears) -> dict[str, tuple[int, int]]:
        path = DOWN if self.parameter == "down_proj" else GATE
        size, rows = linears[path], 1 if self.parameter == "down_proj" else 2
        ranks = size.experts * self.adapter.rank
        return {"lora_A": (ranks, size.width_in), "lora_B": (rows * size.width_out, ranks)}

    def entries(self) -> list[tuple[str, Adapter]]:
        """What it is per projection: the same scale, for gate and up half of the rank if they share none of it."""
        if self.parameter == "down_proj":
            return [(DOWN, self.adapter)]
        each = self.adapter
        if self.split:
            each = replace(each, rank=each.rank // 2)
            each = replace(each, alpha=alpha_of(self.adapter.scale, each))
        return [(GATE, each), (UP, each)]


def alpha_of(scale: float, adapter: Adapter) -> float:
    """The alpha that gives an adapter of this rank a scale."""
    return scale * (math.sqrt(adapter.rank) if adapter.rslora else adapter.rank)


class Reader:
    """The matrices of an adapter file, read when asked for, as fp32. Safe to call from many threads."""

    def __init__(self, tensors: safetensors.safe_open, keys: Mapping[tuple[str, str], str], linears: Linears,
                 fused: tuple[Fused, ...] = ()):
        """keys: (module, matrix) -> the tensor's name."""
        self._tensors, self._keys, self._linears = tensors, keys, linears
        self.fused = {path: made for made in fused for path, _ in made.entries()}
        # A layer's two parameters with two matrices each, and as many of the next: V3 at rank 8 has 0.3 GB a layer.
        self._layer = functools.lru_cache(8)(self._read_layer)

    def pair(self, path: str, index: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """A [R, in] and B [out, R] of one linear."""
        if path in self.fused:
            return tuple(stack[index[1]] for stack in self.layer(path, index[0]))
        name = module(path, index, self._linears)
        return tuple(self._get(name, matrix).astype(np.float32) for matrix in MATRICES)

    def layer(self, path: str, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """A [E, R, in] and B [E, out, R] of all experts of a layer, of fused files."""
        made = self.fused[path]
        a, b = (self._layer(made, layer, matrix) for matrix in MATRICES)
        if made.parameter == "down_proj":
            return a, b
        first, rows, ranks = path == GATE, b.shape[1] // 2, a.shape[1] // 2
        b = b[:, :rows] if first else b[:, rows:]
        if made.split:
            a, b = (a[:, :ranks], b[..., :ranks]) if first else (a[:, ranks:], b[..., ranks:])
        return a, b

    def is_split(self, made: Fused) -> bool:
        """Whether gate and up have ranks of their own: B block-diagonal everywhere."""
        layers, half = self._linears[GATE].layers, made.adapter.rank // 2
        if made.parameter == "down_proj" or made.adapter.rank % 2:
            return False
        for layer in range(layers):
            b = self._read_layer(made, layer, "lora_B")
            rows = b.shape[1] // 2
            if b[:, :rows, half:].any() or b[:, rows:, :half].any():
                return False
        return True

    def _get(self, name: str, matrix: str) -> np.ndarray:
        return self._tensors.get_tensor(self._keys[name, matrix])

    def _read_layer(self, made: Fused, layer: int, matrix: str) -> np.ndarray:
        """A [E, R, in] or B [E, out, R] of a parameter."""
        tensor = self._get(made.module(layer, self._linears), matrix).astype(np.float32)
        if matrix == "lora_A":
            return tensor.reshape(-1, made.adapter.rank, tensor.shape[1])
        return np.ascontiguousarray(tensor.reshape(len(tensor), made.adapter.rank, -1).transpose(2, 0, 1))


def per_expert(tree: dict, linears: Linears, dtype: str, prefix: str) -> Iterator[Part]:
    """The tensors of a lora tree, one pair for each module."""
    for name, leaf in flatten_dict(tree, sep="/").items():
        path, matrix = name.rsplit("/", 1)
        stack = np.asarray(leaf)
        for index, owner in modules(path, linears).items():
            yield _part(key(owner, matrix, prefix), dtype, stack.shape[len(index):], lambda s=stack, i=index: s[i])


def fuse(spec: LoraSpec) -> tuple[LoraSpec, tuple[Fused, ...]]:
    """A spec's adapters outside of the experts, and those of the experts in the fused form.

    Gate's and up's ranks are put side by side, under the larger one's scale.
    """
    rest = LoraSpec(tuple(entry for entry in spec.entries if not entry[0].startswith(EXPERTS)))
    down, both = spec.get(DOWN), [a for a in (spec.get(GATE), spec.get(UP)) if a is not None]
    made = []
    if both:
        lead = max(both, key=lambda adapter: abs(adapter.scale))
        wide = replace(lead, rank=sum(adapter.rank for adapter in both))
        wide = replace(wide, alpha=alpha_of(lead.scale, wide))
        made.append(Fused("gate_up_proj", ".base_layer" if down else "", wide, len(both) == 2))
    if down:
        made.append(Fused("down_proj", "", down))
    return rest, tuple(made)


def fused(tree: dict, spec: LoraSpec, linears: Linears, dtype: str, prefix: str) -> Iterator[Part]:
    """The tensors of a lora tree, those of the experts fused."""
    leaves = {name: np.asarray(leaf) for name, leaf in flatten_dict(tree, sep="/").items()}
    yield from per_expert({name: leaf for name, leaf in leaves.items() if not name.startswith(EXPERTS)}, linears, dtype,
                          prefix)
    for made in fuse(spec)[1]:
        shapes = made.shapes(linears)
        for layer in range(linears[DOWN].layers):
            for matrix, of_layer in (("lora_A", _fused_a), ("lora_B", _fused_b)):
                yield _part(key(made.module(layer, linears), matrix, prefix), dtype, shapes[matrix],
                            functools.partial(of_layer, leaves, spec, linears, made, layer))


def _fused_a(leaves, spec: LoraSpec, linears: Linears, made: Fused, layer: int) -> np.ndarray:
    paths = [DOWN] if made.parameter == "down_proj" else [path for path in (GATE, UP) if spec.get(path)]
    a = np.concatenate([leaves[f"{path}/lora_A"][layer] for path in paths], axis=1)  # [E, R, in]
    return a.reshape(-1, a.shape[-1])


def _fused_b(leaves, spec: LoraSpec, linears: Linears, made: Fused, layer: int) -> np.ndarray:
    if made.parameter == "down_proj":
        b = leaves[f"{DOWN}/lora_B"][layer]  # [E, out, R]
    else:
        rows = linears[GATE].width_out
        b = np.zeros((linears[GATE].experts, 2 * rows, made.adapter.rank), np.float32)
        rank = 0
        for path, first in ((GATE, 0), (UP, rows)):
            if adapter := spec.get(path):
                block = leaves[f"{path}/lora_B"][layer]
                scale = adapter.scale / made.adapter.scale if made.adapter.scale else 1
                b[:, first:first + rows, rank:rank + adapter.rank] = block * np.float32(scale)
                rank += adapter.rank
    return b.transpose(1, 2, 0).reshape(b.shape[1], -1)


def _part(name: str, dtype: str, shape: tuple[int, ...], make) -> Part:
    return Part((Tensor(name, dtype, tuple(shape)),), lambda: iter([(np.asarray(make(), DTYPES[dtype]),)]))
