"""The expert store: where each routed expert lies, in the mapped shards or copied, readable by the host kernels."""

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

from kjax import _ext
from kjax.errors import CheckpointError
from kjax.offload.formats import ALIGNMENT, FORMATS, Entry, Quantised
from kjax.offload.resident import Resident, as_float32
from kjax.offload.storage import Mode

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
PLAIN = {"BF16": "bf16", "F32": "fp32"}  # safetensors dtype of a weight without scales -> format of the kernels


class ExpertStore:
    """All routed experts of a model, in the bytes of the checkpoint.

    They are never transposed or converted. In mapped shards an expert costs memory only as page cache; resident ones
    are copied as they are, see kjax.offload.storage.
    A store is hashable by identity, so that it can be a static argument under jit. Close it (or use it as a context
    manager) when no compiled function that uses it will run again; a call after that is an error, not a crash.

    Attributes:
      layers, experts, width (D), hidden (F): its shape.  id: its number in the kernels.
      format: "bf16", "fp32" or one of kjax.offload.formats.FORMATS.
      transport: how compiled functions reach it, see kjax.offload.bridge.  storage: "mapped" or "resident".
      refused: why resident experts may lie on another memory node than meant, or "".
    """

    def __init__(self, projections: Sequence[Sequence[Mapping[str, Entry | Quantised]]], *, transport: Literal[
            "auto", "ffi", "pure_callback"] = "auto", storage: Mode = "mapped", check: bool = True,
                 progress: bool = True):
        """Map, or copy, the experts of `projections[layer][expert]["gate_proj" | "up_proj" | "down_proj"]`.

        Bfloat16 and float32 weights are entries by themselves. check reads every weight once and refuses NaN and Inf.
        Raises CheckpointError with the names of all tensors that do not fit.
        """
        if not projections or not projections[0]:
            raise CheckpointError("the model has no routed experts to store")
        first = projections[0][0]["gate_proj"]
        hidden, width = first.shape
        self._require_uniform(projections, _format(first), hidden, width)
        self._open(len(projections), len(projections[0]), width, hidden, _format(first), transport, storage)
        try:
            place = (self._map if storage == "mapped" else functools.partial(self._copy, show=progress))(projections)
            self._place(projections, self._widened(projections, place))
            if check:
                self._require_finite(projections)
        except BaseException:
            self.close()
            raise

    def _place(self, projections, place: Callable[[Entry], tuple[int, int]]) -> None:
        """Tells the kernels where every tensor lies."""
        def where(entries):
            """The buffers and offsets of one tensor of every expert."""
            buffers, offsets = zip(*map(place, entries), strict=True)
            return np.array(buffers, np.int32), np.array(offsets, np.int64)

        for layer, experts in enumerate(projections):
            for number, name in enumerate(PROJECTIONS):
                weights = [expert[name] for expert in experts]
                if self.format in FORMATS:
                    places = *where([w.codes for w in weights]), *where([w.scales for w in weights])
                else:
                    places = *where(weights), None, None
                self._ext.place(layer, number, *places)

    @classmethod
    def from_arrays(cls, gate, up, down, *, transport="auto") -> "ExpertStore":
        """A store over arrays in memory: gate and up [L,E,F,D], down [L,E,D,F], all float32 or all bfloat16."""
        arrays = [np.ascontiguousarray(array) for array in (gate, up, down)]
        layers, experts, hidden, width = arrays[0].shape
        for name, array, shape in zip(PROJECTIONS, arrays, [(hidden, width), (hidden, width), (width, hidden)],
                                      strict=True):
            if array.shape != (layers, experts, *shape) or array.dtype != arrays[0].dtype:
                raise ValueError(f"{name}: expected {(layers, experts, *shape)} {arrays[0].dtype}, "
                                 f"got {array.shape} {array.dtype}")
        formats = {"float32": "fp32", "bfloat16": "bf16"}
        if arrays[0].dtype.name not in formats:
            raise ValueError(f"experts must be float32 or bfloat16, not {arrays[0].dtype}")
        self = cls.__new__(cls)
        self._open(layers, experts, width, hidden, formats[arrays[0].dtype.name], transport)
        for number, array in enumerate(arrays):
            buffer = self._ext.add_buffer(array.reshape(-1).view(np.uint8))
            step = array[0, 0].nbytes
            for layer in range(layers):
                offset = (layer * experts + np.arange(experts, dtype=np.int64)) * step
                self._ext.place(layer, number, np.full(experts, buffer, np.int32), offset, None, None)
        return self

    def _open(self, layers, experts, width, hidden, format_, transport, storage="resident"):
        self.layers, self.experts, self.width, self.hidden = layers, experts, width, hidden
        self.format, self.transport, self.storage, self.refused = format_, transport, storage, ""
        self._ext = _ext.Store(layers, experts, width, hidden, format_)
        self.id = self._ext.id
        self._finalizer = weakref.finalize(self, self._ext.close)

    def _map(self, projections) -> Callable[[Entry], tuple[int, int]]:
        """The buffer and offset of a tensor in the mapped files."""
        files = {path: self._ext.add_file(path) for path in dict.fromkeys(
            str(entry.path) for layer in projections for expert in layer for entry in _tensors(expert))}
        return lambda entry: (files[str(entry.path)], entry.begin)

    def _copy(self, projections, show: bool) -> Callable[[Entry], tuple[int, int]]:
        """The buffer and offset of a tensor in memory of its own."""
        copy = Resident([[entry for layer in projections for entry in _tensors(layer[expert])]
                         for expert in range(self.experts)], show=show)
        for buffer in copy.buffers:
            self._ext.add_buffer(buffer)
        self._ext.set_nodes(np.array(copy.nodes, np.int32))
        self.refused = copy.refused
        return copy.place

    def _widened(self, projections, place) -> Callable[[Entry], tuple[int, int]]:
        """place, but scales narrower than the kernels read them lie in a buffer of their own, as fp32."""
        narrow = [weight.scales for layer in projections for expert in layer for weight in expert.values()
                  if isinstance(weight, Quantised) and weight.is_narrow]
        if not narrow:
            return place
        scales, offsets = as_float32(narrow)
        buffer = self._ext.add_buffer(scales.view(np.uint8))

        def found(entry):
            offset = offsets.get((str(entry.path), entry.begin))
            return place(entry) if offset is None else (buffer, offset)

        return found

    @staticmethod
    def _require_uniform(projections, format_, hidden, width):
        shapes = {"gate_proj": (hidden, width), "up_proj": (hidden, width), "down_proj": (width, hidden)}
        wrong = []
        for experts in projections:
            if len(experts) != len(projections[0]):
                raise CheckpointError(f"layers with {len(projections[0])} and {len(experts)} routed experts")
            for expert in experts:
                for name, weight in expert.items():
                    wrong += _misfits(weight, format_, shapes[name])
        if wrong:
            raise CheckpointError("routed experts that do not fit:\n  " + "\n  ".join(wrong))

    def _require_finite(self, projections):
        wrong = [projections[layer][expert][PROJECTIONS[projection]].name
                 for layer in range(self.layers) for expert, projection in self._ext.nonfinite(layer)]
        if wrong:
            raise CheckpointError("NaN or Inf in routed experts, the checkpoint is damaged:\n  " + "\n  ".join(wrong))

    def decode(self, layer: int, expert: int, projection: str) -> np.ndarray:
        """One projection as float32 [out,in]: for oracles and exports."""
        return self._ext.decode(layer, expert, PROJECTIONS.index(projection))

    def stats(self) -> dict[str, float]:
        """Calls (`forward`, `backward`, `recomputed`), `tokens` and seconds spent in the kernels so far."""
        return self._ext.stats()

    def close(self):
        """Unmap or free; its entries leave the stash."""
        self._finalizer()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __repr__(self):
        return (f"ExpertStore({self.layers} layers x {self.experts} experts, D {self.width}, F {self.hidden}, "
                f"{self.format}, {self.storage})")


def size(projections: Sequence[Sequence[Mapping[str, Entry | Quantised]]]) -> int:
    """Bytes of all experts, as stored."""
    return sum(entry.end - entry.begin for layer in projections for expert in layer for entry in _tensors(expert))


def _tensors(expert: Mapping[str, Entry | Quantised]) -> Iterator[Entry]:
    for weight in expert.values():
        yield from (weight.codes, weight.scales) if isinstance(weight, Quantised) else (weight,)


def _format(weight: Entry | Quantised) -> str | None:
    return weight.format if isinstance(weight, Quantised) else PLAIN.get(weight.dtype)


def _misfits(weight: Entry | Quantised, format_: str | None, shape: tuple[int, int]) -> Iterator[str]:
    """What keeps a weight out of a store of experts of this format and shape."""
    if isinstance(weight, Quantised):
        parts = list(weight.expected())
        if weight.format != format_ or tuple(weight.shape) != shape:
            yield f"{weight.name}: {weight.format}{list(weight.shape)}, expected {format_}{list(shape)}"
            return
    elif weight.dtype not in PLAIN:
        scaled = any(weight.dtype == known.dtype for known in FORMATS.values())
        yield f"{weight.name}: {weight.dtype} experts are not supported" + (
            " without their scales" if scaled else f"; expected {', '.join(PLAIN)} or {', '.join(FORMATS)}")
        return
    else:
        dtype = next((code for code, name in PLAIN.items() if name == format_), format_ or weight.dtype)
        parts = [(weight, dtype, shape)]
    for entry, dtype, needs in parts:
        if entry.dtype != dtype or tuple(entry.shape) != tuple(needs):
            yield f"{entry.name}: {entry.dtype}{list(entry.shape)}, expected {dtype}{list(needs)}"
        elif entry.begin % ALIGNMENT.get(entry.dtype, 1):
            yield (f"{entry.name}: its offset in the file, {entry.begin}, is no multiple of {ALIGNMENT[entry.dtype]}; "
                   "write the shard again with the safetensors library")
