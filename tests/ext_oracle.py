"""Float64 experts in numpy and small stores over arrays: what the kernel tests compare with."""

from dataclasses import dataclass

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


def make_layer(rng, experts, width, hidden, fmt="bf16", layers=1, layer=0):
    """All layers of the store hold the same experts, so tests that need one may use any."""
    store = _ext.Store(layers, experts, width, hidden, fmt)
    weights = []
    for projection, (rows, cols) in enumerate([(hidden, width), (hidden, width), (width, hidden)]):
        w = bits(rng.standard_normal((experts, rows, cols)) / np.sqrt(cols), fmt)
        raw = np.frombuffer(w.tobytes(), np.uint8)
        buffer = store.add_buffer(raw)
        offset = np.arange(experts, dtype=np.int64) * (raw.size // experts)
        for i in range(layers):
            store.place(i, projection, np.full(experts, buffer, np.int32), offset)
        weights.append(values(w))
    return Layer(store, *weights)


def route(rng, tokens, experts, per_token, holes=0.2):
    """idx [N, K] without repeats in a row, some -1; gate [N, K]."""
    idx = np.stack([rng.permutation(max(experts, per_token))[:per_token] for _ in range(tokens)]) if tokens else np.zeros((0, per_token))
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
