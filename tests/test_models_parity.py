"""The models against transformers: logits and gradients, live where torch is installed and from goldens everywhere."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_goldens import CASES, GOLDENS, draw, random_params, state_dict, torch_logits_and_grads
from variant import variant

from kjax.models import ModelConfig, Transformer, unembed

# fp32 has eps 6e-8; three layers of sums over some tens of numbers in another order stay two orders above it.
TOLERANCE = 2e-5


def relative_error(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.abs(a - b).max() / np.abs(b).max())


def plain(tokens):
    """Positions and segments of rows that are one sequence each."""
    return np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(tokens), 1)), np.ones(tokens.shape, np.int32)


@functools.cache
def compiled(config):
    model = Transformer(config)

    def loss(params, tokens):
        logits = unembed(params, model.apply({"params": params}, tokens, *plain(tokens)))
        scores = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1).mean(), logits

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def logits_and_grads(config, params, tokens):
    """What torch_logits_and_grads gives, from kjax; gradients under the names of transformers."""
    (_, logits), grads = compiled(config)(params, tokens)
    return logits, state_dict(jax.tree.map(np.asarray, grads), config)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_transformers(case, request):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    content, params, tokens, seed, model = draw(case, request.config.getoption("--seed", 0))
    expected, expected_grads = torch_logits_and_grads(model, tokens)
    logits, grads = logits_and_grads(ModelConfig.from_json(content), params, tokens)
    assert relative_error(logits, expected) <= TOLERANCE, f"seed {seed}"
    for name, grad in expected_grads.items():  # every parameter, the router's weight among them
        assert relative_error(grads[name], grad) <= TOLERANCE, f"{name}, seed {seed}"


@pytest.mark.parametrize("case", [variant(case) if case in ("v2_greedy", "v3_plain") else case for case in CASES])
def test_logits_and_input_gradient_equal_goldens(case):
    with np.load(GOLDENS / f"{case}.npz", allow_pickle=False) as golden:
        config = ModelConfig.from_json(json.loads(str(golden["config"])))
        params = random_params(config, int(golden["seed"]))
        logits, grads = logits_and_grads(config, params, golden["tokens"])
        assert relative_error(logits, golden["logits"]) <= TOLERANCE
        assert relative_error(grads["model.embed_tokens.weight"], golden["embedding_grad"]) <= TOLERANCE
