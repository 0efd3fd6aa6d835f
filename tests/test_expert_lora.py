"""Adapters on routed experts: kernels against float64 and jax.grad of the plain experts, both homes, dropout, bits."""

import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import experts_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kjax import _ext
from kjax.offload import experts_ref, host_experts
from kjax.offload.host_lora import HostLora, on_host
from kjax.offload.lora import PROJECTIONS, ExpertLora, keep_mask

ISAS = [name for name, why_not in _ext.isa()["available"].items() if not why_not]
LAYER = 1
# projection -> rank
RANKS = {
    "one rank": dict(gate_proj=4, up_proj=4, down_proj=4),
    "ranks of their own": dict(gate_proj=1, up_proj=7, down_proj=18),
    "gate only": dict(gate_proj=3),
    "up only": dict(up_proj=8),
    "down only": dict(down_proj=5),
    "gate and down": dict(gate_proj=8, down_proj=2),
}
SHAPES = {
    "plain": dict(),
    "odd": dict(n=7, d=17, f=13, e=3, k=2),
    "smallest": dict(n=2, d=1, f=1, e=1, k=1, holes=0),
    "more than a strip": dict(n=70, d=300, f=530, e=3, k=2),
    "empty experts": dict(n=4, e=64, k=2),
    "no routes": dict(n=5, holes=1.1),
}


def factors(rng, weights, ranks):
    """All layers' factors, projection -> (A [L,E,R,in], B [L,E,out,R]) fp32, B not zero."""
    made = {}
    for name, rank in ranks.items():
        layers, experts, out, in_ = weights[PROJECTIONS.index(name)].shape
        made[name] = ((rng.standard_normal((layers, experts, rank, in_)) * in_**-0.5).astype(np.float32),
                      (rng.standard_normal((layers, experts, out, rank)) * 0.5 * rank**-0.5).astype(np.float32))
    return made


def adapters(made, rate=0.0, **more):
    """The ExpertLora of one layer."""
    layer = {name: (a[LAYER], b[LAYER]) for name, (a, b) in made.items()}
    seed = jnp.array([12345, 2**32 - 7], jnp.uint32) if rate else None
    return ExpertLora(layer, seed, scales=tuple((name, 1.5 + i) for i, name in enumerate(made)), dropout=rate, **more)


def gradients(experts, x, gate, made, dy):
    """y, and the gradients of dot(y, dy) to x, gate and all factors."""
    def loss(x, gate, made):
        y = experts(x, gate, made)
        return jnp.vdot(y.astype(jnp.float32), dy.astype(np.float32)), y
    grads, y = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(x, gate, made)
    return [np.asarray(leaf, np.float32) for leaf in jax.block_until_ready([y, *jax.tree.leaves(grads)])]


def both(rng, weights, x, idx, gate, dy, ranks, transport="ffi", rate=0.0):
    """(host, plain): y and gradients of each."""
    made = factors(rng, weights, ranks)
    lora = adapters(made, rate)
    layer = [jnp.asarray(w[LAYER]) for w in weights]
    with cases.store(weights, transport) as store:
        host = gradients(lambda x, gate, f: host_experts(store, LAYER, x, idx, gate, lora.replace(factors=f)), x, gate,
                         lora.factors, dy)
    plain = gradients(lambda x, gate, f: experts_ref(*layer, x, idx, gate, lora.replace(factors=f)), jnp.asarray(x),
                      gate, lora.factors, dy)
    return host, plain


@pytest.mark.parametrize("transport", ["ffi", "pure_callback"])
@pytest.mark.parametrize("ranks", RANKS)
def test_gradients_equal_jax_grad(ranks, transport):
    rng = np.random.default_rng(1)
    for a, b in zip(*both(rng, *cases.problem(rng, n=19, d=33, f=24), RANKS[ranks], transport), strict=True):
        assert cases.relative(a, b) <= 4 * cases.tolerance32(33, 24)  # both sides err, in chains twice as long


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_instruction_sets(shape, isa):
    rng = np.random.default_rng(2)
    problem = cases.problem(rng, **SHAPES[shape])
    _ext.force_isa(isa)
    try:
        host, plain = both(rng, *problem, RANKS["ranks of their own"])
    finally:
        _ext.force_isa(None)
    for a, b in zip(host, plain, strict=True):
        assert cases.relative(a, b) <= 4 * cases.tolerance32(problem[1].shape[1], problem[0][0].shape[2])


def test_an_expert_with_several_segments():
    rng = np.random.default_rng(3)
    weights, x, idx, gate, dy = cases.problem(rng, n=1200, d=40, f=24, e=3, k=1)
    idx[:] = np.where(rng.random(idx.shape) < 0.9, 1, 2)
    for a, b in zip(*both(rng, weights, x, idx, gate, dy, RANKS["one rank"]), strict=True):
        assert cases.relative(a, b) <= 4 * cases.tolerance32(1200, 40)  # dA and dB sum over 1,080 rows


@pytest.mark.parametrize("ranks", ["one rank", "gate only", "up only", "down only"])
def test_dropout_takes_what_the_plain_experts_take(ranks):
    """Elements of each route's input, alike in forward, backward and recomputation."""
    rng = np.random.default_rng(4)
    problem = cases.problem(rng, n=40, d=70, f=300, e=3, k=2)
    budget = _ext.stash_budget()
    try:
        for bytes_ in (budget, 0):  # found in the stash, and computed again
            _ext.stash_budget(bytes_)
            for a, b in zip(*both(np.random.default_rng(5), *problem, RANKS[ranks], rate=0.3), strict=True):
                assert cases.relative(a, b) <= 4 * cases.tolerance32(70, 300)
    finally:
        _ext.stash_budget(budget)


def test_masks_are_even_and_independent():
    """Each of 180,000 draws is kept with probability 0.7, whatever its neighbours, projection and route do."""
    keep = {name: np.asarray(keep_mask(jnp.array([1, 2], jnp.uint32), name, jnp.arange(300), 600, 0.3), np.float64)
            for name in PROJECTIONS}
    deviation = (0.3 * 0.7) ** 0.5
    for mask in keep.values():
        centred = (mask - 0.7) / deviation
        n = mask.size
        assert abs(centred.mean()) < 5 * n**-0.5
        for axis in (0, 1):
            assert abs((centred * np.roll(centred, 1, axis)).mean()) < 5 * n**-0.5
        assert abs(centred.mean(0)).max() < 5.5 * 300**-0.5 and abs(centred.mean(1)).max() < 5.5 * 600**-0.5
    a, b, _ = ((m - 0.7) / deviation for m in keep.values())
    assert abs((a * b).mean()) < 5 * a.size**-0.5


@pytest.mark.parametrize("transport", ["ffi", "pure_callback"])
@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_factors_on_the_host_give_the_same_bits(transport, rate):
    rng = np.random.default_rng(6)
    weights, x, idx, gate, dy = cases.problem(rng, n=30, d=40, f=50)
    made = factors(rng, weights, RANKS["ranks of their own"])
    lora, token = adapters(made, rate), jnp.zeros(())
    cpu = jax.devices("cpu")[0]
    tree = {name: {"lora_A": jax.device_put(a, cpu), "lora_B": jax.device_put(b, cpu)} for name, (a, b) in made.items()}
    with cases.store(weights, transport) as store:
        given = gradients(lambda x, gate, f: host_experts(store, LAYER, x, idx, gate, lora.replace(factors=f)), x, gate,
                          lora.factors, dy)
        host = HostLora(store)
        held = lora.replace(factors={}, host=host)
        for _ in range(2):  # the second time into the same buffers
            with host.bound(tree, gradients=True):
                y, dx, dgate, squares = gradients(
                    lambda x, gate, t: host_experts(store, LAYER, x, idx, gate, held.replace(token=t)), x, gate, token,
                    dy)
            grads = [host.gradients[name][matrix][LAYER] for name in made for matrix in ("lora_A", "lora_B")]
            want = dict(zip([(name, m) for name in sorted(made) for m in (0, 1)], given[3:], strict=True))
            for (name, m), array in want.items():
                np.testing.assert_array_equal(host.gradients[name][("lora_A", "lora_B")[m]][LAYER], array)
            for a, b in zip((y, dx, dgate), given[:3], strict=True):
                np.testing.assert_array_equal(a, b)
            exact = sum(float(np.square(g, dtype=np.float64).sum()) for g in grads)
            assert abs(squares / exact - 1) < 1e-6
            assert not any(g[0].any() for pair in host.gradients.values() for g in pair.values())  # the other layer
        with pytest.raises(Exception, match="no arrays are bound"):
            jax.block_until_ready(host_experts(store, LAYER, x, idx, gate, held.replace(token=token)))


def test_gradients_on_the_host_add_up_and_so_do_their_squares():
    """Two calls of a layer in one loss: the tokens' gradients add up to the squares of the sum."""
    rng = np.random.default_rng(7)
    weights, x, idx, gate, dy = cases.problem(rng)
    made = factors(rng, weights, RANKS["one rank"])
    tree = {name: {"lora_A": a, "lora_B": b} for name, (a, b) in made.items()}
    with cases.store(weights) as store:
        host = HostLora(store)
        held = adapters(made, host=host).replace(factors={})
        def loss(token):
            lora = held.replace(token=token)
            twice = host_experts(store, LAYER, 2 * x, idx, gate, lora)
            return jnp.vdot(host_experts(store, LAYER, x, idx, gate, lora) + twice, dy)
        with host.bound(tree, gradients=True):
            squares = jax.grad(loss)(jnp.zeros(()))
    total = sum(float(np.square(a, dtype=np.float64).sum()) for a in jax.tree.leaves(host.gradients))
    assert total > 0 and abs(float(squares) / total - 1) < 1e-6


def exact(weights, made, scales, x, idx, gate, dy, rounding):
    """dA and dB in float64 by loops, `rounding` applied where a kernel that multiplies in bf16 must round."""
    w = [a[LAYER].astype(np.float64) for a in weights]
    grads = {name: [np.zeros(a[LAYER].shape), np.zeros(b[LAYER].shape)] for name, (a, b) in made.items()}
    x, dy = x.astype(np.float64), dy.astype(np.float64)
    for n, k in zip(*np.nonzero(idx >= 0), strict=True):
        e, weight = idx[n, k], float(gate[n, k])
        a, b = ({name: pair[i][LAYER, e].astype(np.float64) for name, pair in made.items()} for i in (0, 1))
        g, u = (w[i][e] @ x[n] + scales[name] * b[name] @ (a[name] @ x[n]) for i, name in enumerate(PROJECTIONS[:2]))
        h = rounding(g / (1 + np.exp(-g)) * u)
        g, u = rounding(g), rounding(u)
        s = 1 / (1 + np.exp(-g))
        dh = w[2][e].T @ dy[n] + scales["down_proj"] * a["down_proj"].T @ (b["down_proj"].T @ dy[n])
        out = {"gate_proj": rounding(weight * dh * u * (s + g * s * (1 - s))), "up_proj": rounding(weight * dh * g * s),
               "down_proj": weight * dy[n]}
        into = {"gate_proj": x[n], "up_proj": x[n], "down_proj": h}
        for name in PROJECTIONS:
            grads[name][0][e] += scales[name] * np.outer(b[name].T @ out[name], into[name])
            grads[name][1][e] += scales[name] * np.outer(out[name], a[name] @ into[name])
    return grads


@pytest.mark.parametrize("isa", ISAS)
def test_bf16_gradients_err_as_their_operands_do(isa):
    """Within twice the error of rounding the operands alone."""
    rng = np.random.default_rng(8)
    weights, x, idx, gate, dy = cases.problem(rng, n=64, d=192, f=160, e=4, k=2, dtype=cases.BF16)
    made = factors(rng, weights, RANKS["one rank"])
    lora = adapters(made)
    _ext.force_isa(isa)
    try:
        with cases.store(weights) as store:
            _, vjp = jax.vjp(lambda f: host_experts(store, LAYER, x, idx, gate, lora.replace(factors=f)), lora.factors)
            got, = jax.block_until_ready(vjp(jnp.asarray(dy)))
    finally:
        _ext.force_isa(None)
    scales = dict(lora.scales)
    want = exact(weights, made, scales, x, idx, gate, dy, lambda a: a)
    rounded = exact(weights, made, scales, x, idx, gate, dy, lambda a: a.astype(cases.BF16).astype(np.float64))
    for name in PROJECTIONS:
        for a, b, r in zip(got[name], want[name], rounded[name], strict=True):
            # dA of up and down may round nothing twice: one rounding is allowed to each.
            allowed = 2 * max(cases.relative_l2(r, b), cases.RMS_BF16)
            assert cases.relative_l2(a, b) <= allowed, name


def fingerprint():
    """Bits of all results with several strips, segments and experts, for all ISAs."""
    rng = np.random.default_rng(9)
    digest = hashlib.sha256()
    for dtype in (np.float32, cases.BF16):
        weights, x, idx, gate, dy = cases.problem(rng, n=700, d=130, f=530, e=4, k=2, layers=1, dtype=dtype)
        idx[:600, 0] = 2
        made = {name: (a[0], b[0]) for name, (a, b) in factors(rng, weights, RANKS["ranks of their own"]).items()}
        flat = [factor for name in PROJECTIONS for factor in made[name]]
        given = ([*flat, np.array([3, 4], np.uint32)], [2.0, 1.0, 0.5], 0.25, -1)
        bits = [a if a.dtype == np.float32 else a.view(np.uint16) for a in (x, dy)]
        with cases.store(weights) as store:
            for name in ISAS:
                _ext.force_isa(name)
                y, slip = _ext.forward(store.id, 0, bits[0], idx, gate, True, given)
                dx, dgate, grads = _ext.backward(store.id, 0, slip, bits[0], idx, gate, bits[1], given)
                missed = _ext.backward(store.id, 0, 0, bits[0], idx, gate, bits[1], given)
                for a, b in zip((dx, dgate, *grads), (missed[0], missed[1], *missed[2]), strict=True):
                    np.testing.assert_array_equal(a, b)
                for array in (y, dx, dgate, *grads):
                    digest.update(array.tobytes())
            _ext.force_isa(None)
    return digest.hexdigest()


def test_bits_do_not_depend_on_threads():
    code = "import test_expert_lora as t; print(t.fingerprint())"
    prints = {
        threads: subprocess.run(
            [sys.executable, "-c", code], cwd=Path(__file__).parent, env={**os.environ, "KJAX_THREADS": str(threads)},
            capture_output=True, text=True, check=True,
        ).stdout
        for threads in (1, 2, 5)
    }  # fmt: skip
    assert len(set(prints.values())) == 1 and len(prints[1].strip()) == 64


@pytest.mark.parametrize("home, stored, expected", [
    ("auto", True, False), ("device", True, False), ("host", True, True), ("auto", False, False)])
def test_where_adapters_stay_on_the_cpu_backend(home, stored, expected):
    assert on_host(home, True, stored) == expected and not on_host(home, False, stored)


@pytest.mark.parametrize("transport", ["ffi", "pure_callback"])
def test_a_scale_of_zero_takes_no_other_factors(transport):
    """Gate and up have equal shapes: the factors of one must not pass for the other's."""
    weights, x, idx, gate, dy = cases.problem(np.random.default_rng(0))
    made = factors(np.random.default_rng(1), weights, dict(gate_proj=3, up_proj=3))
    with cases.store(weights, transport) as store:
        def found(gate_scale):
            lora = lambda made: ExpertLora(made, scales=(("gate_proj", gate_scale), ("up_proj", 1.5)))  # noqa: E731
            return jax.value_and_grad(lambda made: jnp.vdot(host_experts(store, LAYER, x, idx, gate, lora(made)), dy))(
                {name: (a[LAYER], b[LAYER]) for name, (a, b) in made.items()})
        (zero, of_zero), (tiny, of_tiny) = found(0.0), found(1e-30)
    assert zero == tiny
    for name in made:
        for a, b in zip(of_zero[name], of_tiny[name], strict=True):
            assert np.array_equal(a, np.where(np.abs(b) < 1e-20, 0, b))


def test_what_a_call_says_of_adapters_is_checked():
    weights, x, idx, gate, _ = cases.problem(np.random.default_rng(0))
    (a, b), = factors(np.random.default_rng(1), weights, dict(gate_proj=3)).values()
    nan = float("nan")
    with cases.store(weights) as store:
        def call(arrays, scales, dropout=0.0, host=-1, layer=LAYER):
            return _ext.forward(store.id, layer, x, idx, gate, False, (arrays, scales, dropout, host))
        call([a[LAYER], b[LAYER]], [1.0, nan, nan])
        for message, arguments in {
            "3 arrays for the adapters instead of 2": ([a[LAYER], b[LAYER], b[LAYER]], [1.0, nan, nan]),
            "too few arrays": ([a[LAYER], b[LAYER]], [1.0, 0.0, nan]),
            "dropout 1 is not in": ([a[LAYER], b[LAYER], np.zeros(2, np.uint32)], [1.0, nan, nan], 1.0),
            "dropout nan is not in": ([a[LAYER], b[LAYER], np.zeros(2, np.uint32)], [1.0, nan, nan], nan),
            "expert adapters 4294967296 are closed": ([], [1.0, nan, nan], 0.0, 2**32),
        }.items():
            with pytest.raises(ValueError, match=message):
                call(*arguments)
        host = HostLora(store)
        with host.bound({"gate_proj": {"lora_A": a, "lora_B": b}}):
            call([], [1.0, nan, nan], 0.0, host.id)
            for message, changed in {
                "layer 4294967296 is not in": dict(layer=2**32), "closed": dict(host=2**32 + host.id),
                "gate_proj has no scale": dict(scales=[nan, 1.0, nan]),
                "up_proj has a scale but no factors": dict(scales=[1.0, 1.0, nan]),
            }.items():
                with pytest.raises(ValueError, match=message):
                    call([], **dict(scales=[1.0, nan, nan], host=host.id) | changed)


def test_the_growth_of_squares_is_each_call_s_own():
    """Two calls of a layer at once, from threads that start together."""
    rng = np.random.default_rng(8)
    weights, x, idx, gate, dy = cases.problem(rng, n=256, d=128, f=128)
    made = factors(rng, weights, dict(up_proj=8))
    tree = {name: {"lora_A": a, "lora_B": b} for name, (a, b) in made.items()}
    with cases.store(weights) as store:
        host = HostLora(store)
        for _ in range(5):
            with host.bound(tree, gradients=True):
                start, grown = threading.Barrier(2), []
                def call():
                    start.wait()  # noqa: B023
                    given = ([], [float("nan"), 1.0, float("nan")], 0.0, host.id)
                    grown.append(_ext.backward(store.id, LAYER, 0, x, idx, gate, dy, given)[2][0])  # noqa: B023
                threads = [threading.Thread(target=call) for _ in range(2)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
            total = sum(float(np.square(a, dtype=np.float64).sum()) for a in jax.tree.leaves(host.gradients))
            assert abs(sum(map(float, grown)) / total - 1) < 1e-6


def test_factors_of_the_wrong_shape_are_refused():
    weights, x, idx, gate, _ = cases.problem(np.random.default_rng(10))
    made = factors(np.random.default_rng(10), weights, RANKS["one rank"])
    lora = adapters(made)
    wrong = lora.replace(factors={name: (a[:, :2], b) for name, (a, b) in lora.factors.items()})
    for transport in ("ffi", "pure_callback"):
        with cases.store(weights, transport) as store, pytest.raises(Exception, match="lora_B"):
            jax.block_until_ready(host_experts(store, LAYER, x, idx, gate, wrong))
