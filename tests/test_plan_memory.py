"""Memory read off a jaxpr: functions small enough to count by hand, and whole train steps against XLA's own account."""

import jax
import jax.numpy as jnp
import numpy as np
import plan_shapes
import pytest
from variant import variant

from kjax.planning import memory

pytestmark = pytest.mark.plain_xla

A = jax.ShapeDtypeStruct((64, 64), jnp.float32)
SIZE = 64 * 64 * 4


def temporaries(f, *args, donated=()):
    return memory.usage(jax.make_jaxpr(f)(*args), donated).temporaries / SIZE


def test_products_and_fused_operations():
    assert temporaries(lambda a: a @ a, A) == 1
    assert temporaries(lambda a: (a @ a) @ a, A) == 2  # the second needs the first
    assert temporaries(lambda a: ((a @ a) @ a) @ a, A) == 2  # the first is gone
    assert temporaries(lambda a: (a * 2 + 1) @ a, A) == 2  # a product reads memory
    assert temporaries(lambda a: (a @ a) + 1, A) == 2  # no place of a product's result is taken
    assert temporaries(lambda a: a * 2 + 1, A) == 1  # the doubled matrix never exists
    assert temporaries(lambda a: jnp.sum(a * 2), A) == pytest.approx(1, abs=0.01)  # a reduction reads memory
    assert temporaries(lambda a: (a @ a, a @ a)[0], A) == 1  # nobody reads the second
    assert temporaries(lambda a: a + 1, A, donated=[True]) == 0


def test_operands_are_laid_out_as_a_product_wants_them():
    heads = jax.ShapeDtypeStruct((8, 8, 64), jnp.float32)  # as large as A; the result is an eighth of it
    assert temporaries(lambda q, k: jnp.einsum("bij,bkj->bik", q, k), heads, heads) == 1 / 8
    assert temporaries(lambda q, k: jnp.einsum("ibj,kbj->bik", q, k), heads, heads) == 1 / 8 + 2
    # Two axes of the right operand that stay cannot be read as if they were transposed.
    wide = jax.ShapeDtypeStruct((8, 4, 2, 64), jnp.float32)
    dims = (((2,), (3,)), ((0,), (0,)))
    assert temporaries(lambda q, k: jax.lax.dot_general(q, k, dims), heads, wide) == 1 / 8 + 1
    assert temporaries(lambda a, b: jax.lax.dot_general(a, b, (((1,), (0,)), ((), ()))), A, A) == 1
    assert temporaries(lambda a, b: jax.lax.dot_general(a, b, (((0,), (0,)), ((), ()))), A, A) == 2


def test_what_is_dear_is_kept_for_its_readers():
    def read_thrice(f):
        return temporaries(lambda a: ((e := f(a)) * a) @ (e + a) @ (e - a), A)
    assert read_thrice(jnp.exp) == 4  # the first product, its operands, and the exponential for the second
    assert read_thrice(lambda a: a * 2) == 3  # computed anew
    assert read_thrice(lambda a: a / jnp.sum(a)) == pytest.approx(3, abs=0.01)  # a product with an inverse


def test_random_bits_are_two_words_each_until_they_are_read():
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    # Two words and the counters that they are made from.
    assert temporaries(lambda key: jax.random.bits(key, (64, 64)) + 1, key) == pytest.approx(3, abs=0.01)


def test_loops():
    def stacked(a):
        return jax.lax.scan(lambda c, _: (c @ a, c), a, None, length=5)
    assert temporaries(stacked, A) == 5 + 2  # five outputs, the carry and its successor

    def carried(a):
        return jax.lax.scan(lambda c, _: (c @ a, None), a, None, length=5)[0]
    assert temporaries(carried, A) == 2

    def carried_in_place(a):
        return jax.lax.scan(lambda c, _: (jnp.tanh(c), None), a, None, length=5)[0]
    assert temporaries(carried_in_place, A) == 1  # written where the old value was, which nobody reads again

    def sliced(stack, a):
        return jax.lax.scan(lambda c, w: (c @ w, None), a, stack)[0]
    # The carry, its successor, and the slice that the product reads.
    assert temporaries(sliced, jax.ShapeDtypeStruct((5, 64, 64), jnp.float32), A) == 3

    def branches(a):
        return jax.lax.cond(a[0, 0] > 0, lambda a: (a @ a) @ a, lambda a: a @ a, a)
    assert temporaries(branches, A) == pytest.approx(2, abs=0.01)


def test_updates_in_place():
    def update(a):
        return jax.lax.dynamic_update_slice(a, jnp.zeros((1, 64)), (3, 0))
    assert temporaries(lambda a: update(a @ a), A) == 1
    assert temporaries(lambda a: (lambda b: update(b) @ b)(a @ a), A) == 3  # the old matrix is read again


def test_a_rematerialised_layer():
    def loss(w, checkpoint, length):
        f = lambda x, _: (jnp.tanh(jnp.tanh(x @ w) @ w), None)  # noqa: E731
        return jnp.sum(jax.lax.scan(jax.checkpoint(f) if checkpoint else f, jnp.ones((64, 64)), None, length)[0])

    def usage(checkpoint, length, **options):
        return memory.usage(jax.make_jaxpr(jax.grad(lambda w: loss(w, checkpoint, length)))(A), **options)
    kept, recomputed = usage(False, 8), usage(True, 8)
    assert recomputed.saved == 8 * SIZE  # layer inputs
    assert kept.saved > 2 * recomputed.saved
    assert kept.peak > recomputed.peak


def test_operations():
    def f(a):
        return jax.lax.scan(lambda c, _: (jnp.einsum("ij,kj->ik", c, a), None), a, None, length=3)[0]
    assert memory.operations(jax.make_jaxpr(f)(A)) == 3 * 2 * 64**3
    assert memory.operations(jax.make_jaxpr(lambda a: jnp.einsum("bij,bjk->bik", a, a))(
        np.ones((2, 3, 3), np.float32))) == 2 * 2 * 27


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the shapes are drawn for the CPU backend")
@pytest.mark.parametrize("number", [variant(n) if n % 3 else n for n in range(len(plan_shapes.KINDS))],
                         ids=plan_shapes.KINDS)
def test_planned_memory_is_what_xla_allocates(pytestconfig, number):
    _, content, bindings = plan_shapes.draw(pytestconfig.getoption("--seed"), number)
    found, text = plan_shapes.ratio(plan_shapes.settings("config.json", bindings), content)
    assert plan_shapes.LOW <= found <= plan_shapes.HIGH, text


@pytest.mark.skipif(jax.default_backend() == "cpu", reason="no GPU here")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("number", range(len(plan_shapes.KINDS)), ids=plan_shapes.KINDS)
def test_planned_memory_on_a_gpu(pytestconfig, number, dtype):
    """A GPU fuses more than the rules say, so the plan may be above; it must not be below."""
    _, content, bindings = plan_shapes.draw(pytestconfig.getoption("--seed"), number)
    found, text = plan_shapes.ratio(plan_shapes.settings("config.json", bindings, dtype), content)
    assert found >= plan_shapes.LOW, text
