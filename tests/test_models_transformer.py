"""The transformer by itself: packing, padding, micro-batches, generation from a cache, adapters, bf16."""

import functools

import family_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from make_goldens import CASES, random_params
from variant import variant

from kjax import lora
from kjax.errors import ConfigError
from kjax.models import Cache, ModelConfig, Transformer, attention, linears, mla, unembed
from kjax.models.layers import Projection, dropout, linear, merged
from kjax.offload import ExpertStore

CONFIG = ModelConfig.from_json(CASES["v3"])
# One adapter of each kind, for tests with dropout: random masks take long to compile.
FEW = ("dense_layers/mlp/down_proj", "moe_layers/self_attn/q_b_proj", "moe_layers/mlp/shared_experts/up_proj")
# fp32 sums over some tens of numbers, regrouped: tens of roundings of 6e-8, and three layers pass them on.
REGROUPED = 5e-6


def relative_error(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, 3)


def batch(lengths, width, rows=None):
    """Sequences laid one after another into rows of `width` tokens: tokens, positions, segments [B,T].

    rows: the row of each sequence, one row per sequence by default; token ids depend on the sequence alone.
    """
    rows = range(len(lengths)) if rows is None else rows
    tokens, positions, segments = np.zeros((3, max(rows) + 1, width), np.int32)
    for number, (length, row) in enumerate(zip(lengths, rows, strict=True)):
        begin = int((segments[row] > 0).sum())
        place = slice(begin, begin + length)
        tokens[row, place] = np.random.RandomState(number).randint(0, CONFIG.vocab_size, length)
        positions[row, place] = np.arange(length)
        segments[row, place] = segments[row].max() + 1
    return tokens, positions, segments


def adapters(config=CONFIG, paths=None, rate=0.0):
    """Adapters on every linear, or these, with B drawn too: as after some training."""
    spec = lora.LoraSpec(tuple((path, lora.Adapter(3, 6.0, rate)) for path in paths or linears(config)))
    leaves = flatten_dict(lora.init(spec, linears(config), jax.random.key(5)))
    for path in leaves:
        if path[-1] == "lora_B":
            leaves[path] = 0.2 * jax.random.normal(jax.random.key(len(str(path))), leaves[path].shape)
    return spec, unflatten_dict(leaves)


@functools.cache
def compiled(model, training=False):
    """run(params, lora tree, inputs, dropout key or None) -> hidden; training adds a loss and its gradient to lora."""
    def hidden(tree, params, inputs, key):
        return model.apply({"params": params, "lora": tree}, *inputs, deterministic=key is None,
                           rngs=None if key is None else {"dropout": key})

    def loss(tree, params, inputs, key):
        h = hidden(tree, params, inputs, key)
        return jnp.square(h).mean() + h[..., 0].mean()

    f = jax.jit(jax.value_and_grad(loss) if training else hidden)
    return lambda params, tree, inputs, key=None: f(tree, params, inputs, key)


def test_packed_rows_equal_separate_rows(params):
    run = compiled(Transformer(CONFIG))
    separate = run(params, {}, batch((7, 9), 16))
    packed = run(params, {}, batch((7, 9), 16, rows=(1, 1)))
    assert relative_error(packed[1, :7], separate[0, :7]) <= REGROUPED
    assert relative_error(packed[1, 7:], separate[1, :9]) <= REGROUPED


def test_padding_changes_nothing_and_reaches_no_expert(params):
    leaves = flatten_dict(params)
    experts = [leaves.pop(("moe_layers", "mlp", "experts", name)) for name in ("gate_proj", "up_proj", "down_proj")]
    tokens, positions, segments = batch((5, 3), 16)
    with ExpertStore.from_arrays(*experts) as store:
        apply = jax.jit(Transformer(CONFIG, store=store).apply)
        variables = {"params": unflatten_dict(leaves)}
        clean = np.asarray(apply(variables, tokens, positions, segments))
        routes = store.stats()["routes"]
        dirty = np.asarray(apply(variables, np.where(segments == 0, 90, tokens), positions, segments))
    np.testing.assert_array_equal(clean[segments > 0], dirty[segments > 0])
    assert routes == (5 + 3) * CONFIG.num_experts_per_tok * CONFIG.num_moe_layers


def test_micro_rows_change_nothing(params):
    spec, tree = adapters(paths=FEW, rate=0.25)
    inputs, key = batch((6, 8, 3, 8), 8), jax.random.key(1)
    whole = compiled(Transformer(CONFIG, spec), training=True)(params, tree, inputs, key)
    split = compiled(Transformer(CONFIG, spec, micro_rows=2), training=True)(params, tree, inputs, key)
    for a, b in zip(jax.tree.leaves(split), jax.tree.leaves(whole), strict=True):
        assert relative_error(a, b) <= 2 * REGROUPED  # forward and backward
    with pytest.raises(ConfigError, match="micro_rows = 3 does not divide the 4 rows of the batch"):
        Transformer(CONFIG, micro_rows=3).apply({"params": params}, *inputs)


def test_dropout_is_the_same_in_a_recompute(params):
    """Were the backward pass to draw other masks, the gradient would not be the slope of the loss."""
    spec, tree = adapters(paths=FEW, rate=0.25)
    run = compiled(Transformer(CONFIG, spec, micro_rows=2), training=True)
    inputs, key = batch((6, 8, 3, 8), 8), jax.random.key(1)
    _, grads = run(params, tree, inputs, key)
    norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads)))

    def loss_at(step):
        return run(params, jax.tree.map(lambda a, g: a + step * g / norm, tree, grads), inputs, key)[0]

    # Central difference: fp32 rounding of the loss over the step, and the third derivative times step^2.
    assert abs((loss_at(2e-3) - loss_at(-2e-3)) / 4e-3 / norm - 1) < 1e-2


def test_dropout_differs_by_key_and_acts(params):
    spec, tree = adapters(paths=FEW, rate=0.5)
    run, inputs = compiled(Transformer(CONFIG, spec)), batch((6, 8), 16)
    one, two, again = (run(params, tree, inputs, jax.random.key(seed)) for seed in (1, 2, 1))
    assert relative_error(one, two) > 1e-2
    assert relative_error(one, run(params, tree, inputs)) > 1e-2
    np.testing.assert_array_equal(one, again)


def test_dropout_drops_single_elements_at_its_rate_and_keeps_the_mean():
    x = jnp.ones((3, 200, 100))
    y = dropout(x, 0.3, jax.random.key(0), jnp.arange(3))
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.7)}
    # 60,000 draws: the share dropped has standard deviation 0.0019.
    assert abs(float((y == 0).mean()) - 0.3) < 0.01
    assert not (y[0] == y[1]).all()
    assert (y == 0).any(axis=(0, 1)).all() and (y == 0).any(axis=2).all()


def test_adapters_equal_merged_weights(params):
    """And nothing is dropped when no dropout key is there."""
    spec, tree = adapters(rate=0.5)
    inputs = batch((6, 8), 16)
    flat, ab = flatten_dict(params, sep="/"), flatten_dict(tree, sep="/")
    for path, adapter in spec.entries:
        delta = np.einsum("...or,...ri->...oi", ab[f"{path}/lora_B"], ab[f"{path}/lora_A"])
        weight = path if "/experts/" in path else f"{path}/weight"
        flat[weight] = flat[weight] + adapter.scale * delta
    run = compiled(Transformer(CONFIG))
    adapted = compiled(Transformer(CONFIG, spec))(params, tree, inputs)
    assert relative_error(adapted, run(unflatten_dict(flat, sep="/"), {}, inputs)) <= REGROUPED
    assert relative_error(adapted, run(params, {}, inputs)) > 0.1  # they act


def test_some_linears_adapted_and_their_tree_missing(params):
    inputs = batch((6, 8), 16)
    path = "moe_layers/mlp/shared_experts/up_proj"
    spec = lora.LoraSpec(((path, lora.Adapter(2, 4.0)),))
    tree = lora.init(spec, linears(CONFIG), jax.random.key(0))
    model = Transformer(CONFIG, spec)
    fresh = compiled(model)(params, tree, inputs)
    np.testing.assert_array_equal(fresh, compiled(Transformer(CONFIG))(params, {}, inputs))
    with pytest.raises(ConfigError, match=f"{path} is to be adapted, but the lora tree holds nothing for it"):
        model.apply({"params": params}, *inputs)


@pytest.mark.parametrize("content", [
    CASES["v3"], variant(CASES["v3_plain"]), family_cases.content("glm4_moe qk_norm", 0),
    variant(family_cases.content("qwen3_moe", 0))], ids=["v3", "v3_plain", "glm", "qwen"])
def test_generation_from_a_cache_equals_the_full_forward(content):
    """Rows of unequal length, padded on the left: five tokens, five more, then one at a time, which is absorbed."""
    config = ModelConfig.from_json(content | {"vocab_size": CONFIG.vocab_size})
    params, (spec, tree) = random_params(config, 3), adapters(config)
    inputs, lengths = batch((12, 8), 12), (12, 8)
    apply, variables = jax.jit(Transformer(config, spec).apply), {"params": params, "lora": tree}
    expected = apply(variables, *inputs)
    left = [np.stack([np.roll(row, 12 - n) for row, n in zip(array, lengths, strict=True)]) for array in inputs]
    cache, hidden = Cache.empty(config, 2, 15, jnp.float32), []
    for begin, end in ((0, 5), (5, 10), (10, 11), (11, 12)):
        h, cache = apply(variables, *(array[:, begin:end] for array in left), cache=cache)
        hidden.append(h)
    assert int(cache.length) == 12
    for row, n in enumerate(lengths):
        assert relative_error(jnp.concatenate(hidden, axis=1)[row, 12 - n:], expected[row, :n]) <= REGROUPED


def test_absorbed_attention_equals_expanded_with_an_adapter_on_kv_b():
    draw = iter(jax.random.split(jax.random.key(0), 9))
    heads, r = CONFIG.num_attention_heads, CONFIG.kv_lora_rank
    kv_b = Projection(*(jax.random.normal(next(draw), shape) for shape in [(heads * 28, r)]),
                      lora_A=jax.random.normal(next(draw), (3, r)),
                      lora_B=jax.random.normal(next(draw), (heads * 28, 3)), scale=0.7)
    q_nope, q_rope = jax.random.normal(next(draw), (2, 5, heads, 12)), jax.random.normal(next(draw), (2, 5, heads, 8))
    c, k_rope = jax.random.normal(next(draw), (2, 9, r)), jax.random.normal(next(draw), (2, 9, 8))
    visible = attention.mask(jnp.ones((2, 5)), jnp.ones((2, 9)), 4)
    arguments = ({"kv_b_proj": kv_b}, CONFIG, q_nope, q_rope, c, k_rope, visible)
    expanded = jax.jit(mla.attend_expanded, static_argnums=1)(*arguments, jnp.arange(2))
    absorbed = jax.jit(mla.attend_absorbed, static_argnums=1)(*arguments)
    # Scores reach some tens here, so exp() turns their rounding into tens of eps.
    assert relative_error(absorbed, expanded) <= 1e-4


@pytest.mark.parametrize("equation,shape", [("bhts,bshv->bthv", (2, 3, 6, 6)), ("bgqts,bsgc->btgqc", (2, 3, 2, 6, 6))])
def test_attention_and_its_gradients_are_those_of_a_softmax(equation, shape):
    scores = 20 * jax.random.normal(jax.random.key(0), shape)
    v = jax.random.normal(jax.random.key(1), (2, 6, 3, 5))
    do = jax.random.normal(jax.random.key(2), (2, 6, *shape[1:-2], 5))
    visible = attention.mask(jnp.array([[1, 1, 1, 2, 2, 0]] * 2), jnp.array([[1, 1, 1, 2, 2, 0]] * 2))

    def plain(scores, v):
        shown = jnp.expand_dims(visible, range(1, scores.ndim - 2))
        return jnp.einsum(equation, jax.nn.softmax(jnp.where(shown, scores * 0.3, -jnp.inf), axis=-1), v)

    expected, expected_vjp = jax.vjp(plain, scores, v)
    found, found_vjp = jax.vjp(lambda scores, v: attention.attend(equation, 0.3, scores, visible, v), scores, v)
    assert relative_error(found, expected) <= 1e-6
    for one, other in zip(found_vjp(do), expected_vjp(do), strict=True):
        assert relative_error(one, other) <= 3e-6


def test_merged_weight_is_what_linear_applies():
    a, b, w, x = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(2, 7), (5, 2), (5, 7), (1, 4, 7)]))
    p = Projection(w, lora_A=a, lora_B=b, scale=0.5)
    assert relative_error(linear(p, x, jnp.arange(1)), x @ merged(p, jnp.float32).T) <= REGROUPED


def test_mask_is_causal_within_a_row_and_a_segment():
    segments = jnp.array([[1, 1, 2, 2, 0]])
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]
    np.testing.assert_array_equal(attention.mask(segments, segments)[0], np.array(expected, bool))


def test_a_token_id_beyond_the_table_is_not_another_token(params):
    tokens, positions, segments = batch((6, 8), 16)
    tokens[0, 1] = CONFIG.vocab_size
    hidden = compiled(Transformer(CONFIG))(params, {}, (tokens, positions, segments))
    assert jnp.isnan(hidden[0, 1]).all() and jnp.isfinite(hidden[1]).all()


def test_a_model_without_sparse_layers():
    config = ModelConfig.from_json(CASES["v3"] | {"first_k_dense_replace": 9})
    params = random_params(config, 0)
    assert "moe_layers" not in params and config.num_moe_layers == 0
    assert jnp.isfinite(Transformer(config).apply({"params": params}, *batch((4,), 4))).all()


def test_bf16_keeps_its_type_and_its_distance(params):
    """No near tie flips a route in this draw."""
    inputs = batch((6, 8), 16)
    exact = unembed(params, compiled(Transformer(CONFIG))(params, {}, inputs))
    half = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), params)
    half["moe_layers"]["mlp"]["gate"] = params["moe_layers"]["mlp"]["gate"]
    hidden = compiled(Transformer(CONFIG, dtype=jnp.bfloat16))(half, {}, inputs)
    logits = unembed(half, hidden)
    assert hidden.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    # bf16 rounds at 2^-9; each of three layers rounds about ten times on the way.
    assert relative_error(logits, exact) <= 30 * 2**-9
