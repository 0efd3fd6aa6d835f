"""config.json into ModelConfig: both spellings, the published sizes, and what is refused, with its message."""

import json
import math

import jax
import pytest
from make_goldens import CASES

from kjax.errors import CheckpointError
from kjax.lora import Size
from kjax.models import ModelConfig, abstract_params, linears
from kjax.models.config import Rope, Yarn

V2, V3 = CASES["v2_grouped"], CASES["v3"]


def test_transformers_5_spelling_is_the_same_model():
    rope = V3["rope_scaling"]
    parameters = {key: value for key, value in rope.items() if key != "type"}
    parameters |= {"rope_type": "yarn", "rope_theta": V3["rope_theta"]}
    v5 = {key: value for key, value in V3.items() if key not in ("rope_scaling", "rope_theta", "topk_method",
                                                                 "scoring_func", "moe_layer_freq")}
    assert ModelConfig.from_json(v5 | {"rope_parameters": parameters}) == ModelConfig.from_json(V3)
    plain = ModelConfig.from_json(v5 | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}})
    assert plain.rope == Rope(theta=5e4)


def test_rope_type_may_be_spelled_type():
    renamed = {key.replace("type", "rope_type"): value for key, value in V3["rope_scaling"].items()}
    assert ModelConfig.from_json(V3 | {"rope_scaling": renamed}) == ModelConfig.from_json(V3)
    assert ModelConfig.from_json(V3).rope.yarn == Yarn(40.0, 16, 32.0, 1.0, 1.0, 1.0)


def test_config_is_hashable_and_read_from_file_or_directory(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(V3))
    read = {ModelConfig.from_json(tmp_path), ModelConfig.from_json(tmp_path / "config.json"), ModelConfig.from_json(V3)}
    assert len(read) == 1


def test_kimi_k2_is_its_own_row():
    assert ModelConfig.from_json(V3 | {"model_type": "kimi_k2"}).topk_method == "noaux_tc"


@pytest.mark.parametrize(("name", "parameters"), [
    # The totals of the published models, counted from their tensor lists; no MTP layers.
    ("deepseek_r1", 671_026_419_200), ("kimi_k2_instruct_0711", 1_026_408_232_448),
    ("deepseek_v2_lite", 15_706_484_224),
    ("deepseek_v2_5_236b", 235_741_434_880), ("moonlight_16b_a3b_instruct", 15_960_110_208)])
def test_published_models_have_their_published_size(shared_data, name, parameters):
    config = ModelConfig.from_json(shared_data / "configs" / f"{name}.json")
    tree = abstract_params(config, "bfloat16", experts="device")
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) == parameters


def test_linears_of_deepseek_r1(shared_data):
    found = linears(ModelConfig.from_json(shared_data / "configs" / "deepseek_r1.json"))
    attention = {"q_a_proj": (7168, 1536), "q_b_proj": (1536, 24576), "kv_a_proj_with_mqa": (7168, 576),
                 "kv_b_proj": (512, 32768), "o_proj": (16384, 7168)}
    expected = {f"{stack}/self_attn/{name}": (layers, *size)
                for stack, layers in (("dense_layers", 3), ("moe_layers", 58)) for name, size in attention.items()}
    for stack, width in (("dense_layers/mlp", 18432), ("moe_layers/mlp/shared_experts", 2048)):
        layers = 3 if stack.startswith("dense") else 58
        expected |= {f"{stack}/gate_proj": (layers, 7168, width), f"{stack}/up_proj": (layers, 7168, width),
                     f"{stack}/down_proj": (layers, width, 7168)}
    expected |= {"moe_layers/mlp/experts/gate_proj": (58, 7168, 2048, 256),
                 "moe_layers/mlp/experts/up_proj": (58, 7168, 2048, 256),
                 "moe_layers/mlp/experts/down_proj": (58, 2048, 7168, 256)}
    assert found == {path: Size(*size) for path, size in expected.items()}


def test_host_experts_are_no_parameters_and_the_router_is_fp32():
    config = ModelConfig.from_json(V3)
    mlp = abstract_params(config, "bfloat16")["moe_layers"]["mlp"]
    assert set(mlp) == {"gate", "shared_experts"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(mlp["gate"])} == {"float32"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(mlp["shared_experts"])} == {"bfloat16"}


def test_missing_or_unreadable_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json does not exist: a model directory needs its config\.json"):
        ModelConfig.from_json(tmp_path)
    for text in ("{", "\0", "[" * 100_000, '"\ud800'.encode("utf-16", "surrogatepass").decode("latin1")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json cannot be read as JSON"):
            ModelConfig.from_json(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config\.json holds a list, expected an object"):
        ModelConfig.from_json(tmp_path)


@pytest.mark.parametrize(("base", "change", "message"), [
    (V3, {"model_type": "llama"}, "model_type = 'llama': unknown; kjax knows deepseek_v2, deepseek_v3, "),
    (V3, {"model_type": ["x"]}, r"model_type = \['x'\]: unknown"),
    (V3, {"model_type": None}, "model_type = None: must be given"),
    (V3, {"hidden_size": ...}, "hidden_size: is missing"),
    (V3, {"hidden_size": "48"}, "hidden_size = '48': expected a whole number, at least 1"),
    (V3, {"num_hidden_layers": 2.5}, "num_hidden_layers = 2.5: expected a whole number"),
    (V3, {"vocab_size": True}, "vocab_size = True: expected a whole number"),
    (V3, {"kv_lora_rank": 0}, "kv_lora_rank = 0: expected a whole number, at least 1"),
    (V3, {"vocab_size": 10**12}, "vocab_size = 1000000000000: expected a whole number"),
    (V3, {"routed_scaling_factor": float("nan")}, "routed_scaling_factor = nan: expected a number"),
    (V3, {"rms_norm_eps": 0}, "rms_norm_eps = 0: must be positive"),
    (V3, {"norm_topk_prob": 1}, "norm_topk_prob = 1: expected true or false"),
    (V3, {"num_experts_per_tok": 17}, "num_experts_per_tok = 17: more than n_routed_experts = 16"),
    (V2 | {"topk_method": "greedy"}, {"num_experts_per_tok": 13}, "num_experts_per_tok = 13: more than n_routed"),
    (V3, {"num_experts_per_tok": 9}, "num_experts_per_tok = 9: more than the 8 experts of the topk_group = 2 groups"),
    (V3, {"topk_group": 5}, "topk_group = 5: keeps more groups than n_group = 4"),
    (V2, {"topk_group": 5}, "topk_group = 5: keeps more groups than n_group = 4"),
    (V3, {"n_group": 3}, "n_group = 3: does not divide n_routed_experts = 16"),
    (V3, {"n_group": 16, "topk_group": 8}, "n_group = 16: a group is scored by its two best experts"),
    (V3, {"moe_layer_freq": 2}, "moe_layer_freq = 2: not supported, only 1"),
    (V3, {"hidden_act": "gelu"}, 'hidden_act = \'gelu\': not supported, only "silu"'),
    (V3, {"attention_dropout": 0.1}, "attention_dropout = 0.1: not supported, only 0.0"),
    (V2, {"mlp_bias": True}, "mlp_bias = True: not supported, only false"),
    (V3, {"topk_method": "greedy"}, "topk_method = 'greedy': unknown for this model_type, expected noaux_tc"),
    (V2, {"topk_method": ["greedy"]}, "expected greedy or group_limited_greedy"),
    (V2, {"scoring_func": "sigmoid"}, "scoring_func = 'sigmoid': contradicts topk_method = 'group_limited_greedy'"),
    (V2, {"norm_topk_prob": True}, "norm_topk_prob = True: not supported with topk_method"),
    (V2 | {"topk_method": "greedy"}, {"norm_topk_prob": True}, "norm_topk_prob = True: not supported with topk_method"),
    (V3, {"num_key_value_heads": 2}, "num_key_value_heads = 2: latent attention has as many as num_attention_heads"),
    (V3, {"qk_rope_head_dim": 7}, "qk_rope_head_dim = 7: must be even"),
    (V3, {"rope_theta": ...}, "rope_theta: is missing"),
    (V3, {"rope_scaling": 4}, "rope_scaling = 4: expected an object"),
    (V3, {"rope_scaling": {"type": "longrope"}}, "rope_scaling: type = 'longrope': not supported, only default and"),
    (V3, {"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "original_max_position_embeddings: is missing"),
    (V3, {"rope_parameters": {"rope_theta": 7.0}}, "rope_theta = 10000.0: contradicts rope_parameters, which says 7.0"),
])
def test_contradictions_and_unknown_values_are_refused_by_key(base, change, message):
    content = {key: value for key, value in (base | change).items() if value is not ...}
    with pytest.raises(CheckpointError, match=rf"^config\.json: .*{message}"):
        ModelConfig.from_json(content)
