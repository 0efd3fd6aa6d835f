"""Attention with grouped queries: several query heads share a key and a value head.

Letters: b batch, t query position, s key position, g key-value head, q query heads of one of these, c head width.
"""

import jax.numpy as jnp
from flax import linen as nn

from kjax.models.attention import Tokens, attend, extended, mask
from kjax.models.config import ModelConfig
from kjax.models.layers import Linear, Norm, Parts, linear, rms_norm
from kjax.models.rope import rotate


class GQA(Parts):
    """Declares the projections, and where use_qk_norm says so the norms over each query and key head."""

    @nn.compact
    def __call__(self) -> dict:
        c, d = self.config, self.config.hidden_size
        wide, narrow = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        sizes = {"q_proj": (d, wide, c.attention_bias), "k_proj": (d, narrow, c.attention_bias),
                 "v_proj": (d, narrow, c.attention_bias),
                 "o_proj": (wide, d, c.attention_bias and c.family.output_bias)}
        w = {name: Linear(features_in, features_out, self.lora, self.dtype, self.deterministic, bias, name=name)()
             for name, (features_in, features_out, bias) in sizes.items()}
        if c.use_qk_norm:
            w |= {name: Norm(c.head_dim, self.dtype, name=name)() for name in ("q_norm", "k_norm")}
        return w


def heads(w, config: ModelConfig, x, tokens: Tokens):
    """x [B,T,D] -> q [B,T,G,Q,C], k and v [B,T,G,C]; q and k normalised and rotated."""
    def project(name):
        return linear(w[f"{name}_proj"], x, tokens.rows).reshape(*x.shape[:2], -1, config.head_dim)

    def place(name):
        h = project(name)
        if config.use_qk_norm:
            h = rms_norm(h, w[f"{name}_norm"], config.rms_norm_eps)
        turned, rest = jnp.split(h, [config.rotary_dim], axis=-1)
        turned = rotate(turned, tokens.cos[:, :, None], tokens.sin[:, :, None], config.rope.interleaved)
        return jnp.concatenate([turned, rest], axis=-1)

    q, k, v = place("q"), place("k"), project("v")
    return q.reshape(*x.shape[:2], config.num_key_value_heads, -1, config.head_dim), k, v


def attention(config: ModelConfig, q, k, v, mask):
    """q [B,T,G,Q,C], k, v [B,S,G,C], mask [B,T,S] -> [B,T,G*Q*C]."""
    scores = jnp.einsum("btgqc,bsgc->bgqts", q, k, preferred_element_type=jnp.float32)
    o = attend("bgqts,bsgc->btgqc", config.head_dim**-0.5, scores, mask, v)
    return o.reshape(*q.shape[:2], -1)


def gqa(w, config: ModelConfig, x, tokens: Tokens):
    """x [B,T,D] -> [B,T,D]: attention within each row, for training and whole-sequence evaluation."""
    q, k, v = heads(w, config, x, tokens)
    return linear(w["o_proj"], attention(config, q, k, v, mask(tokens.segments, tokens.segments)), tokens.rows)


def gqa_cached(w, config: ModelConfig, x, tokens: Tokens, cache, key_segments, start):
    """As gqa, over the S places of a cache {"k", "v": [B,S,G,C]}; x [B,T,D] goes to start .. start + T.

    Returns [B,T,D] and the cache with x in it.
    """
    q, k, v = heads(w, config, x, tokens)
    cache = extended(cache, {"k": k, "v": v}, start)
    k, v = cache["k"].astype(x.dtype), cache["v"].astype(x.dtype)
    o = attention(config, q, k, v, mask(tokens.segments, key_segments, start))
    return linear(w["o_proj"], o, tokens.rows), cache


def gqa_cache(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """What a cache keeps of a token in each layer: name -> shape."""
    return {name: (config.num_key_value_heads, config.head_dim) for name in ("k", "v")}
