"""Multi-head latent attention: keys and values of all heads come from one small latent per token.

Letters: b batch, t query position, s key position, h head, c nope width, p rope width, v value width, r latent width.
"""

import jax.numpy as jnp
from flax import linen as nn

from kjax.models.attention import Tokens, attend, extended, mask
from kjax.models.config import ModelConfig
from kjax.models.layers import Linear, Norm, Parts, linear, merged, rms_norm
from kjax.models.rope import rotate, softmax_scale

LATENT_EPS = 1e-6  # of the latent norms in all published code, whatever rms_norm_eps says


class MLA(Parts):
    """Declares the projections and latent norms; q_lora_rank decides whether queries come from a latent too."""

    @nn.compact
    def __call__(self) -> dict:
        c = self.config
        heads, d = c.num_attention_heads, c.hidden_size

        def declare(name, features_in, features_out, bias=False):
            return Linear(features_in, features_out, self.lora, self.dtype, self.deterministic, bias, name=name)()

        w = {
            "kv_a_proj_with_mqa": declare("kv_a_proj_with_mqa", d, c.kv_lora_rank + c.qk_rope_head_dim,
                                          c.attention_bias),
            "kv_a_layernorm": Norm(c.kv_lora_rank, self.dtype, name="kv_a_layernorm")(),
            "kv_b_proj": declare("kv_b_proj", c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim)),
            "o_proj": declare("o_proj", heads * c.v_head_dim, d, c.attention_bias),
        }
        if c.q_lora_rank is None:
            return w | {"q_proj": declare("q_proj", d, heads * c.qk_head_dim)}
        return w | {
            "q_a_proj": declare("q_a_proj", d, c.q_lora_rank, c.attention_bias),
            "q_a_layernorm": Norm(c.q_lora_rank, self.dtype, name="q_a_layernorm")(),
            "q_b_proj": declare("q_b_proj", c.q_lora_rank, heads * c.qk_head_dim),
        }


def queries(w, config: ModelConfig, x, tokens: Tokens):
    """x [B,T,D] -> q_nope [B,T,H,C], rotated q_rope [B,T,H,P]."""
    if "q_proj" in w:
        q = linear(w["q_proj"], x, tokens.rows)
    else:
        latent = rms_norm(linear(w["q_a_proj"], x, tokens.rows), w["q_a_layernorm"], LATENT_EPS)
        q = linear(w["q_b_proj"], latent, tokens.rows)
    q = q.reshape(*x.shape[:2], config.num_attention_heads, config.qk_head_dim)
    q_nope, q_rope = jnp.split(q, [config.qk_nope_head_dim], axis=-1)
    return q_nope, rotate(q_rope, tokens.cos[:, :, None], tokens.sin[:, :, None], config.rope.interleaved)


def latents(w, config: ModelConfig, x, tokens: Tokens):
    """x [B,T,D] -> latent c [B,T,R], rotated key k_rope [B,T,P] that all heads share: all that a cache keeps."""
    c, k_rope = jnp.split(linear(w["kv_a_proj_with_mqa"], x, tokens.rows), [config.kv_lora_rank], axis=-1)
    return rms_norm(c, w["kv_a_layernorm"], LATENT_EPS), rotate(k_rope, tokens.cos, tokens.sin, config.rope.interleaved)


def attend_expanded(w, config: ModelConfig, q_nope, q_rope, c, k_rope, mask, rows):
    """Attention over expanded keys and values: fewer operations than the absorbed form for rows of tokens."""
    f32 = jnp.float32
    kv = linear(w["kv_b_proj"], c, rows).reshape(*c.shape[:2], config.num_attention_heads, -1)
    k_nope, v = jnp.split(kv, [config.qk_nope_head_dim], axis=-1)
    scores = (jnp.einsum("bthc,bshc->bhts", q_nope, k_nope, preferred_element_type=f32)
              + jnp.einsum("bthp,bsp->bhts", q_rope, k_rope, preferred_element_type=f32))
    return attend("bhts,bshv->bthv", softmax_scale(config), scores, mask, v)


def attend_absorbed(w, config: ModelConfig, q_nope, q_rope, c, k_rope, mask):
    """The same numbers without expanding any key or value: for one new token over a long cache."""
    f32 = jnp.float32
    kv_b = merged(w["kv_b_proj"], c.dtype).reshape(config.num_attention_heads, -1, config.kv_lora_rank)
    w_k, w_v = jnp.split(kv_b, [config.qk_nope_head_dim], axis=1)  # [H,C,R], [H,V,R]
    q = jnp.einsum("bthc,hcr->bthr", q_nope, w_k)
    scores = (jnp.einsum("bthr,bsr->bhts", q, c, preferred_element_type=f32)
              + jnp.einsum("bthp,bsp->bhts", q_rope, k_rope, preferred_element_type=f32))
    # All heads share one value, as in grouped queries. Without that one group, g, XLA's CPU backend (of jaxlib 0.10.2)
    # ends for several rows of bf16 with "UNIMPLEMENTED: Unsupported element type for DotThunk".
    o = attend("bghts,bsgr->btghr", softmax_scale(config), scores[:, None], mask, c[:, :, None])
    return jnp.einsum("bthr,hvr->bthv", o[:, :, 0], w_v)


def mla(w, config: ModelConfig, x, tokens: Tokens):
    """x [B,T,D] -> [B,T,D]: attention within each row, for training and whole-sequence evaluation."""
    q_nope, q_rope = queries(w, config, x, tokens)
    c, k_rope = latents(w, config, x, tokens)
    o = attend_expanded(w, config, q_nope, q_rope, c, k_rope, mask(tokens.segments, tokens.segments), tokens.rows)
    return linear(w["o_proj"], o.reshape(*x.shape[:2], -1), tokens.rows)


def mla_cached(w, config: ModelConfig, x, tokens: Tokens, cache, key_segments, start):
    """As mla, over the S places of a cache {"c": [B,S,R], "k_rope": [B,S,P]}; x [B,T,D] goes to start .. start + T.

    Returns [B,T,D] and the cache with x in it.
    """
    q_nope, q_rope = queries(w, config, x, tokens)
    new = dict(zip(("c", "k_rope"), latents(w, config, x, tokens), strict=True))
    cache = extended(cache, new, start)
    c, k_rope = cache["c"].astype(x.dtype), cache["k_rope"].astype(x.dtype)
    visible = mask(tokens.segments, key_segments, start)
    if x.shape[1] == 1:
        o = attend_absorbed(w, config, q_nope, q_rope, c, k_rope, visible)
    else:
        o = attend_expanded(w, config, q_nope, q_rope, c, k_rope, visible, tokens.rows)
    return linear(w["o_proj"], o.reshape(*x.shape[:2], -1), tokens.rows), cache


def mla_cache(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """What a cache keeps of a token in each layer: name -> shape."""
    return {"c": (config.kv_lora_rank,), "k_rope": (config.qk_rope_head_dim,)}
