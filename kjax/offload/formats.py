"""How a weight may be stored: codes with one scale for each block of them, and what they mean.

W[i,j] = bf16(code[i,j] * scale[i // rows, j // columns]): the product in fp32, rounded once.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import ml_dtypes
import numpy as np


class Entry(Protocol):
    """A tensor in a file: `begin` and `end` are byte offsets from the file's start."""

    name: str
    path: object
    dtype: str  # the safetensors code
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Format:
    """How codes lie in a tensor [out, columns], and their scales in another [blocks, blocks], partial ones whole.

    block: the rows and columns that share a scale; 0 columns: the whole row.
    packed: codes in one element of the tensor, beginning at its low bits; stored as code + 8.
    narrow: a smaller dtype that scales may have in a file; the kernels get them as scale_dtype.
    """

    dtype: str
    scale_dtype: str
    block: tuple[int, int]
    packed: int = 1
    narrow: str | None = None

    def shape(self, out: int, in_: int) -> tuple[int, int]:
        return out, math.ceil(in_ / self.packed)

    def scales_shape(self, out: int, in_: int) -> tuple[int, int]:
        rows, columns = self.block
        return math.ceil(out / rows), math.ceil(in_ / columns) if columns else 1


FORMATS = {  # by the name that the kernels know
    "fp8_block": Format("F8_E4M3", "F32", (128, 128)),
    "fp8_channel": Format("F8_E4M3", "F32", (1, 0), narrow="BF16"),
    "int4_group32": Format("I32", "BF16", (1, 32), packed=8),
    "int8_group128": Format("I8", "BF16", (1, 128)),
}
ALIGNMENT = {"F32": 4, "BF16": 2}  # bytes at which the kernels can read a number in place; codes lie anywhere


@dataclass(frozen=True, slots=True)
class Quantised:
    """A weight [out, in] stored in one of FORMATS; codes and scales may lie in different files."""

    name: str
    format: str
    shape: tuple[int, int]
    codes: Entry
    scales: Entry

    @property
    def dtype(self) -> str:
        """What stands where the entry of a whole weight has its dtype."""
        return self.format

    def expected(self) -> Iterator[tuple[Entry, str, tuple[int, int]]]:
        """Its two tensors, each with the dtype and shape that it must have."""
        made = FORMATS[self.format]
        yield self.codes, made.dtype, made.shape(*self.shape)
        yield self.scales, made.narrow if self.is_narrow else made.scale_dtype, made.scales_shape(*self.shape)

    @property
    def is_narrow(self) -> bool:
        return self.scales.dtype == FORMATS[self.format].narrow


BAND = 128  # rows decoded at a time: a multiple of every block's, and little memory beside the result


def decode(format_: str, codes: np.ndarray, scales: np.ndarray, out: np.ndarray, first: int = 0, *,
           exact: bool = False):
    """Fills `out` [rows, in] with rows `first`, `first` + 1, ... of a weight, rounded to bf16 whatever out.dtype is.

    codes: these rows as stored.  scales: those of the rows' blocks, from that of row `first` on.
    exact: leave the products as they are in fp32, for whoever makes codes of them again.
    """
    made = FORMATS[format_]
    rows, columns = made.block[0], made.block[1] or out.shape[1]
    of_row = (first + np.arange(len(out))) // rows - first // rows
    with np.errstate(over="ignore", invalid="ignore"):  # NaN and Inf are for the caller to report, by name
        for start in range(0, len(out), BAND):
            band = slice(start, start + BAND)
            numbers = _numbers(codes[band], made)[:, :out.shape[1]]
            spread = np.repeat(scales.astype(np.float32)[of_row[band]], columns, axis=1)[:, :out.shape[1]]
            product = numbers * spread
            out[band] = product if exact else product.astype(ml_dtypes.bfloat16).astype(out.dtype)


_FP8 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def _numbers(codes: np.ndarray, made: Format) -> np.ndarray:
    """What stored codes stand for, before scaling: fp32 [rows, at least in]."""
    if made.dtype == "F8_E4M3":
        return _FP8[codes.view(np.uint8)]
    if made.packed == 1:
        return codes.astype(np.float32)
    halves = np.ascontiguousarray(codes, "<i4").view(np.uint8)
    return np.stack([halves & 15, halves >> 4], axis=-1).reshape(len(codes), -1).astype(np.float32) - 8
