"""Plans of published models against their real tensor lists, and what a plan says where a run does not fit."""

import gzip
import json
import math
import re
import types

import pytest

from kjax import gin_config, plan
from kjax.errors import CheckpointError
from kjax.planning import advice
from kjax.planning.report import Row
from kjax.quantize import IGNORED, SCHEMES
from kjax.startup import CONTEXT

ITEMSIZE = {"F8_E4M3": 1, "BF16": 2, "F32": 4, "F16": 2}
TINY = {
    "model_type": "deepseek_v3", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 3, "num_attention_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 16, "first_k_dense_replace": 1, "moe_intermediate_size": 32,
    "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
    "max_position_embeddings": 512, "rope_theta": 10000.0, "torch_dtype": "float32"}


def settings(path, *bindings):
    common = [f"Model.directory={str(path)!r}", "Model.storage='mapped'", "Data.max_length=512",
              "Train.micro_rows=4"]
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
    assert amounts(made.cache)["routed experts"] == routed
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
    parameters, cache = amounts(made.parameters), amounts(made.cache)
    # The reference figures are rounded to three decimals, those of the experts to four digits.
    assert parameters["total"] / 1e9 == pytest.approx(total, abs=6e-4)
    assert parameters["outside the routed experts"] / 1e9 == pytest.approx(outside, abs=6e-4)
    assert cache["routed experts"] / 1e9 == pytest.approx(experts_gb, rel=5e-4)
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
    # All experts are met.
    assert work["expert bytes read"] == pytest.approx(2 * amounts(made.cache)["routed experts"], rel=1e-6)
    # Attention, shared experts and head do 2 operations per weight and token; forward, recompute and backward to the
    # activations make three, the checkpointed attention four, and the scores come on top.
    active = amounts(made.parameters)["outside the routed experts"] - 129280 * width
    assert 6 * active * tokens < work["device operations"] < 10 * active * tokens


def test_an_expert_read_once_per_direction_only_if_met(shared_data):
    path = shared_data / "configs" / "deepseek_v2_lite.json"
    made = plan.plan(settings(path, "Train.rows_per_step=1", "Train.micro_rows=1", "Data.max_length=2"),
                     plan.Machine(int(1e12), None, 0.75))
    share = 1 - (1 - 6 / 64) ** 2
    assert amounts(made.work)["expert bytes read"] == pytest.approx(2 * share * amounts(made.cache)["routed experts"])


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


def knob(problem):
    """The change that a problem names, as gin bindings."""
    assert "It fits with" in problem, problem
    return [binding.replace(" = ", "=") for binding in problem.split("It fits with ")[1].split(", ")]


def test_what_does_not_fit_on_the_device_names_a_true_knob(tiny):
    config = settings(tiny, "Train.rows_per_step=4", "Train.micro_rows=4")
    roomy = plan.plan(config, plan.Machine(int(64e9), int(64e9), 0.75))
    assert roomy.fits
    arrays = int(sum(row.amount for row in roomy.device)) - CONTEXT

    tight = plan.plan(config, plan.Machine(int(64e9), int(64e9), 0.9 * arrays / 64e9))
    assert tight.problems[0].endswith("It fits with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 in the environment")
    on = plan.Machine(int(64e9), int(0.8 * arrays) + CONTEXT, 1.0)
    changes = knob(plan.plan(config, on).problems[0])
    assert plan.plan(settings(tiny, "Train.rows_per_step=4", "Train.micro_rows=4", *changes), on).fits
    hopeless = plan.plan(config, plan.Machine(int(64e9), int(0.01 * arrays) + CONTEXT, 0.75))
    assert "use a GPU with more memory" in hopeless.problems[0]


@pytest.mark.parametrize("host, device, says", [
    (500, 48, r"It fits the device with Model.weights = '8bit'\. It fits main memory .*INT4 experts take 367.9 GB"),
    (300, 48, r"It fits the device with Model.weights = '8bit'\. No setting makes it fit main memory: use a machine"),
    (500, 4, r"No setting makes it fit the device: use a GPU .*\. It fits main memory .*INT4 experts .*, and "
             r"Model.stash_gb = 122$"),
    (800, 4, r"No setting makes it fit the device: use a GPU .*\. It fits main memory with Model.stash_gb = 136$"),
    (680, 80, r"It fits with Model.stash_gb = 16$"),
    (660, 80, r"fits main memory with .* INT4 experts take 367.9 GB .* makes one\)$"),
    (400, 48, r"It fits the device with Model.weights = '8bit'\. It fits main memory with .* makes one\), and "
              r"Model.stash_gb = 17$"),
    (381, 48, r"It fits the device with Model.weights = '8bit'\. No setting makes it fit main memory: use a machine"),
    (390, 80, r"would be read from disk .* INT4 experts take 367.9 GB .* makes one\), and Model.stash_gb = 12$"),
    (378, 80, r"fits main memory with .* INT4 experts take 367.9 GB .* makes one\), and Model.stash_gb = 0.0$"),
    (900, 4, r"needed, .* for JAX\. No setting makes it fit the device: use a GPU with more memory$"),
])  # fmt: skip
def test_each_memory_has_its_own_way_out(host, device, says):
    """Made-up needs: 654 GB of experts, a stash as set, device memory that depends on the form of the other weights
    alone, and 5 GB of main memory where they have few bits."""
    def replan(config, on, form):
        experts = 367.9e9 if form else 654e9
        sizes = types.SimpleNamespace(experts=experts, hosted=True, proposed=lambda left: max(0, int(left / 1e9)))
        needed = {"full": 60e9, "8bit": 30e9, "nf4": 20e9}[config.model.weights]
        kept = 150e9 if config.model.stash_gb is None else config.model.stash_gb * 1e9
        other = 10e9 if config.model.weights == "full" else 15e9
        return (sizes, [Row("stash", kept), Row("all else", other)], [Row("routed experts", experts)],
                [Row("weights", needed)])

    found, = advice.problems(settings("config.json"), plan.Machine(int(host * 1e9), int(device * 1e9), 0.9), replan)
    assert re.search(says, found), found


def test_what_does_not_fit_in_main_memory_names_a_true_knob(tiny, shared_data):
    full = plan.plan(settings(shared_data / "configs" / "deepseek_r1.json", "Train.micro_rows=1"),
                     plan.Machine(int(500e9), int(80e9), 0.75))
    assert re.search(r"the experts take 654.1 GB .* would be read from disk in each step. It fits main memory "
                     r"with a checkpoint of fewer bits: INT4 experts take 367.8 GB .`kjax quantize --format int4`",
                     full.problems[0])
    on = plan.Machine(int(1.6e9), int(80e9), 0.75)
    many = ("Model.stash_gb=4", "Train.rows_per_step=1024")
    changes = knob(plan.plan(settings(tiny, *many), on).problems[0])
    assert changes == ["Model.stash_gb=0.0"] and plan.plan(settings(tiny, *many, *changes), on).fits
    assert "more memory" in plan.plan(settings(tiny), plan.Machine(int(1e9), int(80e9), 0.75)).problems[0]


def test_experts_of_four_bits_and_a_smaller_stash_together(tmp_path, shared_data):
    content = json.loads((shared_data / "configs" / "deepseek_r1.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content))
    on = plan.Machine(int(512e9), int(1e12), 0.75)
    many = ("Train.rows_per_step=64", "Train.micro_rows=1", "Data.max_length=2048", "Model.stash_gb=150")
    problem, = plan.plan(settings(tmp_path, *many), on).problems
    assert problem.endswith("INT4 experts take 367.8 GB (`kjax quantize --format int4` makes one), and "
                            "Model.stash_gb = 118"), problem
    (tmp_path / "config.json").write_text(json.dumps(
        content | {"quantization_config": SCHEMES["int4"].config(IGNORED)}))
    assert not plan.plan(settings(tmp_path, *many), on).fits
    assert plan.plan(settings(tmp_path, *many, "Model.stash_gb=118"), on).fits


def test_a_smaller_stash_has_a_price(tiny):
    speeds = {"host_peak": 1e12, "host_bandwidth": 1e11, "device_peak": 1e13, "device_bandwidth": 1e12, "pcie": 1e10}
    many = ("Train.rows_per_step=1024",)
    need = 2 * 32 * 1024 * 512 * 2 * 4 * 2  # gate and up, F, tokens, routes, fp32, layers
    roomy = plan.plan(settings(tiny, *many), plan.Machine(int(64e9), int(64e9), 0.75, **speeds))
    assert amounts(roomy.host)["stash"] == need
    operations = 6 * 64 * 32 * 1024 * 512 * 2 * 2
    costs = {row.name: row.note for row in roomy.stash}
    assert costs["none"].startswith(f"{operations * 2 / 3 / 1e12:,.4g} T operations more in a step, ")
    assert costs["half"].startswith(f"{operations / 3 / 1e12:,.4g} T operations more in a step, ")
    tight = plan.plan(settings(tiny, *many, "Model.stash_gb=0.1"), plan.Machine(int(64e9), int(64e9), 0.75, **speeds))
    assert tight.fits and amounts(tight.host)["stash"] == int(1e8)
    assert amounts(tight.time)["experts, again"] > 0 and amounts(tight.work)["host operations again"] > 0


def test_experts_are_memory_of_the_process_where_they_are_copied(shared_data):
    path = shared_data / "configs" / "deepseek_v2_lite.json"

    def tables(host_gb, *bindings):
        made = plan.plan(settings(path, *bindings), plan.Machine(int(host_gb * 1e9), int(80e9)))
        return amounts(made.host), amounts(made.cache)
    for host_gb, bindings in ((200, ["Model.storage='auto'"]), (40, ["Model.storage='resident'"])):
        host, cache = tables(host_gb, *bindings)
        assert host["routed experts"] > 28e9 and not cache
    host, cache = tables(34, "Model.storage='auto'")  # more than four fifths of it
    assert cache["routed experts"] > 28e9 and "routed experts" not in host


def test_adapters_of_experts_are_sixteen_bytes_a_number_on_the_host(shared_data):
    path = shared_data / "configs" / "deepseek_v2_lite.json"
    made = plan.plan(settings(path, "Lora.targets=('attention', 'experts')"), plan.Machine(int(2e11), int(80e9)))
    numbers = 26 * 64 * 3 * 8 * (2048 + 1408)  # layers, experts, projections, rank, widths
    assert amounts(made.host)["expert adapters"] == 16 * numbers
    without = plan.plan(settings(path), plan.Machine(int(2e11), int(80e9)))
    device, expected = amounts(made.device), amounts(without.device)
    expected["working set"] += 4 * 26  # a number for each layer through which JAX sees their gradients
    assert device == expected
    assert amounts(made.disk)["adapter"] == amounts(without.disk)["adapter"] + 4 * numbers


def test_adapters_of_experts_on_the_device_are_part_of_it(tiny):
    on = plan.Machine(int(64e9), int(64e9), 0.75)
    targets, there = "Lora.targets=('attention', 'experts')", "Lora.experts_home='device'"
    numbers = 2 * 8 * 3 * 8 * (64 + 32)
    made, host = plan.plan(settings(tiny, targets, there), on), plan.plan(settings(tiny, targets), on)
    state = "adapter and optimiser"
    assert amounts(made.device)[state] == amounts(host.device)[state] + 12 * numbers
    assert "expert adapters" not in amounts(made.host)
    # On the CPU they are operands of the kernels unless the setting says otherwise.
    cpu = plan.plan(settings(tiny, targets), plan.Machine(int(64e9), None))
    assert amounts(cpu.device)[state] == amounts(made.device)[state] and "expert adapters" not in amounts(cpu.host)
    kept = sum(row.amount for row in made.device) - 4 * numbers
    tight = plan.plan(settings(tiny, targets, there), plan.Machine(int(64e9), int(kept), 1.0))
    assert knob(tight.problems[0]) == ["Lora.experts_home='host'"]


def test_the_cheapest_knobs_come_first(tiny):
    """Precision is given up before rows or their length, and nothing is changed without need."""
    (tiny / "config.json").write_text(json.dumps(TINY | {"vocab_size": 4096}))
    many = ("Train.rows_per_step=8", "Train.micro_rows=8", "Model.stash_gb=0.0")
    small = plan.plan(settings(tiny, *many, "Train.micro_rows=1", "Train.loss_chunk=256", "Model.weights='8bit'"),
                      plan.Machine(int(64e9), int(64e9)))
    needed = sum(row.amount for row in small.device)
    changes = knob(plan.plan(settings(tiny, *many), plan.Machine(int(64e9), int(needed), 1.0)).problems[0])
    assert changes == ["Train.micro_rows=1", "Train.loss_chunk=256", "Model.weights='8bit'"]


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
    assert all(row.name in printed for row in (*made.host, *made.cache, *made.device, *made.work, *made.disk))
    assert "--machine here" in printed


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
