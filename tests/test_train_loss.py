"""Loss and optimiser: the chunked cross-entropy against the plain one, schedules and AdamW against torch's formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kjax import config, loss, optimizer
from kjax.data import IGNORE

B, T, D, V = 3, 11, 16, 37


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((B, T, D)), jnp.float32)
    weight = jnp.asarray(rng.standard_normal((V, D)), jnp.float32)
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    targets[rng.random((B, T)) < 0.4] = IGNORE
    return hidden, weight, jnp.asarray(targets)


def unembed(weight, rows):
    return jnp.einsum("nd,vd->nv", rows, weight, preferred_element_type=jnp.float32)


def plain(hidden, weight, targets):
    logits = jnp.einsum("btd,vd->btv", hidden, weight)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
    return jnp.sum(jnp.where(targets >= 0, losses, 0.0))


@pytest.mark.parametrize("chunk", [1, 4, 33, 1000])
def test_cross_entropy_equals_the_plain_one(problem, chunk):
    hidden, weight, targets = problem
    chunked = jax.jit(lambda h: loss.cross_entropy(unembed, weight, h, targets, chunk))
    total, count = chunked(hidden)
    assert count == (targets >= 0).sum()
    # A sum of about 20 fp32 terms in another order: a few ulp.
    np.testing.assert_allclose(total, plain(hidden, weight, targets), rtol=20 * np.finfo(np.float32).eps)
    grads = jax.grad(lambda h: chunked(h)[0])(hidden)
    np.testing.assert_allclose(grads, jax.grad(plain)(hidden, weight, targets), atol=1e-5)
    assert not grads[np.asarray(targets) < 0].any(), "an untrained position has no gradient"


@pytest.mark.parametrize("chunk", [1, 4, 33, 1000])
def test_scores_add_how_many_are_right(problem, chunk):
    hidden, weight, targets = problem
    best = jnp.argmax(jnp.einsum("btd,vd->btv", hidden, weight), axis=-1)
    half = jnp.where((targets >= 0) & (jnp.arange(T) % 2 == 0), best, targets)  # some wrong, some none
    total, count, right = jax.jit(lambda h: loss.scores(unembed, weight, h, half, chunk))(hidden)
    same = jax.jit(lambda h: loss.cross_entropy(unembed, weight, h, half, chunk))(hidden)
    assert (total, count) == same, "the loss of a training step without its gradient, to the bit"
    assert right == (half == best).sum() and 0 < right < count
    assert loss.scores(unembed, weight, hidden, jnp.full((B, T), IGNORE), 8) == (0, 0, 0)


def test_cross_entropy_without_targets_is_zero(problem):
    hidden, weight, _ = problem
    total, count = loss.cross_entropy(unembed, weight, hidden, jnp.full((B, T), IGNORE), 8)
    assert total == 0 and count == 0


def test_untrained_chunks_compute_no_logits(problem):
    hidden, weight, targets = problem
    calls = []

    def counted(weight, rows):
        jax.debug.callback(lambda: calls.append(1))
        return unembed(weight, rows)

    few = jnp.where(jnp.arange(B * T).reshape(B, T) % 10 == 0, jnp.abs(targets) % V, IGNORE)  # 4 targets of 33
    total, count = loss.cross_entropy(counted, weight, hidden, few, 4)
    jax.block_until_ready(total)
    jax.effects_barrier()
    assert count == 4 and len(calls) == 1
    # Differentiated, too: the logits of a chunk are computed once, and serve its gradient.
    jax.block_until_ready(jax.grad(lambda h: loss.cross_entropy(counted, weight, h, few, 4)[0])(hidden))
    jax.effects_barrier()
    assert len(calls) == 2


@pytest.mark.parametrize("chunk", [4, 1000])
def test_a_trained_head_has_its_gradient(problem, chunk):
    hidden, weight, targets = problem

    def mean(weight, hidden):
        total, count = loss.cross_entropy(unembed, weight, hidden, targets, chunk)
        return total / count

    found = jax.grad(mean, argnums=(0, 1))(weight, hidden)
    expected = jax.grad(lambda w, h: plain(h, w, targets) / (targets >= 0).sum(), argnums=(0, 1))(weight, hidden)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_bf16_gradient_is_that_of_plain_bf16_but_for_one_rounding(problem):
    """Scaling by the cotangent after the chunk rounds once more: half an ulp of bf16, on the rounding there was."""
    hidden, weight, targets = (leaf.astype(jnp.bfloat16) if leaf.dtype == jnp.float32 else leaf for leaf in problem)

    def reference(hidden):
        logits = unembed(weight, hidden.reshape(-1, D))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0).reshape(-1))
        return jnp.sum(jnp.where(targets.reshape(-1) >= 0, losses, 0.0)) / 19

    found = jax.grad(lambda h: loss.cross_entropy(unembed, weight, h, targets, 4)[0] / 19)(hidden).astype(jnp.float32)
    expected = jax.grad(reference)(hidden).astype(jnp.float32)
    # Both sides round dlogits and the products to bf16 (2^-9 each); sums of V terms of either sign follow their size.
    assert jnp.abs(found - expected).max() <= 4 * 2**-9 * jnp.abs(expected).max()


def test_the_backward_pass_reads_no_head(problem):
    """What is kept from the forward pass is one array as large as hidden: neither the head nor any logits."""
    hidden, weight, targets = problem
    _, pullback = jax.vjp(lambda h: loss.cross_entropy(unembed, weight, h, targets, 4)[0], hidden)
    sizes = [leaf.shape for leaf in jax.tree.leaves(pullback) if hasattr(leaf, "shape")]
    assert sizes and not [shape for shape in sizes if V in shape]


def test_full_logits_never_exist(problem):
    hidden, weight, targets = problem
    jaxpr = jax.make_jaxpr(jax.grad(lambda h: loss.cross_entropy(unembed, weight, h, targets, 4)[0]))(hidden)
    sizes = []

    def walk(inner):
        for equation in inner.eqns:
            sizes.extend(math.prod(v.aval.shape) for v in equation.outvars if V in getattr(v.aval, "shape", ()))
            for value in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
                if hasattr(value, "jaxpr"):
                    walk(value.jaxpr)
                elif hasattr(value, "eqns"):
                    walk(value)

    walk(jaxpr.jaxpr)
    assert sizes and max(sizes) <= max(4 * V, D * V)


def test_schedule_is_the_one_of_transformers():
    settings = config.Optimizer(learning_rate=2e-4, warmup_steps=3)
    total = 10
    cosine = [2e-4 * (s / 3 if s < 3 else 0.5 * (1 + math.cos(math.pi * (s - 3) / 7))) for s in range(total + 1)]
    rates = optimizer.schedule(settings, total)
    np.testing.assert_allclose([float(rates(s)) for s in range(total + 1)], cosine, rtol=1e-6, atol=1e-11)
    settings = config.Optimizer(learning_rate=1.0, schedule="linear", warmup_ratio=0.0, min_ratio=0.5)
    rates = optimizer.schedule(settings, 4)
    assert [float(rates(s)) for s in range(5)] == [1.0, 0.875, 0.75, 0.625, 0.5]
    settings = config.Optimizer(learning_rate=1.0, schedule="constant", warmup_ratio=0.11)
    assert optimizer.warmup_steps(settings, 10) == 2
    assert optimizer.warmup_steps(settings, 1) == 0 and optimizer.schedule(settings, 1)(0) == 1.0
    assert [float(optimizer.schedule(settings, 10)(s)) for s in (0, 1, 2, 9)] == [0.0, 0.5, 1.0, 1.0]


def adamw_ref(param, grads, settings, ratio=1.0):
    """AdamW as its paper states it, in float64; constant learning rate, no clipping."""
    m = v = np.zeros_like(param)
    rate = settings.learning_rate * ratio
    for t, g in enumerate(grads, start=1):
        m = settings.beta1 * m + (1 - settings.beta1) * g
        v = settings.beta2 * v + (1 - settings.beta2) * g * g
        adam = m / (1 - settings.beta1**t) / (np.sqrt(v / (1 - settings.beta2**t)) + settings.epsilon)
        param = param - rate * (adam + settings.weight_decay * param)
    return param


def test_optimizer_is_adamw_with_lora_plus():
    settings = config.Optimizer(learning_rate=1e-2, schedule="constant", warmup_ratio=0.0, weight_decay=0.1,
                                clip_norm=None, loraplus_ratio=16.0)
    rng = np.random.default_rng(1)
    leaves = {"lora_A": rng.standard_normal((2, 3, 4)), "lora_B": rng.standard_normal((2, 4, 3))}
    tree = {"moe_layers": {"q_proj": leaves}}
    grads = [jax.tree.map(lambda p: rng.standard_normal(p.shape), tree) for _ in range(5)]
    transformation = optimizer.optimizer(settings, 5)
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), tree)
    state = transformation.init(params)
    for grad in grads:
        grad = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), grad)
        updates, state = transformation.update(grad, state, params)
        params = optax.apply_updates(params, updates)
    for name, ratio in (("lora_A", 1.0), ("lora_B", 16.0)):
        leaf = [g["moe_layers"]["q_proj"][name] for g in grads]
        expected = adamw_ref(tree["moe_layers"]["q_proj"][name], leaf, settings, ratio)
        # Five fp32 steps of size <= 0.16: rounding of the parameter dominates.
        np.testing.assert_allclose(params["moe_layers"]["q_proj"][name], expected, atol=1e-5)


def test_optimizer_clips_by_the_norm_over_the_whole_tree():
    settings = config.Optimizer(learning_rate=1.0, schedule="constant", warmup_ratio=0.0, clip_norm=1.0)
    gradient = {"a": {"lora_A": jnp.full((1, 3), 3.0)}, "b": {"lora_B": jnp.full((1, 4), 4.0)}}
    clip = optimizer.optimizer(settings, 1)
    _, state = clip.update(gradient, clip.init(gradient), gradient)
    first_moment = state[1].mu
    norm = math.sqrt(3 * 9 + 4 * 16)
    np.testing.assert_allclose(first_moment["b"]["lora_B"], 0.1 * 4.0 / norm, rtol=1e-6)
