"""The expert layer in float64, for judging results before they are timed."""

import sys
from functools import cache

import numpy as np
from cases import CHECKED, Batch, bf16, wide

WRONG = 0.05  # a relative L2 error no rounding explains, W8A8 kernels included
ROUNDING = 2**-9 / 3**0.5  # of one rounding to bf16: what results that meet none are allowed all the same
NAMES = ("gate", "up", "down")


def _round(a):
    return wide(bf16(a))


def one_expert(weights, adapters, x, dy, scale, round=lambda a: a):
    """y, dx, dgate and [dA, dB] of each adapter for rows x of one expert, `round` where operands are rounded.

    weights: (gate, up, down).  adapters: three (A [R, in], B [out, R], scale), or none.  scale: gates [rows, 1].
    """
    low = [None] * 3  # T = scale * x A^T of each adapter

    def times(p, x):
        out = x @ weights[p].T
        if adapters:
            a, b, s = adapters[p]
            low[p] = s * (x @ a.T)
            out += low[p] @ b.T
        return out

    def transposed(p, dy, x, by=1):
        """dx, and dA and dB, those `by` times."""
        dx = dy @ weights[p]
        if not adapters:
            return dx, []
        a, b, s = adapters[p]
        back = s * (dy @ b)
        return dx + back @ a, [(by * back).T @ x, (by * dy).T @ low[p]]

    g, u = times(0, x), times(1, x)
    h = round(g / (1 + np.exp(-g)) * u)
    y = scale * times(2, h)
    g, u = round(g), round(u)
    s = 1 / (1 + np.exp(-g))
    a, of_down = transposed(2, dy, g * s * u, scale)  # h again, from what a forward pass keeps
    dgate = (a * g * s * u).sum(1)
    (dx, of_gate), (more, of_up) = (
        transposed(p, round(scale * d), x) for p, d in ((0, a * u * (s + g * s * (1 - s))), (1, a * g * s))
    )
    return y, dx + more, dgate, [*of_gate, *of_up, *of_down]


class Judge:
    """Relative L2 errors of a contender's results, and how many times those of rounding operands alone they are. With
    `either` a result may come from weights as they are or rounded to bf16: what is nearer counts."""

    def __init__(self, weights, adapters=None, either=False):
        self._weights, self._adapters = weights, adapters
        self._meanings = (False, True) if either else (False,)

    def _expert(self, e: int, x, dy, gate, rounded: bool, of_rounded: bool):
        adapters = self._adapters(e) if self._adapters else None
        more = [_round] if rounded else []
        weights = map(_round, self._weights(e)) if of_rounded else self._weights(e)
        return one_expert(tuple(weights), adapters, wide(x), wide(dy), gate[:, None].astype(np.float64), *more)

    @cache  # noqa: B019  the first tokens of every batch are the same: four answers in all
    def _answers(self, n, rounded, of_rounded):
        b = self._batch
        y, dx, dgate = 0, 0, np.zeros((n, b.idx.shape[1]))
        for k, e in enumerate(b.idx[0]):
            one = self._expert(int(e), b.x[:n], b.dy[:n], b.gate[:n, k], rounded, of_rounded)
            y, dx, dgate[:, k] = y + one[0], dx + one[1], one[2]
        return (_round(y), _round(dx), dgate) if rounded else (y, dx, dgate)

    @cache  # noqa: B019  four answers for each number of tokens
    def _gradients(self, tokens, rounded, of_rounded):
        """dA and dB of the first token's first expert, from all its rows."""
        b, e = self._batch, int(self._batch.idx[0, 0])
        rows, places = np.nonzero(b.idx == e)
        return self._expert(e, b.x[rows], b.dy[rows], b.gate[rows, places], rounded, of_rounded)[3]

    def errors(self, batch: Batch, got) -> dict:
        """`got` is (y,) or (y, dx, dgate[, gradients of the adapters, all experts']) of the whole batch; exits when
        they are wrong."""
        n, self._batch = min(CHECKED, len(batch.x)), batch
        found = dict(zip(("y", "dx", "dgate"), (wide(np.asarray(a)[:n]) for a in got[:3]), strict=False))
        if len(got) > 3:
            names = [f"{factor} of {name}" for name in NAMES for factor in ("dA", "dB")]
            found |= zip(names, (wide(np.asarray(a)[batch.idx[0, 0]]) for a in got[3]), strict=True)
        out = {}
        for of_rounded in self._meanings:
            answers = []
            for rounded in (False, True):
                answers.append(self._answers(n, rounded, of_rounded))
                if len(got) > 3:
                    answers[-1] += tuple(self._gradients(len(batch.x), rounded, of_rounded))
            for (name, a), exact, rounded in zip(found.items(), *answers, strict=False):
                size = np.linalg.norm(exact)
                error = float(np.linalg.norm(a - exact) / size)
                ratio = error / max(float(np.linalg.norm(rounded - exact) / size), ROUNDING)
                if not ratio > out.get(f"{name} / rounding", np.inf):
                    out |= {name: error, f"{name} / rounding": ratio}
        for name in found:
            if not out[name] < WRONG:
                sys.exit(f"wrong result: relative error {out[name]:.3g} of {name}")
        return out
