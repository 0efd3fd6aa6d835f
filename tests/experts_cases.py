"""Random routed-expert problems and the float64 oracle that the offload tests share."""

import ml_dtypes
import numpy as np

import kjax.offload as offload

EPS32 = float(np.finfo(np.float32).eps)
# One rounding to bfloat16 is at most 2^-9 of the value and 2^-9/sqrt(3) of it in the root mean square.
RMS_BF16 = 2.0**-9 / np.sqrt(3)


def problem(rng, *, n=13, d=24, f=20, e=6, k=3, layers=2, dtype=np.float32, holes=0.2):
    """Weights [L,E,..] and x, idx, gate, dy; a share `holes` of the routes goes to no expert."""

    def draw(*shape, scale):
        return (rng.standard_normal(shape) * scale).astype(np.float32).astype(dtype)
    weights = (draw(layers, e, f, d, scale=d**-0.5), draw(layers, e, f, d, scale=d**-0.5),
               draw(layers, e, d, f, scale=f**-0.5))
    idx = np.argsort(rng.random((n, e)), axis=1)[:, :k].astype(np.int32)
    idx[rng.random(idx.shape) < holes] = -1
    gate = rng.uniform(0.1, 1, (n, k)).astype(np.float32)
    return weights, draw(n, d, scale=1), idx, gate, draw(n, d, scale=1)


def oracle(weights, layer, x, idx, gate, dy):
    """y, dx, dgate in float64, a loop over routes; unused routes have zero dgate."""
    gate_w, up_w, down_w = (w[layer].astype(np.float64) for w in weights)
    x, gate, dy = (a.astype(np.float64) for a in (x, gate, dy))
    y, dx, dgate = np.zeros_like(x), np.zeros_like(x), np.zeros_like(gate)
    for n, k in zip(*np.nonzero(idx >= 0), strict=True):
        e, w = idx[n, k], gate[n, k]
        g, u = gate_w[e] @ x[n], up_w[e] @ x[n]
        s = 1 / (1 + np.exp(-g))
        h = g * s * u
        y[n] += w * (down_w[e] @ h)
        dh = down_w[e].T @ dy[n]
        dgate[n, k] = dh @ h
        dg, du = w * dh * u * (s + g * s * (1 - s)), w * dh * g * s
        dx[n] += gate_w[e].T @ dg + up_w[e].T @ du
    return y, dx, dgate


def store(weights, transport="auto"):
    return offload.ExpertStore.from_arrays(*weights, transport=transport)


def relative(a, b):
    """max|a-b| / max|b|, zero when both are zero or empty."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.abs(a - b).max(initial=0) / max(np.abs(b).max(initial=0), 1e-300))


def relative_l2(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-300))


def tolerance32(d, f):
    """Relative error of three chained fp32 products: a sum of n terms errs by about sqrt(n) eps; 8 for the tail."""
    return 8 * np.sqrt(d + f) * EPS32


BF16 = ml_dtypes.bfloat16
