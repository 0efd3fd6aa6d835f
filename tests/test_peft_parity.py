"""The adapter against transformers + peft + torch: files both ways, gradients, ten optimiser steps."""

import functools
import json

import jax
import make_goldens
import make_peft_goldens as oracle
import numpy as np
import pytest
from make_peft_goldens import GOLDENS, LORA, OPTIMIZER
from variant import variant

from kjax import adapters, lora, lora_targets, step
from kjax.config import Lora
from kjax.models import ModelConfig, Transformer, linears, unembed
from kjax.offload.store import ExpertStore
from kjax.optimizer import optimizer

# fp32 has eps 6e-8; three layers of sums over some tens of numbers in another order stay two orders above it.
LOGITS, GRADIENTS = 1e-5, 2e-5
# Ten steps with gradients off by up to 2e-5 each, half of it cancelling, move loss and adapter by about as much; Adam,
# which divides by the gradient's size, moves entries with next to none by more, to which the loss is indifferent.
STEPS = 1e-4


@pytest.fixture
def peft():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    return pytest.importorskip("peft")


def relative_error(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.abs(a - b).max() / np.abs(b).max())


def split(params: dict, experts: str):
    """The params of a tree with device experts, and the store over them if they are to be on the host."""
    if experts == "device":
        return params, None
    moe = params["moe_layers"]
    rest = {name: leaf for name, leaf in moe["mlp"].items() if name != "experts"}
    w = moe["mlp"]["experts"]
    return (params | {"moe_layers": moe | {"mlp": rest}},
            ExpertStore.from_arrays(w["gate_proj"], w["up_proj"], w["down_proj"]))


def logits(content: dict, params: dict, spec, tree, tokens):
    model = Transformer(ModelConfig.from_json(content), lora=spec)
    positions = np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(tokens), 1))

    @jax.jit
    def run(variables):
        return unembed(variables["params"], model.apply(variables, tokens, positions, np.ones_like(tokens)))
    return run({"params": params, "lora": tree})


def draw(case: str, seed: int, peft_model):
    """Params, an adapter with a B, and a batch whose routes keep clear of ties; with torch's model of them."""
    config = ModelConfig.from_json(oracle.content(case))
    for attempt in range(seed * 1000, seed * 1000 + 1000):
        params, tree = make_goldens.random_params(config, attempt), oracle.random_lora(case, attempt, 0.3)
        (batch,) = oracle.batches(case, attempt, 1)
        model = peft_model(params, tree)
        if oracle.near_tie(case, model, batch) >= make_goldens.MARGIN:
            return params, tree, batch, model
    raise AssertionError("a thousand draws with ties")


@pytest.mark.parametrize("case", LORA)
def test_peft_reads_our_adapter_and_the_gradients_agree(case, peft, request):
    torch = pytest.importorskip("torch")
    content, (spec, _) = oracle.content(case), oracle.spec_of(case)
    params, tree, batch, model = draw(case, request.config.getoption("--seed", 0),
                                      lambda params, tree: oracle.peft_model(case, params, tree))
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(batch["tokens"]).long()).logits.numpy()
        without = model.base_model.model  # the adapter must matter for this test to say anything
        with model.disable_adapter():
            base = without(input_ids=torch.from_numpy(batch["tokens"]).long()).logits.numpy()
    assert relative_error(base, expected) > 0.1
    assert relative_error(logits(content, params, spec, tree, batch["tokens"]), expected) <= LOGITS

    oracle.torch_loss(model, batch).backward()
    wanted = {name: parameter.grad.numpy() for name, parameter in oracle.peft_parameters(model).items()}
    assert wanted.keys() == oracle.by_name(case, tree).keys()  # PEFT attached to the same modules
    for experts in ("device", "host"):
        rest, store = split(params, experts)
        transformer = Transformer(ModelConfig.from_json(content), lora=spec, store=store)

        @jax.jit
        def gradients(tree, params, batch, transformer=transformer):
            def loss(tree):
                total, count = step.batch_loss(transformer, unembed, 20, tree, params, batch)
                return total / count
            return jax.grad(loss)(tree)

        grads = oracle.by_name(case, gradients(tree, rest, batch))
        errors = {name: relative_error(grads[name], wanted[name]) for name in wanted}
        assert max(errors.values()) <= GRADIENTS, (experts, max(errors.items(), key=lambda item: item[1]))
        if store is not None:
            store.close()


@pytest.mark.parametrize("case", LORA)
def test_our_attention_adapter_needs_no_workaround(case, peft, tmp_path):
    torch = pytest.importorskip("torch")
    content, found = oracle.content(case), oracle.spec_of(case)[1]
    config = ModelConfig.from_json(content)
    spec = lora_targets.resolve(Lora(targets=("attention",), rank=2, alpha=3.0, rank_pattern={"o_proj": 3}), found)
    random = np.random.RandomState(0)
    tree = jax.tree.map(lambda leaf: 0.3 * random.standard_normal(leaf.shape).astype(np.float32),
                        lora.abstract(spec, found))
    adapters.save(tmp_path / "ours", tree, spec, found, base=adapters.Base(str(tmp_path)))

    def attach(params, _):
        return peft.PeftModel.from_pretrained(make_goldens.torch_model(content, params), tmp_path / "ours")
    params, _, batch, model = draw(case, 0, attach)
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(batch["tokens"]).long()).logits.numpy()
    assert relative_error(logits(content, params, spec, tree, batch["tokens"]), expected) <= LOGITS

    model.save_pretrained(tmp_path / "theirs")
    again, theirs = adapters.load(tmp_path / "theirs", linears(config))
    assert again == spec
    jax.tree.map(np.testing.assert_array_equal, theirs, tree)


@pytest.mark.parametrize("case", LORA)
def test_we_read_an_adapter_that_peft_made(case, peft, tmp_path):
    torch = pytest.importorskip("torch")
    content = oracle.content(case)
    found = linears(ModelConfig.from_json(content))
    torch.manual_seed(0)

    def attach(params, _):
        return peft.get_peft_model(make_goldens.torch_model(content, params), peft.LoraConfig(
            r=4, lora_alpha=6, target_modules=r".*self_attn\.(q_proj|q_b_proj|kv_a_proj_with_mqa|o_proj)",
            rank_pattern={r"layers\.[12]\.self_attn\.o_proj": 2}, alpha_pattern={"kv_a_proj_with_mqa": 2},
            use_rslora=True, task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    params, _, batch, model = draw(case, 0, attach)
    model.save_pretrained(tmp_path / "theirs")
    spec, tree = adapters.load(tmp_path / "theirs", found)
    assert spec.get("moe_layers/self_attn/o_proj").rank == 2 and spec.get("dense_layers/self_attn/o_proj").rank == 4
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(batch["tokens"]).long()).logits.numpy()
    assert relative_error(logits(content, params, spec, tree, batch["tokens"]), expected) <= LOGITS


def test_what_the_notes_say_of_peft_is_so(peft, tmp_path):
    content, (spec, found) = oracle.content("v3"), oracle.spec_of("v3")
    tree = oracle.random_lora("v3", 0, 0.3)
    adapters.save(tmp_path / "ours", tree, spec, found, base=adapters.Base(str(tmp_path)))
    params = make_goldens.random_params(ModelConfig.from_json(content), 0)
    model = peft.PeftModel.from_pretrained(make_goldens.torch_model(content, params), tmp_path / "ours")
    (note,) = adapters.notes(spec)
    ours = oracle.by_name("v3", tree)
    kept = {name for name in oracle.peft_parameters(model) if name in ours}
    dropped = {".".join(name.split(".")[3:-1]) for name in ours.keys() - kept}
    assert dropped and all(name in note for name in dropped)
    assert {name for name in ours if ".self_attn." in name} == kept


@functools.cache  # against the goldens and against torch
def kjax_steps(case: str, seed: int, experts: str):
    """Losses, gradient norms and the final adapter of kjax's own train step."""
    content, (spec, _) = oracle.content(case), oracle.spec_of(case)
    config = ModelConfig.from_json(content)
    params, store = split(make_goldens.random_params(config, seed), experts)
    transformer = Transformer(config, lora=spec, store=store, micro_rows=1)
    chosen = optimizer(OPTIMIZER[case], oracle.STEPS)
    train_step = jax.jit(step.train_step(transformer, unembed, chosen, chunk=20, seed=0, dropout=False))
    state = step.initial_state(oracle.random_lora(case, seed, 0.0), chosen)
    losses, norms = [], []
    for batch in oracle.batches(case, seed, oracle.STEPS):
        state, metrics = train_step(state, params, batch)
        losses.append(float(metrics.loss))
        norms.append(float(metrics.grad_norm))
    final = oracle.by_name(case, jax.tree.map(np.asarray, state.lora))
    if store is not None:
        store.close()
    return losses, norms, final


@pytest.mark.parametrize("case, experts", [variant("v2_greedy", "host"), ("v3", "host"), variant("v3", "device")])
def test_ten_steps_equal_goldens(case, experts):
    with np.load(GOLDENS / f"{case}.npz", allow_pickle=False) as golden:
        made, now = (ModelConfig.from_json(c) for c in (json.loads(str(golden["config"])), oracle.content(case)))
        assert made == now, "the goldens are of another model: make them again"
        losses, norms, final = kjax_steps(case, int(golden["seed"]), experts)
        clip = OPTIMIZER[case].clip_norm
        assert golden["losses"][-1] < 0.8 * golden["losses"][0] and golden["norms"].min() < clip < golden["norms"].max()
        np.testing.assert_allclose(losses, golden["losses"], rtol=STEPS)
        np.testing.assert_allclose(norms, golden["norms"], rtol=STEPS)
        assert sorted(final) == golden["names"].tolist()
        lengths = [np.linalg.norm(final[name]) for name in sorted(final)]
        np.testing.assert_allclose(lengths, golden["lengths"], rtol=STEPS)


@pytest.mark.parametrize("case", LORA)
def test_ten_steps_equal_torch(case, peft, request):
    seed = request.config.getoption("--seed", 0)
    if not seed:  # the golden's own draw is known to be clear of ties
        with np.load(GOLDENS / f"{case}.npz", allow_pickle=False) as golden:
            seed = int(golden["seed"])
        params = make_goldens.random_params(ModelConfig.from_json(oracle.content(case)), seed)
        model = oracle.peft_model(case, params, oracle.random_lora(case, seed, 0.0))
        expected, expected_norms = oracle.torch_steps(case, model, oracle.batches(case, seed, oracle.STEPS))
    else:
        seed, model, expected, expected_norms = oracle.draw_steps(case, seed)
    losses, norms, final = kjax_steps(case, seed, "host")
    np.testing.assert_allclose(losses, expected, rtol=STEPS)
    np.testing.assert_allclose(norms, expected_norms, rtol=STEPS)
    for name, parameter in oracle.peft_parameters(model).items():
        there = parameter.detach().numpy()
        assert np.linalg.norm(final[name] - there) <= STEPS * np.linalg.norm(there), name
