"""The cross-entropy of a step, in chunks of tokens, so that the full logits never exist."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kjax.data.batches import IGNORE


def cross_entropy(unembed: Callable, hidden, targets, chunk: int):
    """The summed cross-entropy of the target tokens and their number; divide one by the other for the step's loss.

    unembed: hidden [n,D] -> logits [n,V] fp32.  hidden [B,T,D], targets [B,T] int32 with -100 for "none".
    chunk: tokens whose logits exist at a time, forward and backward: each chunk is rematerialised.
    Returns (sum, count), both fp32 scalars. Chunks without a target are skipped: tokens are sorted first, so that
    prompts and padding cost no logits at all.
    """
    width = hidden.shape[-1]
    hidden, targets = hidden.reshape(-1, width), targets.reshape(-1)
    order = jnp.argsort(targets < 0)  # stable: trained tokens first, in their order
    tokens = targets.shape[0]
    chunk = min(chunk, tokens)
    order = jnp.pad(order, (0, -tokens % chunk))
    targets = jnp.where(jnp.arange(order.shape[0]) < tokens, targets[order], IGNORE).reshape(-1, chunk)
    hidden = hidden[order].reshape(-1, chunk, width)

    def chunk_sum(rows, row_targets):
        logits = unembed(rows)
        chosen = jnp.take_along_axis(logits, jnp.maximum(row_targets, 0)[:, None], axis=-1)[:, 0]
        losses = jax.nn.logsumexp(logits, axis=-1) - chosen
        return jnp.sum(jnp.where(row_targets >= 0, losses, 0.0))

    # The checkpoint is outside the cond: a cond hands out its residuals, the output head among them, once per chunk.
    @jax.checkpoint
    def chunk_or_zero(rows, row_targets):
        return jax.lax.cond(row_targets[0] >= 0, chunk_sum, lambda *_: jnp.zeros(()), rows, row_targets)

    def body(total, inputs):
        return total + chunk_or_zero(*inputs), None

    total, _ = jax.lax.scan(body, jnp.zeros(()), (hidden, targets))
    return total, jnp.sum(targets >= 0).astype(jnp.float32)
