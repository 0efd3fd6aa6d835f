"""The cross-entropy of a step, in chunks of tokens, so that the full logits never exist; its gradient comes with it."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kjax.data.batches import IGNORE


def cross_entropy(unembed: Callable, head, hidden, targets, chunk: int):
    """The summed cross-entropy of the target tokens and their number; divide one by the other for the step's loss.

    unembed: (head, hidden [n,D]) -> logits [n,V] fp32; head: its parameters.  hidden [B,T,D], targets [B,T] int32 with
    -100 for "none".
    chunk: tokens whose logits exist at a time. Where the loss is differentiated, the gradient of a chunk is made while
    its logits are there: they are computed once, and nothing but that gradient, as large as hidden, is kept.
    Returns (sum, count), both fp32 scalars. Chunks without a target are skipped: tokens are sorted first, so that
    prompts and padding cost no logits at all.
    """
    hidden, arranged = _arranged(hidden, targets, chunk)
    return _summed(unembed, head, hidden, arranged), _count(targets)


def scores(unembed: Callable, head, hidden, targets, chunk: int):
    """As cross_entropy, not to be differentiated: (sum, count, how many targets have the largest logit)."""
    hidden, arranged = _arranged(hidden, targets, chunk)

    def score(rows, row_targets):
        logits = unembed(head, rows)
        right = (jnp.argmax(logits, axis=-1) == row_targets) & (row_targets >= 0)
        return _sum(jax.nn.logsumexp(logits, axis=-1), logits, row_targets), jnp.sum(right).astype(jnp.float32)

    def body(totals, inputs):
        part = jax.lax.cond(inputs[1][0] >= 0, lambda: score(*inputs), lambda: (jnp.zeros(()), jnp.zeros(())))
        return jax.tree.map(jnp.add, totals, part), None

    (total, right), _ = jax.lax.scan(body, (jnp.zeros(()), jnp.zeros(())), (hidden, arranged))
    return total, _count(targets), right


def _count(targets):
    return jnp.sum(targets >= 0).astype(jnp.float32)


def _arranged(hidden, targets, chunk: int):
    """Tokens in chunks, those with a target first, in their order: hidden [chunks,n,D], targets [chunks,n]."""
    width = hidden.shape[-1]
    hidden, targets = hidden.reshape(-1, width), targets.reshape(-1)
    order = jnp.argsort(targets < 0)  # stable
    tokens = targets.shape[0]
    chunk = min(chunk, tokens)
    order = jnp.pad(order, (0, -tokens % chunk))
    targets = jnp.where(jnp.arange(order.shape[0]) < tokens, targets[order], IGNORE).reshape(-1, chunk)
    return hidden[order].reshape(-1, chunk, width), targets


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(unembed: Callable, head, hidden, targets):
    """hidden [chunks,n,D], targets [chunks,n], those of a chunk that is trained first -> the sum."""
    def body(total, inputs):
        rows, row_targets = inputs
        return total + jax.lax.cond(row_targets[0] >= 0, lambda: _chunk(unembed, head, rows, row_targets),
                                    lambda: jnp.zeros(())), None

    return jax.lax.scan(body, jnp.zeros(()), (hidden, targets))[0]


def _chunk(unembed: Callable, head, rows, targets):
    logits = unembed(head, rows)
    return _sum(jax.nn.logsumexp(logits, axis=-1), logits, targets)


def _sum(normaliser, logits, targets):
    chosen = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], axis=-1)[:, 0]
    return jnp.sum(jnp.where(targets >= 0, normaliser - chosen, 0.0))


def _gradient(logits, targets):
    """The sum for logits [n,V] and its gradient to them, softmax - one_hot, which can lie where the exponentials are:
    two arrays of that size. JAX's own gradient scatters into a third."""
    top = jnp.max(logits, axis=-1)
    e = jnp.exp(logits - top[:, None])
    total = jnp.sum(e, axis=-1)
    chosen = jnp.arange(logits.shape[-1]) == targets[:, None]
    gradient = jnp.where((targets >= 0)[:, None], e / total[:, None] - chosen, 0.0)
    return _sum(top + jnp.log(total), logits, targets), gradient


def _forward(unembed: Callable, head, hidden, targets):
    """The sum, and with it the gradients for a cotangent of one: of hidden, and of the head where that is trained."""
    trained = any(leaf.perturbed for leaf in jax.tree.leaves(head))
    head, hidden, targets = jax.tree.map(lambda leaf: leaf.value, (head, hidden, targets))

    def gradient(rows, row_targets):
        if trained:
            logits, pullback = jax.vjp(unembed, head, rows)
        else:
            logits, pullback = jax.vjp(lambda rows: unembed(head, rows), rows)
        total, cotangent = _gradient(logits, row_targets)
        return total, pullback(cotangent)

    def body(carry, inputs):
        rows, row_targets = inputs
        nothing = jnp.zeros(()), jax.tree.map(jnp.zeros_like, (head, rows) if trained else (rows,))
        part, (*of_head, of_rows) = jax.lax.cond(row_targets[0] >= 0, lambda: gradient(rows, row_targets),
                                                 lambda: nothing)
        return jax.tree.map(jnp.add, carry, (part, of_head)), of_rows

    start = jnp.zeros(()), [jax.tree.map(jnp.zeros_like, head)] if trained else []
    (total, of_head), of_hidden = jax.lax.scan(body, start, (hidden, targets))
    return total, (of_head, of_hidden)


def _backward(unembed: Callable, gradients, cotangent):
    def scaled(leaf):
        return (leaf.astype(jnp.float32) * cotangent).astype(leaf.dtype)

    of_head, of_hidden = jax.tree.map(scaled, gradients)
    return of_head[0] if of_head else None, of_hidden, None


_summed.defvjp(_forward, _backward, symbolic_zeros=True)
