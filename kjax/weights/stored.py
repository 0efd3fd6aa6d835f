"""A checkpoint's weights as they are stored, whatever the model: found by name, read as numbers in bands of rows."""

import math
from collections.abc import Iterator

import numpy as np

from kjax.errors import CheckpointError
from kjax.offload.formats import FORMATS, Quantised, decode
from kjax.weights.files import quote
from kjax.weights.safetensors import DTYPES, ITEMSIZE, Checkpoint, TensorEntry

WHOLE = ("BF16", "F16", "F32")  # the dtypes of weights that are stored without scales
ROWS = 128  # a multiple of every block's rows
NUMBERS = 1 << 21  # that a band aims at: 8 MiB as fp32

Source = TensorEntry | Quantised

# The bits of the exponent; all set means NaN or Inf.
_EXPONENT = {"bfloat16": (np.uint16, 0x7F80), "float16": (np.uint16, 0x7C00), "float32": (np.uint32, 0x7F800000)}


def main(source: Source) -> TensorEntry:
    """The tensor that holds most of a weight."""
    return source.codes if isinstance(source, Quantised) else source


def weights(checkpoint: Checkpoint, quantization) -> dict[str, Source]:
    """Every weight by its name, multi-token prediction and unknown ones too; the tensors of a quantised one are one.

    quantization: a kjax.models.quantization.Quantization or None. Raises CheckpointError where scales or shapes are
    missing or do not fit.
    """
    found: dict[str, Source] = {}
    parts: set[str] = set()
    if quantization is not None:
        made = FORMATS[quantization.format]
        for name in checkpoint.names():
            if not name.endswith(f".weight{quantization.codes}") or checkpoint.entry(name).dtype != made.dtype:
                continue
            weight = name.removesuffix(quantization.codes) if quantization.codes else name
            found[weight] = _quantised(checkpoint, quantization, weight)
            parts.update(weight + part for part in (quantization.codes, quantization.scales, quantization.shape))
    return found | {name: checkpoint.entry(name) for name in checkpoint.names() if name not in parts | found.keys()}


def _quantised(checkpoint: Checkpoint, quantization, weight: str) -> Quantised:
    codes = checkpoint.entry(weight + quantization.codes)
    for part in (quantization.scales, quantization.shape):
        if part and weight + part not in checkpoint:
            raise CheckpointError(f"{checkpoint.directory}: {quote(codes.name)} has no {quote(weight + part)}; "
                                  "download the checkpoint again")
    shape = codes.shape
    if quantization.shape:
        said = checkpoint.entry(weight + quantization.shape)
        if said.shape != (2,) or said.dtype not in ("I32", "I64"):
            raise CheckpointError(f"{checkpoint.directory}: {quote(said.name)} is {said.dtype} {list(said.shape)}, "
                                  "expected two integers; download the checkpoint again")
        shape = tuple(map(int, checkpoint.read(said.name)))
    source = Quantised(weight, quantization.format, shape, codes, checkpoint.entry(weight + quantization.scales))
    for entry, dtype, needs in source.expected():
        if entry.dtype != dtype or entry.shape != tuple(needs):
            raise CheckpointError(f"{checkpoint.directory}: {quote(entry.name)} is {entry.dtype} {list(entry.shape)}, "
                                  f"expected {dtype} {list(needs)}; download the checkpoint again")
    return source


def bands(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """First row and end of each band of a weight [out, in]; every band but the last has a multiple of ROWS."""
    step = max(ROWS, NUMBERS // max(1, math.prod(shape[1:])) // ROWS * ROWS)
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def numbers(checkpoint: Checkpoint, source: Source, start: int, stop: int, *, exact: bool = False) -> np.ndarray:
    """Rows of a weight as fp32; NaN and Inf are refused by name.  exact: as for kjax.offload.formats.decode."""
    out = np.empty((stop - start, *source.shape[1:]), np.float32)
    read(checkpoint, source, start, out, exact=exact)
    return out


def read(checkpoint: Checkpoint, source: Source, start: int, out: np.ndarray, *, exact: bool = False):
    """Fills `out` [rows, ...] of any floating type with a weight's rows from `start` on; refuses NaN and Inf."""
    entry, stop = main(source), start + len(out)
    if isinstance(source, Quantised):
        decode(source.format, rows(checkpoint, entry, start, stop), scales(checkpoint, source, start, stop), out, start,
               exact=exact)
    elif out.dtype == np.dtype(DTYPES[entry.dtype]):
        rows(checkpoint, entry, start, stop, out)
    else:
        with np.errstate(over="ignore", invalid="ignore"):  # what becomes Inf is reported by name below
            out[...] = rows(checkpoint, entry, start, stop).reshape(out.shape).astype(out.dtype)
    unsigned, exponent = _EXPONENT[out.dtype.name]
    refuse(source, start, (out.view(unsigned) & unsigned(exponent)) == exponent, out.dtype.name)


def refuse(source: Source, start: int, bad: np.ndarray, dtype: str):
    """Names the first number of the rows from `start` on that is bad, read as dtype."""
    if bad.any():
        entry, first = main(source), np.unravel_index(int(bad.argmax()), bad.shape)
        place = [start + int(first[0]), *map(int, first[1:])]
        raise CheckpointError(f"{entry.path}: tensor {quote(entry.name)} holds NaN or Inf (first at {place}, as "
                              f"{dtype}); the checkpoint is damaged, download this shard again")


def rows(checkpoint: Checkpoint, entry: TensorEntry, start: int, stop: int, out: np.ndarray | None = None):
    """Rows of a tensor as stored, in `out` or a new array."""
    if out is None:
        out = np.empty((stop - start, *entry.shape[1:]), DTYPES[entry.dtype])
    checkpoint.read_bytes(entry, out, start * math.prod(entry.shape[1:]) * ITEMSIZE[entry.dtype])
    return out


def scales(checkpoint: Checkpoint, source: Quantised, start: int, stop: int) -> np.ndarray:
    """The scales, as stored, of the blocks that rows start to stop lie in."""
    height = FORMATS[source.format].block[0]
    return rows(checkpoint, source.scales, start // height, (stop - 1) // height + 1)
