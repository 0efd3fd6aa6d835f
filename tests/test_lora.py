"""Where adapters attach, how they start and what they cost."""

import math

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from kjax import lora, lora_targets
from kjax.config import Lora
from kjax.errors import ConfigError
from kjax.lora import Adapter, Size

ATTENTION = {"q_a_proj": (64, 24), "q_b_proj": (24, 96), "kv_a_proj_with_mqa": (64, 40), "kv_b_proj": (32, 128),
             "o_proj": (64, 64)}  # fmt: skip
LINEARS = {
    **{f"dense_layers/self_attn/{name}": Size(1, *size) for name, size in ATTENTION.items()},
    **{f"moe_layers/self_attn/{name}": Size(3, *size) for name, size in ATTENTION.items()},
    **{f"dense_layers/mlp/{name}": Size(1, 64, 96) for name in ("gate_proj", "up_proj")},
    "dense_layers/mlp/down_proj": Size(1, 96, 64),
    **{f"moe_layers/mlp/shared_experts/{name}": Size(3, 64, 32) for name in ("gate_proj", "up_proj")},
    "moe_layers/mlp/shared_experts/down_proj": Size(3, 32, 64),
    **{f"moe_layers/mlp/experts/{name}": Size(3, 64, 32, 8) for name in ("gate_proj", "up_proj")},
    "moe_layers/mlp/experts/down_proj": Size(3, 32, 64, 8),
}


def resolve(*targets, **settings):
    return lora_targets.resolve(Lora(targets=targets, **settings), LINEARS)


def message(*targets, **settings) -> str:
    with pytest.raises(ConfigError) as error:
        resolve(*targets, **settings)
    return str(error.value)


@pytest.mark.parametrize("target, expected", [
    ("attention", {path for path in LINEARS if "self_attn" in path}),
    ("shared", {path for path in LINEARS if "shared" in path}),
    ("dense", {path for path in LINEARS if path.startswith("dense_layers/mlp")}),
    ("q_b_proj", {"dense_layers/self_attn/q_b_proj", "moe_layers/self_attn/q_b_proj"}),
    ("experts", {path for path in LINEARS if "/experts/" in path}),
    ("gate_proj", {path for path in LINEARS if path.endswith("/gate_proj")}),
    ("experts.gate_proj", {"moe_layers/mlp/experts/gate_proj"}),
    (r"experts\.\d+\.gate_proj", {"moe_layers/mlp/experts/gate_proj"}),
    (".*experts.*down_proj", {path for path in LINEARS if "experts/down_proj" in path}),
    ("mlp.gate_proj", {"dense_layers/mlp/gate_proj"}),
    ("shared_experts.gate_proj", {"moe_layers/mlp/shared_experts/gate_proj"}),
    (r"self_attn\.kv_.*", {path for path in LINEARS if "/kv_" in path}),
    (r"model\.layers\.0\..*", {path for path in LINEARS if path.startswith("dense")}),
    (r"layers\.[123]\.self_attn\.o_proj", {"moe_layers/self_attn/o_proj"}),
    (r".*mlp\..*", {path for path in LINEARS if "/mlp/" in path}),  # the router among the names is passed over
])
def test_targets(target, expected):
    assert set(resolve(target).paths) == expected


def test_targets_add_up_and_exclude_takes_away():
    paths = set(resolve("attention", "shared", exclude=("kv_b_proj", r"layers\.0\..*")).paths)
    assert paths == {path for path in LINEARS if path.startswith(("moe_layers/self", "moe_layers/mlp/shared"))
                     and not path.endswith("kv_b_proj")}


def test_a_spec_is_hashable_ordered_and_independent_of_the_order_of_targets():
    spec = resolve("shared", "attention")
    assert spec == resolve("attention", "shared") and hash(spec) == hash(resolve("attention", "shared"))
    assert spec.get("moe_layers/self_attn/o_proj") == Adapter(8, 16.0)
    assert spec.get("moe_layers/mlp/gate") is None


@pytest.mark.parametrize("target, says", [
    ("q_b_pro", "Did you mean 'q_b_proj'"),
    ("atention", "Did you mean 'attention'"),
    ("q_proj", "the groups attention, shared, dense, experts and the projections down_proj, gate_proj, kv_a_"),
    ("gate", "the router is never adapted"),
    ("router", "the router is never adapted"),
    (r".*mlp\.gate", "the router is never adapted"),
    (r"experts\.[0-4]\.up_proj", "15 of the 24 experts of moe_layers/mlp/experts/up_proj only"),
    ("lm_head", "the output head is not adapted"),
    ("embed_tokens", "the embedding is not adapted"),
    ("(", "no regular expression"),
    (r"layers\.[12]\.self_attn\.o_proj", "2 of the 3 layers of moe_layers/self_attn/o_proj only"),
])
def test_a_target_that_cannot_be_is_refused(target, says):
    assert says in message(target)
    assert repr(target) in message(target)


def test_a_router_among_the_linears_is_passed_over():
    linears = LINEARS | {"moe_layers/mlp/gate": Size(3, 64, 8)}
    spec = lora_targets.resolve(Lora(targets=(r".*mlp\..*",)), linears)
    assert spec.paths and "moe_layers/mlp/gate" not in spec.paths


def test_a_group_the_model_lacks_names_what_there_is():
    linears = {path: size for path, size in LINEARS.items() if path.startswith("moe_layers")}
    with pytest.raises(ConfigError, match="'dense' matches nothing.*the groups attention, shared, experts and"):
        lora_targets.resolve(Lora(targets=("dense",)), linears)


def test_nothing_left_after_exclusion():
    assert "leaves nothing" in message("attention", exclude=("attention",))


def test_patterns_regex_before_projection_before_group():
    spec = resolve("attention", "shared", rank=2, alpha=4.0,
                   rank_pattern={"attention": 4, "q_b_proj": 6, r"layers\.0\..*_b_proj": 3},
                   alpha_pattern={"shared": 32})
    assert spec.get("moe_layers/self_attn/o_proj").rank == 4
    assert spec.get("moe_layers/self_attn/q_b_proj").rank == 6
    assert spec.get("dense_layers/self_attn/q_b_proj").rank == 3
    assert spec.get("moe_layers/mlp/shared_experts/up_proj") == Adapter(2, 32.0)
    assert spec.get("moe_layers/self_attn/kv_b_proj") == Adapter(4, 4.0)


@pytest.mark.parametrize("pattern, says", [
    ({"shared": 4}, "'shared' selects nothing that is adapted"),
    ({"q_c_proj": 4}, "Did you mean 'q_b_proj'"),
    ({r".*_b_proj": 4, r"self_attn\.q_.*": 5}, "'.*_b_proj' and 'self_attn\\\\.q_.*' give"),
])
def test_patterns_that_cannot_be(pattern, says):
    assert says in message("attention", rank_pattern=pattern)
    assert says in message("attention", alpha_pattern={key: float(value) for key, value in pattern.items()})


def test_patterns_that_agree_are_fine():
    assert resolve("q_b_proj", rank_pattern={r".*_b_proj": 4, r".*q_.*": 4}).entries[0][1].rank == 4


def test_scale():
    assert Adapter(8, 16.0).scale == 2.0
    assert Adapter(16, 16.0, rslora=True).scale == 4.0
    assert resolve("attention", rslora=True, dropout=0.1).entries[0][1] == Adapter(8, 16.0, 0.1, True)


def test_init_is_kaiming_uniform_with_zero_b():
    spec = resolve("attention", "dense", rank=16)
    tree = lora.init(spec, LINEARS, jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), tree) == jax.tree.map(
        lambda x: (x.shape, x.dtype), lora.abstract(spec, LINEARS))
    a, b = tree["moe_layers"]["self_attn"]["q_b_proj"].values()
    assert a.shape == (3, 16, 24) and b.shape == (3, 96, 16) and a.dtype == b.dtype == np.float32
    assert not b.any()
    # U(-1/sqrt(in), 1/sqrt(in)): 1152 draws miss the outer 5 % on both sides with probability 0.95^1152 < 1e-25, and
    # their standard deviation is within 5 standard errors (0.45 / sqrt(1152) of it) of bound / sqrt(3).
    bound = 1 / math.sqrt(24)
    assert 0.95 * bound < abs(a).max() <= bound
    assert abs(a.std() / (bound / math.sqrt(3)) - 1) < 5 * 0.45 / math.sqrt(a.size)
    assert len(np.unique(np.asarray(a))) > a.size // 2  # no layer repeats another


def test_init_of_one_adapter_does_not_depend_on_the_others():
    key = jax.random.key(3)
    few = lora.init(resolve("q_b_proj"), LINEARS, key)["moe_layers"]["self_attn"]["q_b_proj"]["lora_A"]
    many = lora.init(resolve("attention", "shared", "dense"), LINEARS, key)
    np.testing.assert_array_equal(few, many["moe_layers"]["self_attn"]["q_b_proj"]["lora_A"])
    other = lora.init(resolve("q_b_proj"), LINEARS, jax.random.key(4))
    assert (few != other["moe_layers"]["self_attn"]["q_b_proj"]["lora_A"]).any()
    leaves = flatten_dict(jax.tree.map(np.asarray, many), sep="/")
    starts = [a.flat[:4] * a.shape[-1] ** 0.5 for path, a in leaves.items() if path.endswith("lora_A")]
    assert len(np.unique(np.concatenate(starts))) == 4 * len(starts) == 4 * 16


def test_table_counts_what_init_allocates():
    spec = resolve("attention", "shared", rank_pattern={"shared": 4})
    table = lora.table(spec, LINEARS, base_parameters=1_000_000)
    rows = {name: (parameters, size) for name, parameters, size in table}
    tree = lora.init(spec, LINEARS, jax.random.key(0))
    attention = 8 * sum(sum(size) for size in ATTENTION.values()) * 4
    shared = 4 * 3 * (3 * (64 + 32))
    assert rows == {"attention": (attention, 4 * attention), "shared": (shared, 4 * shared),
                    "total": (attention + shared, 4 * (attention + shared))}
    assert lora.count(tree) == attention + shared == lora.count(lora.abstract(spec, LINEARS))
    assert table.training_bytes == 16 * (attention + shared)
    text = str(table)
    assert f"{attention:,}" in text and f"{attention + shared:,}" in text
    assert f"{(attention + shared) / 1_000_000:.4%} of the base's 1,000,000" in text


def test_table_in_rich_and_without_a_base():
    from rich.console import Console

    table = lora.table(resolve("attention"), LINEARS)
    console = Console(width=100, record=True, file=open("/dev/null", "w"))
    console.print(table)
    assert "Trainable parameters" in (text := console.export_text()) and "attention" in text and "total" in text
    assert "of the base" not in str(table)


def test_table_needs_no_memory_at_the_largest_size():
    linears = {"moe_layers/self_attn/o_proj": Size(58, 16384, 7168)}
    table = lora.table(lora_targets.resolve(Lora(targets=("o_proj",), rank=64), linears), linears)
    assert table.rows[-1].parameters == 58 * 64 * (16384 + 7168)
    assert "349.7 MB" in str(table) and "1.4 GB" in str(table)


def test_routed_experts_are_counted_by_expert():
    """Rank 8 on all routed experts of DeepSeek-V3."""
    linears = {f"moe_layers/mlp/experts/{name}": Size(58, *size, 256) for name, size in
               (("gate_proj", (7168, 2048)), ("up_proj", (7168, 2048)), ("down_proj", (2048, 7168)))}
    spec = lora_targets.resolve(Lora(targets=("experts",)), linears)
    table = lora.table(spec, linears)
    assert [tuple(row)[:2] for row in table] == [("experts", 3_284_140_032), ("total", 3_284_140_032)]
    assert lora.count(lora.abstract(spec, linears)) == 3_284_140_032 and "13.1 GB" in str(table)


def test_init_draws_each_expert_by_itself():
    spec = resolve("experts.up_proj", rank=4)
    a, b = lora.init(spec, LINEARS, jax.random.key(0))["moe_layers"]["mlp"]["experts"]["up_proj"].values()
    assert a.shape == (3, 8, 4, 64) and b.shape == (3, 8, 32, 4) and not b.any()
    assert len(np.unique(np.asarray(a).reshape(24, -1)[:, 0])) == 24 and abs(a).max() <= 1 / 8


def test_labels_name_each_leaf():
    spec = resolve("o_proj")
    assert lora.labels(lora.abstract(spec, LINEARS))["moe_layers"]["self_attn"]["o_proj"] == {
        "lora_A": "lora_A", "lora_B": "lora_B"}


def test_module_names_follow_the_hugging_face_numbering():
    assert lora.module_names("dense_layers/mlp/up_proj", LINEARS) == ["model.layers.0.mlp.up_proj"]
    assert lora.module_names("moe_layers/self_attn/o_proj", LINEARS) == [
        f"model.layers.{i}.self_attn.o_proj" for i in (1, 2, 3)]
    names = lora.module_names("moe_layers/mlp/experts/up_proj", LINEARS)
    assert names[:2] == ["model.layers.1.mlp.experts.0.up_proj", "model.layers.1.mlp.experts.1.up_proj"]
    assert len(names) == 24 and names[8] == "model.layers.2.mlp.experts.0.up_proj"
