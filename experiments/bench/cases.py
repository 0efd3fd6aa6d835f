"""What is measured: layer shapes, formats, stores of random weights, and the batches that go through them."""

import mmap
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from kjax import _ext


@dataclass(frozen=True)
class Shape:
    width: int
    hidden: int
    experts: int
    per_token: int

    @property
    def weights(self) -> int:
        """Of one expert."""
        return 3 * self.width * self.hidden


SHAPES = {"v2-lite": Shape(2048, 1408, 64, 6), "v3": Shape(7168, 2048, 32, 8), "small": Shape(512, 384, 16, 4)}
# bits of a weight; weights that share a scale, as rows and columns (0: the whole row); bytes of a scale
FORMATS = {
    "bf16": (16, None, 0),
    "fp32": (32, None, 0),
    "fp8_block": (8, (128, 128), 4),
    "fp8_channel": (8, (1, 0), 4),
    "int4_group32": (4, (1, 32), 2),
    "int8_group128": (8, (1, 128), 2),
}
CHECKED = 8  # tokens compared with float64; they share their experts, so that few have to be decoded


def bf16(a):
    """The bits of a as bfloat16, as uint16."""
    return a.astype(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)


def wide(bits):
    """float64 of bfloat16 bits or of float32."""
    return (bits if bits.dtype != np.uint16 else (bits.astype(np.uint32) << 16).view(np.float32)).astype(np.float64)


@dataclass
class Batch:
    x: np.ndarray  # bf16 bits [N, D]
    dy: np.ndarray
    idx: np.ndarray  # [N, K]
    gate: np.ndarray

    @property
    def touched(self) -> int:
        return len(np.unique(self.idx))


def make_batch(shape: Shape, tokens: int, rng) -> Batch:
    idx = rng.random((tokens, shape.experts)).argsort(1)[:, : shape.per_token].astype(np.int32)
    gate = rng.random((tokens, shape.per_token), dtype=np.float32)
    x, dy = (bf16(rng.standard_normal((tokens, shape.width))) for _ in range(2))
    return Batch(x, dy, idx, gate / gate.sum(1, keepdims=True))


def timed_batches(shape: Shape, tokens: int) -> list[Batch]:
    """Batches that take turns, so that few tokens do not find their experts in the cache."""
    rng = np.random.default_rng(tokens)
    return [make_batch(shape, tokens, rng) for _ in range(8 if tokens <= 16 else 2 if tokens <= 128 else 1)]


def checked_batch(shape: Shape, tokens: int) -> Batch:
    """A batch whose first tokens are the same whatever the number of tokens, and share their experts."""
    first, rest = (
        make_batch(shape, CHECKED, np.random.default_rng(0)),
        make_batch(shape, tokens, np.random.default_rng(1)),
    )
    n = min(CHECKED, tokens)
    for name in ("x", "dy", "gate"):
        getattr(rest, name)[:n] = getattr(first, name)[:n]
    rest.idx[:n] = first.idx[0]
    return rest


def _huge(size):
    """Zeroed bytes that may lie on huge pages."""
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


_FP8_DEVIATION = 105  # the largest of 128 x 128 normal numbers is 4.3 times theirs


def _codes(fmt: str, cols: int, rng):
    """4 MB of stored bytes, weights of about 1 / sqrt(cols) after scaling."""
    if fmt in ("bf16", "fp32"):
        numbers = rng.standard_normal(1 << 20, dtype=np.float32) / np.float32(np.sqrt(cols))
        return (bf16(numbers) if fmt == "bf16" else numbers).view(np.uint8)
    if fmt.startswith("fp8"):  # as in a checkpoint: a block's largest is 448, and few are subnormal, which cost time
        numbers = np.clip(_FP8_DEVIATION * rng.standard_normal(1 << 22, dtype=np.float32), -448, 448)
        return numbers.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return rng.integers(0, 256, 1 << 22, dtype=np.uint8)


def _scales(fmt: str, rows: int, cols: int, experts: int, rng):
    _, block, size = FORMATS[fmt]
    count = -(-rows // block[0]) * (-(-cols // block[1]) if block[1] else 1)
    code = {"fp8": _FP8_DEVIATION, "int4": 5, "int8": 70}[fmt.split("_")[0]]
    scales = (0.5 + rng.random(count * experts, dtype=np.float32)) / np.float32(code * np.sqrt(cols))
    return (scales.astype(np.float32) if size == 4 else bf16(scales)).view(np.uint8), count * size


def _decoded(fmt: str, codes, scales, rows: int, cols: int):
    """Scale x code of one projection in float64."""
    bits, block, size = FORMATS[fmt]
    if not block:
        return wide(codes.view(np.uint16 if bits == 16 else np.float32)).reshape(rows, cols)
    if bits == 4:
        numbers = np.stack([codes & 15, codes >> 4], 1).astype(np.float64) - 8
    else:
        numbers = codes.view(ml_dtypes.float8_e4m3fn if fmt.startswith("fp8") else np.int8).astype(np.float64)
    scales = wide(scales.view(np.float32 if size == 4 else np.uint16)).reshape(-(-rows // block[0]), -1)
    scales = scales.repeat(block[0], 0)[:rows].repeat(block[1] or cols, 1)[:, :cols]
    return numbers.reshape(rows, cols) * scales


def make_store(shape: Shape, fmt: str):
    """A store of one layer of random weights, the bytes of one expert, and expert -> (gate, up, down) in float64."""
    rng = np.random.default_rng(0)
    store, bytes_of_one = _ext.Store(1, shape.experts, shape.width, shape.hidden, fmt), 0
    at = np.arange(shape.experts, dtype=np.int64)
    sides, parts = (shape.hidden, shape.width), []
    for projection, (rows, cols) in enumerate([sides, sides, sides[::-1]]):
        size = rows * cols * FORMATS[fmt][0] // 8
        memory, codes = _huge(size * shape.experts), _codes(fmt, cols, rng)
        for begin in range(0, memory.size, codes.size):
            memory[begin : begin + codes.size] = codes[: memory.size - begin]
        where = [np.full(shape.experts, store.add_buffer(memory), np.int32), at * size]
        bytes_of_one += size
        scales, each = np.zeros(0, np.uint8), 0
        if FORMATS[fmt][1]:
            scales, each = _scales(fmt, rows, cols, shape.experts, rng)
            where += [np.full(shape.experts, store.add_buffer(scales), np.int32), at * each]
            bytes_of_one += each
        store.place(0, projection, *where)
        parts.append((memory, size, scales, each, rows, cols))

    def weights(e):
        return tuple(
            _decoded(fmt, memory[e * size :][:size], scales[e * each :][:each], rows, cols)
            for memory, size, scales, each, rows, cols in parts
        )

    return store, bytes_of_one, weights
