"""The routers: which experts a token goes to, and with what weight. All in fp32.

Selection has no gradient; the weights have one, into the hidden state, although the router itself stays frozen.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from kjax.models.config import ModelConfig
from kjax.models.layers import INIT


class Router(nn.Module):
    """Declares weight [E,D] and, where selection is balanced by a bias, e_score_correction_bias [E]."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> dict:
        c = self.config
        w = {"weight": self.param("weight", INIT, (c.n_routed_experts, c.hidden_size), jnp.float32)}
        if c.topk_method == "noaux_tc":
            w["bias"] = self.param("e_score_correction_bias", nn.initializers.zeros, (c.n_routed_experts,), jnp.float32)
        return w


def keep_groups(scores, group_scores, kept: int, excluded: float):
    """scores [N,E] with the experts outside the `kept` best groups, by group_scores [N,G], set to `excluded`."""
    groups = group_scores.shape[-1]
    _, best = jax.lax.top_k(group_scores, kept)
    keep = jax.nn.one_hot(best, groups, dtype=bool).any(axis=1)  # [N,G]
    return jnp.where(jnp.repeat(keep, scores.shape[-1] // groups, axis=-1), scores, excluded)


def by_group(scores, groups: int):
    """[N,E] -> [N,G,E/G]."""
    return scores.reshape(scores.shape[0], groups, -1)


def greedy(logits, bias, config: ModelConfig):
    """DeepSeek-V2-Lite, Qwen3: the best experts by softmax. What differs between them, norm_topk_prob, is for route."""
    scores = jax.nn.softmax(logits)
    return scores, scores


def group_limited_greedy(logits, bias, config: ModelConfig):
    """DeepSeek-V2: the best experts of the groups whose best expert is best."""
    scores = jax.nn.softmax(logits)
    best = by_group(scores, config.n_group).max(axis=-1)
    return scores, keep_groups(scores, best, config.topk_group, 0.0)


def noaux_tc(logits, bias, config: ModelConfig):
    """DeepSeek-V3, Kimi: selection by sigmoid + bias, groups by their two best experts; weights without the bias."""
    scores = jax.nn.sigmoid(logits)
    choice = scores + bias
    if config.n_group > 1:
        best_two = jax.lax.top_k(by_group(choice, config.n_group), 2)[0].sum(axis=-1)
        choice = keep_groups(choice, best_two, config.topk_group, -jnp.inf)
    return scores, choice


ROUTERS = {"greedy": greedy, "softmax_topk": greedy, "group_limited_greedy": group_limited_greedy,
           "noaux_tc": noaux_tc}


def route(w: dict, config: ModelConfig, x):
    """x [N,D] -> idx [N,K] int32, gate [N,K] fp32."""
    # HIGHEST: an accelerator's default for fp32 products would round the operands and flip near ties.
    logits = jnp.einsum("nd,ed->ne", x.astype(jnp.float32), w["weight"].astype(jnp.float32),
                        precision=jax.lax.Precision.HIGHEST)
    scores, choice = ROUTERS[config.topk_method](logits, w.get("bias"), config)
    _, idx = jax.lax.top_k(jax.lax.stop_gradient(choice), config.num_experts_per_tok)
    gate = jnp.take_along_axis(scores, idx, axis=-1)
    if config.norm_topk_prob:
        gate = gate / (gate.sum(axis=-1, keepdims=True) + 1e-20)
    return idx.astype(jnp.int32), gate * config.routed_scaling_factor
