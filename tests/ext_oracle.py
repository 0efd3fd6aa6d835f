"""Float64 experts in numpy and small stores over arrays: what the kernel tests compare with."""

from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

from kjax import _ext

BF16 = ml_dtypes.bfloat16


def round_bf16(a):
    return np.asarray(a, np.float32).astype(BF16).astype(np.float64)


def bits(a, dtype):
    """An array as the kernels take it: bf16 as its uint16 bits."""
    return np.asarray(a, np.float32).astype(BF16).view(np.uint16) if dtype == "bf16" else np.asarray(a, np.float32)


def values(a):
    return a.view(BF16).astype(np.float64) if a.dtype == np.uint16 else a.astype(np.float64)


@dataclass
class Layer:
    """A store of random experts and their weights as float64: gate, up [E, F, D], down [E, D, F]."""

    store: _ext.Store
    gate: np.ndarray
    up: np.ndarray
    down: np.ndarray
    exact: tuple | None = None  # the same where there are scales: scale * code, which some kernels do not round

    def unrounded(self):
        return replace(self, **dict(zip(("gate", "up", "down"), self.exact, strict=True))) if self.exact else self


QUANTISED = {  # bits of a code, rows and columns that share a scale (0: all columns), type of the scale
    "fp8_block": (8, 128, 128, np.float32),
    "fp8_channel": (8, 1, 0, np.float32),
    "int4_group32": (4, 1, 32, BF16),
    "int8_group128": (8, 1, 128, BF16),
}
FORMATS = ["bf16", "fp32", *QUANTISED]


def quantised(rng, fmt, experts, rows, cols):
    """Random codes and scales as bytes [E, .], and as float64 [E, rows, cols] bf16(scale * code) and scale * code."""
    bits_, block_rows, block_cols, scale_type = QUANTISED[fmt]
    block_cols = block_cols or cols
    blocks = -(-rows // block_rows), -(-cols // block_cols)
    if fmt.startswith("fp8"):
        codes = rng.integers(0, 256, (experts, rows, cols), dtype=np.uint8)
        codes[codes & 127 == 127] ^= 1  # not the code of NaN
        numbers, stored, unit = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32), codes, 200
    elif fmt == "int8_group128":
        codes = rng.integers(-128, 128, (experts, rows, cols), dtype=np.int8)
        numbers, stored, unit = codes.astype(np.float32), codes, 70
    else:
        codes = rng.integers(0, 16, (experts, rows, -(-cols // 8) * 8), dtype=np.uint8)
        numbers, unit = codes[..., :cols].astype(np.float32) - 8, 5
        stored = codes[..., ::2] | codes[..., 1::2] << 4
    scales = ((0.5 + rng.random((experts, *blocks))) / (unit * np.sqrt(cols))).astype(scale_type)
    spread = np.repeat(np.repeat(scales.astype(np.float32), block_rows, 1), block_cols, 2)[:, :rows, :cols]
    as_bytes = [np.frombuffer(a.tobytes(), np.uint8).reshape(experts, -1) for a in (stored, scales)]
    return *as_bytes, (numbers * spread).astype(BF16).astype(np.float64), numbers.astype(np.float64) * spread


def make_layer(rng, experts, width, hidden, fmt="bf16", layers=1):
    """All layers of the store hold the same experts, so tests that need one may use any."""
    store = _ext.Store(layers, experts, width, hidden, fmt)

    def add(raw):  # [E, bytes] -> where place() finds it
        buffer = store.add_buffer(raw.reshape(-1))
        return np.full(experts, buffer, np.int32), np.arange(experts, dtype=np.int64) * raw.shape[1]

    weights, exact = [], []
    for projection, (rows, cols) in enumerate([(hidden, width), (hidden, width), (width, hidden)]):
        if fmt in QUANTISED:
            codes, scales, w, scaled = quantised(rng, fmt, experts, rows, cols)
            where = *add(codes), *add(scales)
            exact.append(scaled)
        else:
            stored = bits(rng.standard_normal((experts, rows, cols)) / np.sqrt(cols), fmt)
            w = values(stored)
            where = add(np.frombuffer(stored.tobytes(), np.uint8).reshape(experts, -1))
        for layer in range(layers):
            store.place(layer, projection, *where)
        weights.append(w)
    return Layer(store, *weights, tuple(exact) if fmt in QUANTISED else None)


def route(rng, tokens, experts, per_token, holes=0.2):
    """idx [N, K] without repeats in a row, some -1; gate [N, K]."""
    idx = (
        np.stack([rng.permutation(max(experts, per_token))[:per_token] for _ in range(tokens)])
        if tokens
        else np.zeros((0, per_token))
    )
    idx = np.where((idx >= experts) | (rng.random((tokens, per_token)) < holes), -1, idx).astype(np.int32)
    return idx, rng.random((tokens, per_token)).astype(np.float32)


def oracle(layer, x, idx, gate, dy, rounding=lambda a: a):
    """(y, dx, dgate) in float64; `rounding` is applied where a kernel that multiplies in a narrower type must round."""
    x, dy = rounding(x), rounding(dy)
    y, dx, dgate = np.zeros_like(x), np.zeros_like(x), np.zeros(gate.shape)
    for t, k in np.argwhere(idx >= 0):
        e = idx[t, k]
        g, u = layer.gate[e] @ x[t], layer.up[e] @ x[t]
        y[t] += gate[t, k] * (layer.down[e] @ rounding(g / (1 + np.exp(-g)) * u))
        g, u = rounding(g), rounding(u)
        s = 1 / (1 + np.exp(-g))
        a = layer.down[e].T @ dy[t]
        dgate[t, k] = a @ (g * s * u)
        dx[t] += rounding(gate[t, k] * a * u * (s + g * s * (1 - s))) @ layer.gate[e]
        dx[t] += rounding(gate[t, k] * a * g * s) @ layer.up[e]
    return y, dx, dgate


def relative_l2(a, b):
    norm = np.linalg.norm(b)
    return np.linalg.norm(a - b) / norm if norm else np.linalg.norm(a)
