"""What both kinds of attention share: what they know of the tokens, the mask, the softmax."""

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


def softmax(scores, scale, mask):
    """scores [B,...,T,S] fp32, masked [B,T,S]. A token always sees itself, so no row is empty."""
    mask = jnp.expand_dims(mask, range(1, scores.ndim - 2))
    return jax.nn.softmax(jnp.where(mask, scores * scale, -jnp.inf), axis=-1)


def extended(cache: dict, new: dict, start) -> dict:
    """The cache {name: [B,S,...]} with new {name: [B,T,...]} at the places start .. start + T."""
    return {name: jax.lax.dynamic_update_slice_in_dim(cache[name], new[name].astype(cache[name].dtype), start, axis=1)
            for name in cache}
