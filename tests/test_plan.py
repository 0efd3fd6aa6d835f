"""Plans of published models against their real tensor lists, and what a plan says where a run does not fit."""

import gzip
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kjax import gin_config, liveness, plan
from kjax.errors import CheckpointError, ConfigError

ITEMSIZE = {"F8_E4M3": 1, "BF16": 2, "F32": 4, "F16": 2}
TINY = {
    "model_type": "deepseek_v3", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 3, "num_attention_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 16, "first_k_dense_replace": 1, "moe_intermediate_size": 32,
    "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
    "max_position_embeddings": 512, "rope_theta": 10000.0, "torch_dtype": "float32"}


def settings(path, *bindings):
    common = [f"Model.directory={str(path)!r}", "Data.max_length=512", "Train.micro_rows=4"]
    return gin_config.load((), [*common, *bindings],
                           fallback={"Data.dataset": "x", "Train.run_dir": "x"})


@pytest.fixture
def tiny(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return tmp_path


def amounts(rows):
    return {row.name: row.amount for row in rows}


@pytest.mark.parametrize("config, tensors", [("deepseek_r1", "r1map"), ("kimi_k2_instruct_0711", "k2map")])
def test_bytes_are_those_of_the_published_files(shared_data, config, tensors):
    listed = json.loads(gzip.decompress((shared_data / "tensor_maps" / f"{tensors}.json.gz").read_bytes()))
    sizes = {name: math.prod(entry["shape"]) * ITEMSIZE[entry["dtype"]] for name, entry in listed.items()
             if not name.startswith("model.layers.61.") and not name.endswith("rotary_emb.inv_freq")}
    made = plan.plan(settings(shared_data / "configs" / f"{config}.json"), plan.Machine(int(2e12), None, 0.75))
    routed = sum(size for name, size in sizes.items() if ".mlp.experts." in name)
    assert amounts(made.host)["routed experts"] == routed
    assert amounts(made.disk)["checkpoint of the base"] == sum(sizes.values())
    weights = sum(math.prod(listed[name]["shape"]) for name in sizes if not name.endswith("_scale_inv"))
    assert amounts(made.parameters)["total"] == weights
    assert made.fits


# Totals and routed experts of the published models, in numbers (G): computed from their shapes by hand and by others.
@pytest.mark.parametrize("config, total, outside, experts_gb", [
    ("deepseek_v2_lite", 15.706, 1.312, 28.79), ("deepseek_v2_5_236b", 235.741, 13.024, 445.4),
    ("moonlight_16b_a3b_instruct", 15.960, 1.565, 28.79), ("kimi_k2_5_text_config", 1026.408, 11.722, 570.8),
    ("kimi_k2_thinking_reconstructed", 1026.408, 11.722, 570.8)])
def test_every_config_plans(shared_data, config, total, outside, experts_gb):
    made = plan.plan(settings(shared_data / "configs" / f"{config}.json"), plan.Machine(int(2e12), int(80e9), 0.75))
    parameters, host = amounts(made.parameters), amounts(made.host)
    # The reference figures are rounded to three decimals, those of the experts to four digits.
    assert parameters["total"] / 1e9 == pytest.approx(total, abs=6e-4)
    assert parameters["outside the routed experts"] / 1e9 == pytest.approx(outside, abs=6e-4)
    assert host["routed experts"] / 1e9 == pytest.approx(experts_gb, rel=5e-4)
    # Everything outside the experts is bf16 on the device, the router fp32.
    router = parameters["router"]
    assert amounts(made.device)["weights"] == 2 * parameters["outside the routed experts"] + 2 * router


def test_numbers_of_a_deepseek_v3_step(shared_data):
    path = shared_data / "configs" / "deepseek_r1.json"
    made = plan.plan(settings(path, "Model.stash_gb=40"), plan.Machine(int(1e12), int(80e9), 0.75))
    host, device, work = amounts(made.host), amounts(made.device), amounts(made.work)
    tokens, layers, width, hidden, top = 16 * 512, 58, 7168, 2048, 8
    assert host["stash"] == 2 * hidden * tokens * top * 2 * layers  # two bf16 activations of every route
    saved = 61 * tokens * width * 2 + layers * tokens * top * 4 + layers * 4  # layer inputs, idx and the slips
    assert device["saved for the backward pass"] == saved
    assert device["adapter and optimiser"] == made.trainable.rows[-1].parameters * 12 + 12  # two counters, the step
    assert work["host operations"] == 2 * 2 * 3 * width * hidden * tokens * top * layers
    assert work["tokens per expert"] == 256
    assert work["expert bytes read"] == pytest.approx(2 * host["routed experts"], rel=1e-6)  # all experts are met
    # Attention, shared experts and head do 2 operations per weight and token; forward, recompute and backward to the
    # activations make three, the checkpointed attention four, and the scores come on top.
    active = amounts(made.parameters)["outside the routed experts"] - 129280 * width
    assert 6 * active * tokens < work["device operations"] < 10 * active * tokens


def test_an_expert_read_once_per_direction_only_if_met(shared_data):
    path = shared_data / "configs" / "deepseek_v2_lite.json"
    made = plan.plan(settings(path, "Train.rows_per_step=1", "Train.micro_rows=1", "Data.max_length=2"),
                     plan.Machine(int(1e12), None, 0.75))
    share = 1 - (1 - 6 / 64) ** 2
    assert amounts(made.work)["expert bytes read"] == pytest.approx(2 * share * amounts(made.host)["routed experts"])


def test_settings_move_the_plan(tiny):
    on = plan.Machine(int(8e9), int(8e9), 0.75)

    def device(*bindings):
        return amounts(plan.plan(settings(tiny, *bindings), on).device)

    base, other = device(), device("Lora.rank=16", "Model.dtype=float32", "Train.micro_rows=1")
    assert other["adapter and optimiser"] > 1.9 * base["adapter and optimiser"]
    assert other["saved for the backward pass"] > 1.5 * base["saved for the backward pass"]
    assert other["working set"] < base["working set"]
    more = device("Train.rows_per_step=32", "Model.experts=device")
    assert more["saved for the backward pass"] > 1.9 * base["saved for the backward pass"]
    assert more["weights"] > base["weights"]


def test_what_does_not_fit_names_the_knob(tiny):
    config = settings(tiny, "Train.rows_per_step=2", "Train.micro_rows=2")
    roomy = plan.plan(config, plan.Machine(int(64e9), int(64e9), 0.75))
    assert roomy.fits
    need = int(sum(row.amount for row in roomy.device))

    tight = plan.plan(config, plan.Machine(int(64e9), int(need / 0.9), 0.75))
    assert re.search(r"Set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95", tight.problems[0])
    tighter = plan.plan(config, plan.Machine(int(64e9), int(need - 3e6), 1.0))
    assert "It fits with Train.micro_rows = 1" in tighter.problems[0]
    changed = settings(tiny, "Train.rows_per_step=2", "Train.micro_rows=1")
    assert plan.plan(changed, plan.Machine(int(64e9), int(need - 3e6), 1.0)).fits  # the advice is true
    hopeless = plan.plan(config, plan.Machine(int(64e9), int(1e9), 0.75))
    assert "shorten Data.max_length" in hopeless.problems[0]


def test_what_does_not_fit_in_main_memory(tiny, shared_data):
    full = plan.plan(settings(shared_data / "configs" / "deepseek_r1.json"), plan.Machine(int(500e9), int(80e9), 0.75))
    assert re.search(r"the experts take 654.1 GB .* read from disk, 1.3 TB per step. Use a checkpoint in fewer bits "
                     r"\(INT4 experts take about 367.8 GB\)", full.problems[0])
    stash = plan.plan(settings(tiny, "Model.stash_gb=4", "Train.rows_per_step=1024"),
                      plan.Machine(int(1.9e9), int(80e9), 0.75))
    assert "Set Model.stash_gb to 0" in stash.problems[0]
    assert not plan.plan(settings(tiny), plan.Machine(int(1e9), int(80e9), 0.75)).fits


def test_a_small_stash_costs_recomputation(tiny):
    on = plan.Machine(int(64e9), int(64e9), 0.75)
    row = next(row for row in plan.plan(settings(tiny, "Model.stash_gb=0.0"), on).host if row.name == "stash")
    assert row.amount == 0 and "100% of routes" in row.note


def test_json_and_print(tiny, capsys):
    made = plan.plan(settings(tiny), plan.Machine(int(64e9), None, 0.75))
    facts = json.loads(json.dumps(made.as_dict()))
    assert facts["fits"] and facts["host"]["device part"] == sum(facts["device"].values())
    made.print()
    printed = capsys.readouterr().out
    assert all(row.name in printed for row in (*made.host, *made.device, *made.work, *made.disk))


@pytest.mark.parametrize("changes, message", [
    ({"quantization_config": {"quant_method": "gptq"}}, "quant_method = 'gptq': not understood"),
    ({"torch_dtype": "int8"}, "dtype = 'int8'"),
    ({"model_type": "mamba"}, "model_type = 'mamba'"),
    ({"num_experts_per_tok": 9}, "num_experts_per_tok = 9"),
])
def test_configs_that_cannot_be_planned(tmp_path, changes, message):
    (tmp_path / "config.json").write_text(json.dumps(TINY | changes))
    with pytest.raises(CheckpointError, match=message):
        plan.plan(settings(tmp_path), plan.Machine(int(64e9), None, 0.75))


def test_machine(monkeypatch):
    assert plan.machine(host_gb=2, device_gb=1) == plan.Machine(int(2e9), int(1e9), 0.75)
    monkeypatch.setenv(plan.FRACTION, "0.9")
    assert plan.machine(host_gb=2, device_gb=1).usable == int(0.9e9)
    monkeypatch.setenv(plan.FRACTION, "most")
    with pytest.raises(ConfigError, match="XLA_PYTHON_CLIENT_MEM_FRACTION=most"):
        plan.machine()
    monkeypatch.delenv(plan.FRACTION)
    assert plan.machine().host > 0


# Liveness: functions small enough to count by hand. A is a [64,64] fp32 matrix of 16 KiB.

A = jax.ShapeDtypeStruct((64, 64), jnp.float32)
SIZE = 64 * 64 * 4


def temporaries(f, *args, donated=()):
    return liveness.usage(jax.make_jaxpr(f)(*args), donated).temporaries / SIZE


def test_liveness_of_products_and_fused_operations():
    assert temporaries(lambda a: a @ a, A) == 1
    assert temporaries(lambda a: (a @ a) @ a, A) == 2  # the second needs the first
    assert temporaries(lambda a: ((a @ a) @ a) @ a, A) == 2  # the first is gone
    assert temporaries(lambda a: jnp.sum(a * 2 + 1), A) < 0.01  # never exists
    assert temporaries(lambda a: (a * 2 + 1) @ a, A) == 2  # a product reads memory
    assert temporaries(lambda a: (a @ a) + 1, A) == 1  # over the product
    assert temporaries(lambda a: jnp.sum(e := jnp.exp(a)) + jnp.sum(e * a), A) > 1  # too dear to compute twice
    assert temporaries(lambda a: jnp.sum(a.T + 1), A) < 0.01
    heads = jax.ShapeDtypeStruct((8, 8, 64), jnp.float32)  # as large as A; the result is an eighth of it
    assert temporaries(lambda q, k: jnp.einsum("bij,bkj->bik", q, k), heads, heads) == 1 / 8
    assert temporaries(lambda q, k: jnp.einsum("ibj,kbj->bik", q, k), heads, heads) == 1 / 8 + 2  # laid out anew
    assert temporaries(lambda a: (a @ a, a @ a.T)[0], A) == 1  # nobody reads the second
    assert temporaries(lambda a: a + 1, A, donated=[True]) == 0


def test_liveness_of_loops():
    def stacked(a):
        return jax.lax.scan(lambda c, _: (c @ a, c), a, None, length=5)
    assert temporaries(stacked, A) == 5 + 2  # five outputs, the carry and its successor

    def carried(a):
        return jax.lax.scan(lambda c, _: (c @ a, None), a, None, length=5)[0]
    assert temporaries(carried, A) == 2

    def branches(a):
        return jax.lax.cond(a[0, 0] > 0, lambda a: (a @ a) @ a, lambda a: a @ a, a)
    assert temporaries(branches, A) == pytest.approx(2, abs=0.01)


def test_liveness_of_a_rematerialised_layer():
    def loss(w, checkpoint):
        f = lambda x, _: (jnp.tanh(jnp.tanh(x @ w) @ w), None)  # noqa: E731
        return jnp.sum(jax.lax.scan(jax.checkpoint(f) if checkpoint else f, jnp.ones((64, 64)), None, length=8)[0])
    kept, recomputed = (liveness.usage(jax.make_jaxpr(jax.grad(lambda w, on=on: loss(w, on)))(A)) for on in (0, 1))
    assert recomputed.saved == 8 * SIZE  # layer inputs
    assert kept.saved > 2 * recomputed.saved
    assert kept.peak > recomputed.peak


def test_liveness_against_the_compiler():
    def step(params, x):
        def loss(params):
            for w in params:
                x_ = jax.nn.relu(x @ w)
            return jnp.sum(x_ @ params[0])
        grads = jax.grad(loss)(params)
        return [w - 0.1 * g for w, g in zip(params, grads, strict=True)]
    params, x = [jax.ShapeDtypeStruct((256, 256), jnp.float32)] * 4, jax.ShapeDtypeStruct((2048, 256), jnp.float32)
    ours = liveness.usage(jax.make_jaxpr(step)(params, x), [True] * 4)
    memory = jax.jit(step, donate_argnums=0).lower(params, x).compile().memory_analysis()
    theirs = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes \
        - memory.alias_size_in_bytes
    assert ours.arguments == memory.argument_size_in_bytes
    # Within the margin of the plan on either side.
    assert theirs / plan.MARGIN < ours.peak < theirs * plan.MARGIN


def test_operations():
    def f(a):
        return jax.lax.scan(lambda c, _: (jnp.einsum("ij,kj->ik", c, a), None), a, None, length=3)[0]
    assert liveness.operations(jax.make_jaxpr(f)(A)) == 3 * 2 * 64**3
    assert liveness.operations(jax.make_jaxpr(lambda a: jnp.einsum("bij,bjk->bik", a, a))(
        np.ones((2, 3, 3), np.float32))) == 2 * 2 * 27
