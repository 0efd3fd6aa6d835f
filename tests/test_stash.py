"""The slip and the stash: every surrounding of the call gives the oracle's gradients and leaves nothing behind."""

import experts_cases as cases
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kjax import _ext
from kjax.offload import experts_ref, host_experts, stash, storage
from kjax.offload.experts import SAVED

N, D, F = 11, 24, 20


@pytest.fixture(autouse=True)
def empty_stash():
    before = _ext.stash_budget()
    stash.clear()
    yield
    assert stash.stats()["bytes"] <= _ext.stash_budget()
    _ext.stash_budget(before)
    stash.clear()


@pytest.fixture(params=["ffi", "pure_callback"])
def made(request):
    """A store over two layers, x, dy and a loss in two versions: over the host, and over the plain experts."""
    weights, x, idx, gate, dy = cases.problem(np.random.default_rng(0), n=N, d=D, f=F)
    with cases.store(weights, request.param) as store:
        yield (store, lambda layer, x: host_experts(store, layer, x, idx, gate),
               lambda layer, x: experts_ref(*(jnp.asarray(w)[layer] for w in weights), x, idx, gate), x, dy)


def same(a, b):
    assert cases.relative(a, b) <= 4 * cases.tolerance32(D, F)  # two layers deep, both sides err


def held():
    return stash.stats()["entries"]


def test_two_forwards_in_one_loss(made):
    _, host, plain, x, dy = made

    def loss(experts, x):
        a = experts(0, x)
        return jnp.sum(experts(0, 2 * x) * dy) + jnp.sum(experts(1, a) * a)
    same(jax.jit(jax.grad(lambda x: loss(host, x)))(x), jax.grad(lambda x: loss(plain, x))(x))
    assert held() == 0


@pytest.mark.parametrize("unroll", [False, True])
def test_accumulation(made, unroll):
    _, host, plain, x, dy = made
    parts = np.stack([x, -x, 0.5 * x])

    def accumulate(experts):
        grad = jax.grad(lambda part: jnp.sum(experts(1, part) * dy))
        if unroll:
            return sum(grad(part) for part in parts)
        return jax.lax.scan(lambda total, part: (total + grad(part), None), jnp.zeros_like(x), parts)[0]
    same(jax.jit(lambda: accumulate(host))(), accumulate(plain))
    assert held() == 0


def test_evaluation_between_forward_and_backward(made):
    store, host, plain, x, dy = made
    y, vjp = jax.vjp(lambda x: host(0, x), x)
    assert held() == 1
    host(0, -x).block_until_ready()  # keeps nothing
    host(1, x).block_until_ready()
    assert held() == 1
    same(vjp(dy)[0], jax.vjp(lambda x: plain(0, x), x)[1](dy)[0])
    assert held() == 0 and store.stats()["recomputed"] == 0


def test_linearize_never_transposed_stays_in_budget(made):
    store, host, _, x, _ = made
    one = 2 * F * N * 3 * 4  # g and u of at most N*K routes in fp32
    _ext.stash_budget(2 * one)
    for _ in range(5):
        jax.linearize(lambda x: host(0, x), x)
        assert stash.stats()["bytes"] <= 2 * one
    assert stash.stats()["evicted"] >= 2
    store.close()
    assert held() == 0


def test_a_backward_run_twice_recomputes(made):
    store, host, _, x, dy = made
    _, vjp = jax.vjp(lambda x: host(0, x), x)
    first, second = np.asarray(vjp(dy)[0]), np.asarray(vjp(dy)[0])
    assert np.array_equal(first, second) and store.stats()["recomputed"] == 1


def test_two_stores(made):
    _, host, plain, x, dy = made
    weights, _, idx, gate, _ = cases.problem(np.random.default_rng(5), n=N, d=D, f=F)
    with cases.store(weights) as other:
        def loss(first, second, x):
            return jnp.sum(second(first(0, x)) * dy)
        got = jax.jit(jax.grad(lambda x: loss(host, lambda h: host_experts(other, 0, h, idx, gate), x)))(x)
        want = jax.grad(lambda x: loss(plain, lambda h: experts_ref(*(w[0] for w in weights), h, idx, gate), x))(x)
    same(got, want)
    assert held() == 0


def test_budget_zero_recomputes_with_equal_bits(made):
    store, host, _, x, dy = made
    grad = jax.jit(jax.grad(lambda x: jnp.sum(host(1, host(0, x)) * dy)))
    kept = np.asarray(grad(x))
    assert store.stats()["recomputed"] == 0
    _ext.stash_budget(0)
    assert np.array_equal(kept, np.asarray(grad(x)))
    assert store.stats()["recomputed"] == 2 and held() == 0


class Layer(nn.Module):
    """The shape of a model's MoE layer: something nonlinear, then the experts added last."""

    experts: object

    @nn.compact
    def __call__(self, x, layer):
        scale = self.param("scale", nn.initializers.ones, (D,))
        return x + self.experts(layer, jnp.tanh(x * scale)), None


def stacked(experts, layers):
    body = nn.remat(Layer, policy=jax.checkpoint_policies.save_only_these_names(SAVED), prevent_cse=False)
    return nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=layers)(experts)


def test_host_forward_runs_once_per_layer_and_execution(made):
    store, host, plain, x, dy = made
    layers = np.arange(2)
    variables = stacked(plain, 2).init(jax.random.key(0), x, layers)

    def loss(experts, variables, x):
        return jnp.sum(stacked(experts, 2).apply(variables, x, layers)[0] * dy)
    step = jax.jit(jax.grad(lambda v, x: loss(host, v, x), (0, 1)))
    for execution in (1, 2):
        got = jax.block_until_ready(step(variables, x))
        stats = store.stats()
        assert (stats["forward"], stats["backward"], stats["recomputed"]) == (2 * execution, 2 * execution, 0)
    want = jax.grad(lambda v, x: loss(plain, v, x), (0, 1))(variables, x)
    jax.tree.map(same, got, want)
    assert held() == 0


def test_stash_entry_of_another_routing_is_a_miss(made):
    """A slip that meets another idx must not take the activations: its bits would belong to other routes."""
    store, _, _, x, dy = made
    rng = np.random.default_rng(1)
    idx = np.argsort(rng.random((N, store.experts)), axis=1)[:, :3].astype(np.int32)
    gate = np.ones((N, 3), np.float32)
    _, slip = _ext.forward(store.id, 0, x, idx, gate, True)
    other = idx[:, ::-1].copy()
    dx, *_ = _ext.backward(store.id, 0, slip, x, other, gate, dy)
    want, *_ = _ext.backward(store.id, 0, 0, x, other, gate, dy)
    assert np.array_equal(dx, want)
    assert store.stats()["recomputed"] == 2


def test_the_budget_is_of_what_a_control_group_leaves(monkeypatch):
    monkeypatch.setattr(storage, "available", lambda: (8_000_000, "are left"))
    assert stash.set_budget() == 2_000_000


def test_memory_for_later_entries_is_used_again():
    """Also where its size is just above whole huge pages: 384 routes x 1408 x 2 numbers of fp32 are 4.1 MiB."""
    weights, x, idx, gate, dy = cases.problem(np.random.default_rng(0), n=192, k=2, d=16, f=1408, holes=0)
    spare = []
    with cases.store(weights) as store:
        for _ in range(4):
            jax.vjp(lambda x: host_experts(store, 0, x, idx, gate), x)[1](dy)
            spare.append(stash.stats()["spare"])
    assert spare[0] > 0 and spare == spare[:1] * 4


def test_an_entry_that_fits_in_bytes_but_not_in_pages_displaces_none():
    """Memory of more than 2 MiB comes in whole ones: 2.5 MB take 4.2, which a budget of 3.5 MB has not."""
    d, f, rows = 8, 256, 1250
    weights, x, idx, gate, _ = cases.problem(np.random.default_rng(4), n=rows, d=d, f=f, k=1, holes=0)
    stash.set_budget(3.5e-3)
    with cases.store(weights, "ffi") as store:
        few = jax.vjp(lambda x: host_experts(store, 0, x, idx[:40], gate[:40]), x[:40])
        many = jax.vjp(lambda x: host_experts(store, 0, x, idx, gate), x)
        assert held() == 1
        few[1](few[0]), many[1](many[0])
        assert store.stats()["recomputed"] == 1
