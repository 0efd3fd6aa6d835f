"""What both kinds of attention share: what they know of the tokens, the mask, the weighted sum of values."""

import functools

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Tokens:
    """What attention knows of the tokens besides their vectors."""

    cos: jax.Array  # [B,T,P/2]
    sin: jax.Array  # [B,T,P/2]
    segments: jax.Array  # [B,T]; 0 is padding
    rows: jax.Array  # [B], row numbers within the step


def mask(segments, key_segments, start=0):
    """[B,T,S]: a query at place start + t sees the keys up to its own place that are of its own segment."""
    t = start + jnp.arange(segments.shape[1])
    causal = jnp.arange(key_segments.shape[1]) <= t[:, None]  # [T,S]
    return causal & (segments[:, :, None] == key_segments[:, None, :])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend(equation: str, scale: float, scores, mask, v):
    """softmax(scale * scores) @ v: scores [B,...,T,S] fp32, masked [B,T,S]; equation (scores, v) -> [B,T,...,V].

    The exponentials are divided by their sum after the product, and the gradient takes the sum over keys of p dp as
    that over o do (FlashAttention, arXiv:2205.14135): of arrays as large as the scores, only the exponentials and one
    gradient live at a time. A token always sees itself, so no row is empty.
    """
    return _forward(equation, scale, scores, mask, v)[0]


def _forward(equation, scale, scores, mask, v):
    mask = jnp.expand_dims(mask, range(1, scores.ndim - 2))
    scores = jnp.where(mask, scores * scale, -jnp.inf)
    e = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.moveaxis(jnp.sum(e, axis=-1), -1, 1)[..., None]  # [B,T,...,1]
    o = jnp.einsum(equation, e.astype(v.dtype), v, preferred_element_type=jnp.float32) / total
    o = o.astype(v.dtype)
    return o, (e, total, v, o)


def _backward(equation, scale, kept, do):
    e, total, v, o = kept
    scores_axes, v_axes, o_axes = equation.replace("->", ",").split(",")
    delta = jnp.sum(o.astype(jnp.float32) * do, axis=-1, keepdims=True) / total
    do = (do / total).astype(v.dtype)
    dv = jnp.einsum(f"{scores_axes},{o_axes}->{v_axes}", e.astype(v.dtype), do)
    dp = jnp.einsum(f"{o_axes},{v_axes}->{scores_axes}", do, v, preferred_element_type=jnp.float32)
    ds = e * (dp - jnp.moveaxis(delta[..., 0], 1, -1)[..., None]) * scale
    return ds, None, dv


attend.defvjp(_forward, _backward)


def extended(cache: dict, new: dict, start) -> dict:
    """The cache {name: [B,S,...]} with new {name: [B,T,...]} at the places start .. start + T."""
    return {name: jax.lax.dynamic_update_slice_in_dim(cache[name], new[name].astype(cache[name].dtype), start, axis=1)
            for name in cache}
