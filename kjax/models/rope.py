"""Rotary positions: YaRN frequencies, the rotation of pairs, and the softmax scale that YaRN asks for."""

import math

import jax.numpy as jnp
import numpy as np

from kjax.models.config import ModelConfig, Rope, Yarn


def _m(factor: float, k: float = 1.0) -> float:
    """YaRN's attention temperature for a context extended `factor` times."""
    return 1.0 if factor <= 1 else 0.1 * k * math.log(factor) + 1.0


def frequencies(rope: Rope, width: int) -> np.ndarray:
    """Radians per position of each pair, [width/2] fp32.

    YaRN keeps the fast frequencies, divides the slow ones by its factor, and blends between the pairs that turn
    beta_fast and beta_slow times within the original context.
    """
    inv = rope.theta ** -(np.arange(0, width, 2) / width)
    if rope.yarn is None:
        return inv.astype(np.float32)
    yarn = rope.yarn

    def pair_turning(times: float) -> float:
        length = yarn.original_max_position_embeddings
        return width * math.log(length / (2 * math.pi * times)) / (2 * math.log(rope.theta))

    low, high = pair_turning(yarn.beta_fast), pair_turning(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = np.clip((np.arange(width // 2) - low) / ((high - low) or 0.001), 0, 1)  # 0.001: no 0 / 0
    return (inv * (1 - ramp) + inv / yarn.factor * ramp).astype(np.float32)


def rotary_factor(yarn: Yarn | None) -> float:
    """What cos and sin are multiplied by: 1 for every published DeepSeek and Kimi model."""
    if yarn is None:
        return 1.0
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    if yarn.mscale and yarn.mscale_all_dim:
        return _m(yarn.factor, yarn.mscale) / _m(yarn.factor, yarn.mscale_all_dim)
    return _m(yarn.factor)


def softmax_scale(config: ModelConfig) -> float:
    """(nope + rope)^-0.5 * m^2, at every length and not only beyond the original context."""
    yarn = config.rope.yarn
    m = _m(yarn.factor, yarn.mscale_all_dim) if yarn and yarn.mscale_all_dim else 1.0
    return config.qk_head_dim**-0.5 * m * m


def cos_sin(rope: Rope, width: int, positions):
    """positions [B,T] int32 -> cos, sin [B,T,width/2] fp32."""
    angle = positions[..., None].astype(jnp.float32) * frequencies(rope, width)
    factor = rotary_factor(rope.yarn)
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(x, cos, sin, interleaved: bool):
    """Rotates the pairs of x [..., width] by the angles of cos, sin [..., width/2]; in fp32, back in x.dtype."""
    f = x.astype(jnp.float32)
    a, b = (f[..., ::2], f[..., 1::2]) if interleaved else jnp.split(f, 2, axis=-1)
    pair = (a * cos - b * sin, b * cos + a * sin)
    return (jnp.stack(pair, axis=-1).reshape(x.shape) if interleaved else jnp.concatenate(pair, -1)).astype(x.dtype)
