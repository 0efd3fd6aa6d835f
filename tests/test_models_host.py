"""The transformer with its routed experts on the host: equal to the device, called once, little kept."""

import copy
from collections import Counter

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from make_goldens import CASES, random_params
from test_models_transformer import FEW, REGROUPED, adapters, batch, relative_error

from kjax.models import ModelConfig, Transformer, attention
from kjax.models.transformer import in_micro_batches
from kjax.offload import ExpertStore
from kjax.offload.lora import PROJECTIONS

CONFIG = ModelConfig.from_json(CASES["v3"])


def split(params, dtype=np.float32):
    """A params tree with device experts -> the tree without them, and a store that holds them."""
    params = copy.deepcopy(params)
    experts = params["moe_layers"]["mlp"].pop("experts")
    return params, ExpertStore.from_arrays(*(experts[name].astype(dtype) for name in
                                             ("gate_proj", "up_proj", "down_proj")))


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, 3)


@pytest.fixture(scope="module")
def host(params):
    rest, store = split(params)
    with store:
        yield rest, store


def loss_and_grads(model):
    """Gradients to the adapters and to the embedding, which sees all there is below an expert call."""
    @jax.jit
    def run(params, tree, inputs):
        def loss(tree, embedding):
            base = params | {"embed_tokens": {"weight": embedding}}
            hidden = model.apply({"params": base, "lora": tree}, *inputs)
            return jnp.square(hidden).mean() + hidden[..., 0].mean()
        return jax.value_and_grad(loss, argnums=(0, 1))(tree, params["embed_tokens"]["weight"])
    return run


def test_host_experts_equal_device_experts(params, host):
    """Loss and gradients; padding is in the batch; attention in micro-batches."""
    rest, store = host
    spec, tree = adapters(paths=FEW)
    inputs = batch((6, 8, 3, 8), 8)
    on_host = loss_and_grads(Transformer(CONFIG, spec, store=store, micro_rows=2))(rest, tree, inputs)
    on_device = loss_and_grads(Transformer(CONFIG, spec, micro_rows=2))(params, tree, inputs)
    for a, b in zip(jax.tree.leaves(on_host), jax.tree.leaves(on_device), strict=True):
        assert relative_error(a, b) <= 2 * REGROUPED


def test_adapters_of_host_experts_equal_those_of_device_experts(params, host):
    """Loss and all gradients under remat and scan; the adapters change nothing of how often the host is called."""
    rest, store = host
    spec, tree = adapters(paths=(FEW[2], *(f"moe_layers/mlp/experts/{name}" for name in PROJECTIONS)))
    inputs = batch((6, 8, 3, 8), 8)
    before = store.stats()
    on_host = loss_and_grads(Transformer(CONFIG, spec, store=store, micro_rows=2))(rest, tree, inputs)
    after = jax.block_until_ready(on_host) and store.stats()
    assert [after[name] - before[name] for name in ("forward", "backward", "recomputed")] == [
        CONFIG.num_moe_layers, CONFIG.num_moe_layers, 0]
    on_device = loss_and_grads(Transformer(CONFIG, spec, micro_rows=2))(params, tree, inputs)
    for a, b in zip(jax.tree.leaves(on_host), jax.tree.leaves(on_device), strict=True):
        assert np.abs(b).max() > 0 and relative_error(a, b) <= 4 * REGROUPED  # 2e-5: the chains are twice as long


def test_the_host_is_called_once_per_layer_and_direction(host):
    rest, store = host
    spec, tree = adapters(paths=FEW)
    inputs = batch((6, 8, 3, 8), 8)
    train = loss_and_grads(Transformer(CONFIG, spec, store=store, micro_rows=2))
    evaluate = jax.jit(Transformer(CONFIG, spec, store=store).apply)
    before = store.stats()
    for _ in range(3):
        jax.block_until_ready(train(rest, tree, inputs))
    after = store.stats()
    assert after["forward"] - before["forward"] == 3 * CONFIG.num_moe_layers
    assert after["backward"] - before["backward"] == 3 * CONFIG.num_moe_layers
    assert after["recomputed"] == before["recomputed"]  # every backward found what its forward had kept
    jax.block_until_ready(evaluate({"params": rest, "lora": tree}, *inputs))
    assert store.stats()["forward"] - after["forward"] == CONFIG.num_moe_layers
    assert store.stats()["backward"] == after["backward"]


def test_layers_keep_their_input_the_routes_and_a_slip(host):
    """What a backward pass holds, per layer of a stack; it would show an attention matrix or a SwiGLU's inside."""
    rest, store = host
    spec, tree = adapters(paths=FEW)
    tokens, positions, segments = batch((6, 8, 3, 8), 8)

    def hidden(tree):
        return Transformer(CONFIG, spec, store=store, micro_rows=2).apply({"params": rest, "lora": tree}, tokens,
                                                                          positions, segments)
    _, vjp = jax.vjp(jax.jit(hidden), tree)
    given = {leaf.shape for leaf in jax.tree.leaves((rest, tree))}
    dense, sparse = CONFIG.num_dense_layers, CONFIG.num_moe_layers
    kept = Counter(leaf.shape for leaf in jax.tree.leaves(vjp)
                   if leaf.shape and leaf.shape[0] in (dense, sparse) and leaf.shape not in given)
    b, t, d, k = *tokens.shape, CONFIG.hidden_size, CONFIG.num_experts_per_tok
    layer_and_slip, final_norm = {(sparse,): 2}, {(1, 1, d): 1}
    assert kept == {(dense, b, t, d): 1, (sparse, b, t, d): 1, (sparse, b * t, k): 1} | layer_and_slip | final_norm


def test_micro_batches_keep_their_inputs_only():
    tokens = attention.Tokens(*(jnp.ones((4, 3, 2)),) * 2, jnp.ones((4, 3), jnp.int32), jnp.arange(4))

    def inner(x, tokens):
        return jnp.sin(jnp.einsum("btd,bsd->bts", x, jnp.sin(x))) @ x

    x = jnp.ones((4, 3, 5))
    for micro_rows, squares in ((None, True), (2, False)):
        _, vjp = jax.vjp(lambda x: in_micro_batches(inner, micro_rows, x, tokens), x)  # noqa: B023
        assert any(leaf.shape[-2:] == (3, 3) for leaf in jax.tree.leaves(vjp)) == squares


def test_bf16_host_experts():
    """Against a device that multiplies the same bf16 weights; one sparse layer, so both sides route the same input."""
    config = ModelConfig.from_json(CASES["v3"] | {"num_hidden_layers": 2})
    params = jax.tree.map(lambda a: a.astype(ml_dtypes.bfloat16), random_params(config, 3))
    params["moe_layers"]["mlp"]["gate"] = random_params(config, 3)["moe_layers"]["mlp"]["gate"]
    rest, store = split(params, ml_dtypes.bfloat16)
    spec, tree = adapters(config, paths=FEW)
    inputs = batch((6, 8), 8)
    with store:
        assert store.format == "bf16"
        on_host = loss_and_grads(Transformer(config, spec, jnp.bfloat16, store))(rest, tree, inputs)
        on_device = loss_and_grads(Transformer(config, spec, jnp.bfloat16))(params, tree, inputs)
    # Both round operands and SwiGLU products to bf16 (2^-9) and sum in fp32: where sums differ in their last bit a
    # rounding goes the other way, in the SwiGLU, in y, in the residual, in the norm and on their ways back.
    for a, b in zip(jax.tree.leaves(on_host), jax.tree.leaves(on_device), strict=True):
        assert relative_error(a, b) <= 8 * 2**-9
