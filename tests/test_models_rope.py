"""Rotary positions against numbers published for the real models, and the two layouts against each other."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from kjax.models import rope
from kjax.models.config import Rope, Yarn


class _Heads:
    qk_head_dim = 192

    def __init__(self, rope):
        self.rope = rope


@pytest.mark.parametrize(("theta", "yarn", "scale", "frequencies"), [
    # DeepSeek-V3, DeepSeek-V2-Lite, Kimi-K2, Kimi-K2.5 and Moonlight: softmax scale, and pairs 0, 10, 16, 23, 31 of 32.
    (1e4, Yarn(40, 4096, 32, 1, 1, 1), 0.1352337789, (1, 5.62341e-2, 5.5e-3, 3.33380e-5, 3.33380e-6)),
    (1e4, Yarn(40, 4096, 32, 1, 0.707, 0.707), 0.1147213868, (1, 5.62341e-2, 5.5e-3, 3.33380e-5, 3.33380e-6)),
    (5e4, Yarn(32, 4096, 1, 1, 1, 1), 0.1308608000, (1, 3.40073e-2, 4.47214e-3, 1.31059e-5, 8.76441e-7)),
    (5e4, Yarn(64, 4096, 32, 1, 1, 1), 0.1446796258, (1, 2.84280e-2, 1.53730e-3, 6.55293e-6, 4.38221e-7)),
    (5e4, None, 0.0721688, tuple(5e4 ** (-i / 32) for i in (0, 10, 16, 23, 31))),
])
def test_published_models(theta, yarn, scale, frequencies):
    found = rope.frequencies(Rope(theta, yarn=yarn), 64)[[0, 10, 16, 23, 31]]
    np.testing.assert_allclose(found, frequencies, rtol=5e-6)  # six digits are published
    assert math.isclose(rope.softmax_scale(_Heads(Rope(theta, yarn=yarn))), scale, rel_tol=1e-6)
    assert rope.rotary_factor(yarn) == 1


def test_rotary_factor_follows_the_keys_that_are_there():
    m = 0.1 * math.log(40) + 1
    assert math.isclose(rope.rotary_factor(Yarn(40, 4096)), m)
    assert math.isclose(rope.rotary_factor(Yarn(40, 4096, mscale=2.0, mscale_all_dim=1.0)), (2 * m - 1) / m)
    assert rope.rotary_factor(Yarn(40, 4096, attention_factor=0.5)) == 0.5


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotation_turns_pairs_and_scores_depend_on_distance_alone(interleaved):
    draw = np.random.RandomState(0)
    q, k = draw.standard_normal((2, 8)).astype(np.float32)

    def turned(x, position):
        cos, sin = rope.cos_sin(Rope(1e4), 8, jnp.array([[position]]))
        return np.asarray(rope.rotate(x[None, None], cos, sin, interleaved))[0, 0]

    np.testing.assert_array_equal(turned(q, 0), q)
    pairs = [(0, 1), (2, 3)] if interleaved else [(0, 4), (1, 5)]
    for frequency, (a, b) in zip(rope.frequencies(Rope(1e4), 8), pairs, strict=False):
        z = complex(q[a], q[b]) * np.exp(1j * 5 * float(frequency))
        np.testing.assert_allclose(turned(q, 5)[[a, b]], [z.real, z.imag], rtol=1e-5, atol=1e-6)
    # Angles up to 100 radians carry 100 eps; the products of eight numbers add little to it.
    assert abs(turned(q, 107) @ turned(k, 100) - turned(q, 7) @ turned(k, 0)) < 1e-4
