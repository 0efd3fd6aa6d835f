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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import safetensors

from kjax.lora import Adapter, Linears, LoraSpec, layer_offset
from kjax.weights.safetensors import DTYPES
from kjax.weights.writer import Part, Tensor

EXPERTS = "moe_layers/mlp/experts/"
GATE, UP, DOWN, GATE_UP = (EXPERTS + name for name in ("gate_proj", "up_proj", "down_proj", "gate_up_proj"))
MATRICES = ("lora_A", "lora_B")
ROWS = 64  # of a fused B made at a time: 12 MB for DeepSeek-V3's 256 experts at rank 16

# (path, matrix, index) -> a matrix, as for Reader.matrix.
Read = Callable[[str, str, tuple[int, ...]], np.ndarray]

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

    @property
    def paths(self) -> tuple[str, ...]:
        """The projections in it, in the order of its rows."""
        return (DOWN,) if self.parameter == "down_proj" else (GATE, UP)

    def shapes(self, linears: Linears) -> dict[str, tuple[int, int]]:
        size, ranks = linears[self.paths[0]], linears[DOWN].experts * self.adapter.rank
        return {"lora_A": (ranks, size.width_in), "lora_B": (len(self.paths) * size.width_out, ranks)}

    def rows(self, path: str, linears: Linears) -> slice:
        """Which rows of B a projection has."""
        first = self.paths.index(path) * linears[path].width_out
        return slice(first, first + linears[path].width_out)

    def ranks(self, path: str) -> slice:
        """Which ranks a projection has."""
        if not self.split:
            return slice(None)
        half = self.adapter.rank // 2
        return slice(0, half) if path == GATE else slice(half, None)

    def entries(self) -> list[tuple[str, Adapter]]:
        """What it is per projection: the same scale, for gate and up half of the rank if they share none of it."""
        each = self.adapter
        if self.split:
            each = replace(each, rank=each.rank // 2)
            each = replace(each, alpha=alpha_of(self.adapter.scale, each))
        return [(path, each) for path in self.paths]


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
        # Both parameters of a layer and of the next: one expert's part of a fused B lies in all of its rows.
        # DeepSeek-V3 at rank 8 has 0.13 GB a layer.
        self._fused_b = functools.lru_cache(4)(self._read_fused_b)

    def matrix(self, path: str, matrix: str, index: tuple[int, ...]) -> np.ndarray:
        """A [R, in] or B [out, R] of one linear; where index is a layer alone, [E, ...] of all its experts."""
        if path in self.fused:
            return self._of_fused(self.fused[path], path, matrix, *index)
        if len(index) == len(self._linears[path].stack):
            return self._get(module(path, index, self._linears), matrix)
        experts = self._linears[path].experts
        first = self.matrix(path, matrix, (*index, 0))
        found = np.empty((experts, *first.shape), np.float32)
        found[0] = first
        for expert in range(1, experts):
            found[expert] = self.matrix(path, matrix, (*index, expert))
        return found

    def _of_fused(self, made: Fused, path: str, matrix: str, layer: int, expert: int | None = None) -> np.ndarray:
        """One expert's matrix, or those of all [E, ...]."""
        rank, ranks = made.adapter.rank, made.ranks(path)
        if matrix == "lora_B":
            b = self._fused_b(made, layer)[:, made.rows(path, self._linears), ranks]
            return b if expert is None else b[expert]
        rows = slice(None) if expert is None else slice(expert * rank, (expert + 1) * rank)
        a = self._get(made.module(layer, self._linears), matrix, rows)
        a = a.reshape(-1, rank, a.shape[-1])[:, ranks]
        return a if expert is None else a[0]

    def is_split(self, made: Fused) -> bool:
        """Whether gate and up have ranks of their own: B block-diagonal everywhere."""
        layers, half = self._linears[GATE].layers, made.adapter.rank // 2
        if made.parameter == "down_proj" or made.adapter.rank % 2:
            return False
        for layer in range(layers):
            b = self._read_fused_b(made, layer)
            rows = b.shape[1] // 2
            if b[:, :rows, half:].any() or b[:, rows:, :half].any():
                return False
        return True

    def _get(self, name: str, matrix: str, rows: slice = slice(None)) -> np.ndarray:
        return self._tensors.get_slice(self._keys[name, matrix])[rows].astype(np.float32)

    def _read_fused_b(self, made: Fused, layer: int) -> np.ndarray:
        """B [E, out, R] of a parameter."""
        tensor = self._get(made.module(layer, self._linears), "lora_B")
        return np.ascontiguousarray(tensor.reshape(len(tensor), made.adapter.rank, -1).transpose(2, 0, 1))


def per_expert(read: Read, spec: LoraSpec, linears: Linears, dtype: str, prefix: str) -> Iterator[Part]:
    """The tensors of an adapter, one pair for each module."""
    def bands(path, matrix, index):
        yield (read(path, matrix, index).astype(DTYPES[dtype]),)

    for path, adapter in spec.entries:
        size = linears[path]
        shapes = {"lora_A": (adapter.rank, size.width_in), "lora_B": (size.width_out, adapter.rank)}
        for index, owner in modules(path, linears).items():
            for matrix in MATRICES:
                yield Part((Tensor(key(owner, matrix, prefix), dtype, shapes[matrix]),),
                           functools.partial(bands, path, matrix, index))


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


def fused(read: Read, spec: LoraSpec, linears: Linears, dtype: str, prefix: str) -> Iterator[Part]:
    """The tensors of an adapter, those of the experts fused."""
    rest, parameters = fuse(spec)
    yield from per_expert(read, rest, linears, dtype, prefix)
    for made in parameters:
        shapes = made.shapes(linears)
        for layer in range(linears[DOWN].layers):
            for matrix, bands in (("lora_A", _fused_a), ("lora_B", _fused_b)):
                tensor = Tensor(key(made.module(layer, linears), matrix, prefix), dtype, shapes[matrix])
                yield Part((tensor,), functools.partial(bands, read, spec, linears, made, layer, DTYPES[dtype]))


def _fused_a(read: Read, spec: LoraSpec, linears: Linears, made: Fused, layer: int, dtype) -> Iterator[tuple]:
    """An expert at a time."""
    paths = [path for path in made.paths if spec.get(path)]
    for expert in range(linears[DOWN].experts):
        yield (np.concatenate([read(path, "lora_A", (layer, expert)) for path in paths]).astype(dtype),)


def _fused_b(read: Read, spec: LoraSpec, linears: Linears, made: Fused, layer: int, dtype) -> Iterator[tuple]:
    """Some rows at a time, of which each has the numbers of all experts."""
    experts, rank = linears[DOWN].experts, 0
    for path in made.paths:  # each has rows of its own
        adapter, b = spec.get(path), None
        if adapter:
            b = read(path, "lora_B", (layer,))
            scale = np.float32(adapter.scale / made.adapter.scale if made.adapter.scale else 1)
        for start in range(0, linears[path].width_out, ROWS):
            rows = slice(start, min(start + ROWS, linears[path].width_out))
            band = np.zeros((rows.stop - start, made.adapter.rank, experts), dtype)
            if adapter:
                band[:, rank : rank + adapter.rank] = (b[:, rows] * scale).transpose(1, 2, 0)
            yield (band,)
        rank += adapter.rank if adapter else 0
