"""Adapters on routed experts against peft's adapters of transformers' expert parameters: gradients, optimiser steps.

peft has one A for gate and up: [E*R, in], the expert before the rank, and B [out, R*E], the rank before the expert.
"""

import jax
import make_goldens
import make_peft_goldens as oracle
import numpy as np
import pytest
from test_peft_parity import GRADIENTS, STEPS, relative_error, split

from kjax import lora, step
from kjax.models import ModelConfig, Transformer, unembed
from kjax.optimizer import optimizer

CASES = ("v2_greedy", "v3")
RANKS, ALPHA = {"gate_proj": 3, "up_proj": 3, "down_proj": 4}, 6.0
PATH = "moe_layers/mlp/experts"


@pytest.fixture(scope="module", autouse=True)
def peft():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    return pytest.importorskip("peft")


def adapted(case: str, params: dict, seed: int, parameters):
    """transformers' model with adapters that peft made on these parameters of its experts, B drawn too."""
    import peft
    import torch

    model = peft.get_peft_model(make_goldens.torch_model(oracle.content(case), params), peft.LoraConfig(
        r=RANKS["gate_proj"], lora_alpha=ALPHA, rank_pattern={"experts.down_proj": RANKS["down_proj"]},
        target_modules=[], target_parameters=[f"mlp.experts.{name}" for name in parameters], task_type="CAUSAL_LM"))
    random = np.random.RandomState(seed)
    for parameter in oracle.peft_parameters(model).values():
        parameter.data = torch.from_numpy((0.3 * random.standard_normal(tuple(parameter.shape))).astype(np.float32))
    return model.eval()


def stacked(case: str, numbers: dict, parameters) -> dict:
    """peft's arrays by name -> parameter -> (A [L,E,R,in], B [L,E,out,R])."""
    config = ModelConfig.from_json(oracle.content(case))
    layers = range(config.num_dense_layers, config.num_dense_layers + config.num_moe_layers)
    assert len(numbers) == 2 * len(layers) * len(parameters)
    made = {}
    for name in parameters:
        wrapper = "" if name == "down_proj" else ".base_layer"
        pairs = [[numbers[f"model.layers.{i}.mlp.experts{wrapper}.{matrix}"] for matrix in ("lora_A", "lora_B")]
                 for i in layers]
        experts = config.n_routed_experts
        made[name] = (np.stack([a.reshape(experts, -1, a.shape[1]) for a, _ in pairs]),
                      np.stack([b.reshape(len(b), -1, experts).transpose(2, 0, 1) for _, b in pairs]))
    return made


def tree_of(made: dict) -> dict:
    """The lora tree that adds the same to the weights."""
    leaves = {}
    for name, (a, b) in made.items():
        parts = {name: b}
        if name == "gate_up_proj":
            parts = dict(zip(("gate_proj", "up_proj"), np.split(b, 2, axis=2), strict=True))
        leaves |= {name: {"lora_A": a, "lora_B": part} for name, part in parts.items()}
    return {"moe_layers": {"mlp": {"experts": leaves}}}


def spec_of(tree: dict) -> lora.LoraSpec:
    names = sorted(tree["moe_layers"]["mlp"]["experts"])
    return lora.LoraSpec(tuple((f"{PATH}/{name}", lora.Adapter(RANKS[name], ALPHA)) for name in names))


def numbers_of(model, of) -> dict:
    return {name: of(parameter).numpy() for name, parameter in oracle.peft_parameters(model).items()}


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_those_of_peft(case, request):
    parameters = ("gate_up_proj", "down_proj")
    config = ModelConfig.from_json(oracle.content(case))
    for attempt in range(request.config.getoption("--seed", 0) * 1000, 10**9):
        params, (batch,) = make_goldens.random_params(config, attempt), oracle.batches(case, attempt, 1)
        model = adapted(case, params, attempt, parameters)
        if oracle.near_tie(case, model, batch) >= make_goldens.MARGIN:
            break
    tree = tree_of(stacked(case, numbers_of(model, lambda parameter: parameter.detach()), parameters))
    loss = oracle.torch_loss(model, batch)
    loss.backward()
    wanted = stacked(case, numbers_of(model, lambda parameter: parameter.grad), parameters)
    for experts in ("host", "device"):
        rest, store = split(params, experts)
        transformer = Transformer(config, lora=spec_of(tree), store=store)
        gradients = jax.jit(step.gradients(transformer, unembed, chunk=20, seed=0, dropout=False))
        ours, _, grads = jax.block_until_ready(gradients(tree, 0, rest, batch))
        if store is not None:
            store.close()
        assert abs(float(ours) / float(loss.detach()) - 1) <= GRADIENTS
        grads = grads["moe_layers"]["mlp"]["experts"]
        gate, up, down = (grads[name] for name in ("gate_proj", "up_proj", "down_proj"))
        a, b = wanted["gate_up_proj"]
        assert relative_error(gate["lora_A"] + up["lora_A"], a) <= GRADIENTS
        assert relative_error(np.concatenate([gate["lora_B"], up["lora_B"]], axis=2), b) <= GRADIENTS
        assert relative_error(down["lora_A"], wanted["down_proj"][0]) <= GRADIENTS
        assert relative_error(down["lora_B"], wanted["down_proj"][1]) <= GRADIENTS


def test_steps_equal_those_of_peft(request):
    """AdamW with decay, schedule and clipping on adapters of down_proj, in which nothing is shared."""
    case, parameters, steps = "v3", ("down_proj",), 4
    config = ModelConfig.from_json(oracle.content(case))
    for attempt in range(request.config.getoption("--seed", 0) * 1000, 10**9):
        params, batches = make_goldens.random_params(config, attempt), oracle.batches(case, attempt, steps)
        model = adapted(case, params, attempt, parameters)
        tree = tree_of(stacked(case, numbers_of(model, lambda parameter: parameter.detach().clone()), parameters))
        expected = oracle.torch_steps(case, model, batches, margin=make_goldens.MARGIN)
        if expected is not None:
            break
    rest, store = split(params, "host")
    chosen = optimizer(oracle.OPTIMIZER[case], steps)
    transformer = Transformer(config, lora=spec_of(tree), store=store)
    train_step = jax.jit(step.train_step(transformer, unembed, chosen, chunk=20, seed=0, dropout=False))
    state, told = step.initial_state(tree, chosen), []
    for batch in batches:
        state, metrics = train_step(state, rest, batch)
        told.append((float(metrics.loss), float(metrics.grad_norm)))
    store.close()
    np.testing.assert_allclose(told, list(zip(*expected, strict=True)), rtol=STEPS)
    final = tree_of(stacked(case, numbers_of(model, lambda parameter: parameter.detach()), parameters))
    before, after, there = (jax.tree.leaves(each) for each in (tree, state.lora, final))
    for a, b, start in zip(after, there, before, strict=True):
        assert np.linalg.norm(b - start) > 0.01 * np.linalg.norm(b)
        assert np.linalg.norm(a - b) <= STEPS * np.linalg.norm(b)
