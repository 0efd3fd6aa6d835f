"""The expert layer in float64, for judging results before they are timed."""

import sys
from functools import cache

import numpy as np
from cases import CHECKED, Batch, bf16, wide

WRONG = 0.05  # a relative L2 error no rounding explains, W8A8 kernels included


def _round(a):
    return wide(bf16(a))


def experts(weights, b: Batch, n: int, round=lambda a: a):
    """(y, dx, dgate) of the first n tokens, which share their experts; `round` where operands are rounded."""
    x, dy = wide(b.x[:n]), wide(b.dy[:n])
    y, dx, dgate = np.zeros_like(x), np.zeros_like(x), np.zeros((n, b.idx.shape[1]))
    for k, e in enumerate(b.idx[0]):
        gate_w, up_w, down_w = weights(int(e))
        scale = b.gate[:n, k : k + 1].astype(np.float64)
        g, u, a = x @ gate_w.T, x @ up_w.T, dy @ down_w
        h = round(g / (1 + np.exp(-g)) * u)
        y += scale * (h @ down_w.T)
        g, u = round(g), round(u)
        s = 1 / (1 + np.exp(-g))
        dgate[:, k] = (a * g * s * u).sum(1)
        dx += round(scale * a * u * (s + g * s * (1 - s))) @ gate_w + round(scale * a * g * s) @ up_w
    return round(y), round(dx), dgate


class Judge:
    """Relative L2 errors of a contender's results, and how many times those of rounding operands alone they are."""

    def __init__(self, weights):
        self._weights = weights

    @cache  # noqa: B019  the first tokens of every batch are the same: two answers in all
    def _answers(self, n, rounded):
        return experts(self._weights, self._batch, n, *([_round] if rounded else []))

    def errors(self, batch: Batch, got) -> dict:
        """`got` is (y,) or (y, dx, dgate) of the whole batch; exits when they are wrong."""
        n, self._batch = min(CHECKED, len(batch.x)), batch
        out = {}
        for name, a, exact, rounded in zip(
            ("y", "dx", "dgate"), got, self._answers(n, False), self._answers(n, True), strict=False
        ):
            size = np.linalg.norm(exact)
            error = float(np.linalg.norm(wide(np.asarray(a)[:n]) - exact) / size)
            if not error < WRONG:
                sys.exit(f"wrong result: relative error {error:.3g} of {name}")
            out[name] = error
            out[f"{name} / rounding"] = error / float(np.linalg.norm(rounded - exact) / size)
        return out
