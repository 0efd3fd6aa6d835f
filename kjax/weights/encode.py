"""Numbers into codes and scales, the inverse of kjax.offload.formats.decode.

A block's scale is its absmax / LARGEST, in the type that the format stores scales in. Where a block had a scale
before, that one is kept as long as each of its numbers still has a code: unchanged numbers then keep theirs. Codes are
rounded to nearest even or, with a random generator, up or down with the probability that makes them right on average.
"""

import ml_dtypes
import numpy as np

from kjax.offload.formats import FORMATS, Format
from kjax.weights.safetensors import DTYPES

# The code that a block's absmax is given. Four bits have codes from -8 to 7, so 7.5 stands for both ends, which costs
# either of them half a step at most; this is also what compressed-tensors does.
LARGEST = {"fp8_block": 448.0, "fp8_channel": 448.0, "int8_group128": 127.0, "int4_group32": 7.5}
CODES = {"F8_E4M3": (-448, 448), "I8": (-127, 127), "I32": (-8, 7)}  # the least and the greatest, by stored dtype


def encode(format_: str, weight: np.ndarray, *, scale_dtype: str | None = None, power_of_two: bool = False,
           kept: np.ndarray | None = None, random: np.random.Generator | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a weight, fp32 [rows, in], as codes [rows, ...] and scales [blocks, blocks] of one of FORMATS.

    The first row must begin a block.  scale_dtype: the safetensors code where it is not the format's own.
    power_of_two: scales are rounded up to powers of two.  kept: the blocks' present scales, as stored.
    random: for rounding that is right on average.
    """
    made = FORMATS[format_]
    numbers = _blocks(weight, made)
    largest = np.abs(numbers).max((1, 3))
    scales = largest / np.float32(LARGEST[format_])
    scales = np.where(largest > 0, scales, np.float32(1))
    if power_of_two:
        mantissa, exponent = np.frexp(scales)
        scales = np.ldexp(np.float32(1), exponent - (mantissa == 0.5))
    scales = scales.astype(DTYPES[scale_dtype or made.scale_dtype])
    # A number so small that its scale is below the type's range has no other code than 0.
    scales = np.where(scales > 0, scales, scales.dtype.type(1))
    if kept is not None:
        scales = np.where(_reach(numbers, kept.astype(np.float32), made), kept, scales)
    numbers = numbers / scales.astype(np.float32)[:, None, :, None]
    low, high = CODES[made.dtype]
    numbers = np.clip(numbers, low, high)
    if made.dtype == "F8_E4M3":
        codes = (numbers if random is None else _e4m3_on_average(numbers, random)).astype(ml_dtypes.float8_e4m3fn)
    else:
        codes = np.rint(numbers) if random is None else np.floor(numbers + _uniform(numbers.shape, random))
        codes = np.clip(codes, low, high).astype(np.int8)
    codes = codes.reshape(codes.shape[0] * codes.shape[1], -1)[:len(weight)]
    if made.packed == 8:
        return _packed(codes, made.shape(*weight.shape)[1]), scales
    return np.ascontiguousarray(codes[:, :weight.shape[1]]), scales


def _blocks(weight: np.ndarray, made: Format) -> np.ndarray:
    """[rows, in] as [blocks, rows of one, blocks, columns of one], the last ones filled up with zeros."""
    height, width = made.block[0], made.block[1] or weight.shape[1]
    rows, columns = made.scales_shape(*weight.shape)
    if weight.shape != (rows * height, columns * width):
        whole = np.zeros((rows * height, columns * width), np.float32)
        whole[:weight.shape[0], :weight.shape[1]] = weight
        weight = whole
    return weight.reshape(rows, height, columns, width)


def _reach(numbers: np.ndarray, scales: np.ndarray, made: Format) -> np.ndarray:
    """Which blocks' numbers all lie within half a step of a code, under these scales."""
    low, high = CODES[made.dtype]
    half = 16 if made.dtype == "F8_E4M3" else 0.5  # of the step at the end of the range: 416, 448, (480)
    fit = (scales > 0) & np.isfinite(scales)
    return fit & (numbers.max((1, 3)) <= (high + half) * scales) & (numbers.min((1, 3)) >= (low - half) * scales)


def _uniform(shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    return random.random(shape, np.float32)


def _e4m3_on_average(numbers: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Each number moved to one of its two neighbours in e4m3: the nearer, the likelier."""
    _, exponent = np.frexp(numbers)
    # Three bits follow the leading one; below 2^-6 the step stays that of the subnormal numbers, 2^-9.
    step = np.ldexp(np.float32(1), np.maximum(exponent - 1, -6) - 3)
    return np.clip(np.floor(numbers / step + _uniform(numbers.shape, random)) * step, -448, 448)


def _packed(codes: np.ndarray, words: int) -> np.ndarray:
    """int8 -8 to 7 [rows, columns] as int32 [rows, words], eight to a word from the low bits on, stored as code + 8."""
    whole = np.full((len(codes), words * 8), 8, np.uint8)
    columns = min(codes.shape[1], words * 8)
    whole[:, :columns] = (codes[:, :columns] + 8).view(np.uint8)
    return (whole[:, ::2] | whole[:, 1::2] << 4).view("<i4")
