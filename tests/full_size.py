"""Full-size models of which no tensor list is at hand: config.json and a list made from the published shapes.

The names are written out here once more, not taken from kjax.
"""

import math

import numpy as np
from quantised_cases import CHANNEL, FP8, INT4

_COMMON = {"hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False}
_MLA = _COMMON | {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
_YARN = {"type": "yarn", "factor": 64.0, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0}
_KIMI = _MLA | {
    "model_type": "kimi_k2", "vocab_size": 163840, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_hidden_layers": 61, "first_k_dense_replace": 1, "num_attention_heads": 64,
    "q_lora_rank": 1536, "n_routed_experts": 384, "n_shared_experts": 1, "num_experts_per_tok": 8,
    "norm_topk_prob": True, "routed_scaling_factor": 2.827, "rope_theta": 50000.0, "rope_scaling": _YARN,
    "max_position_embeddings": 262144, "quantization_config": INT4}  # fmt: skip
_GLM = _COMMON | {
    "model_type": "glm4_moe", "attention_bias": True, "vocab_size": 151552, "num_attention_heads": 96,
    "num_key_value_heads": 8, "head_dim": 128, "partial_rotary_factor": 0.5, "rope_theta": 1e6, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "norm_topk_prob": True, "max_position_embeddings": 131072}  # fmt: skip
CONFIGS = {
    "kimi-k2-thinking": _KIMI,
    "kimi-k2.5": {"model_type": "kimi_k25", "text_config": _KIMI, "vision_config": {}},
    "deepseek-v3.2": _MLA | {
        "model_type": "deepseek_v32", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "num_hidden_layers": 61, "first_k_dense_replace": 3, "num_attention_heads": 128,
        "q_lora_rank": 1536, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8,
        "topk_group": 4, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "rope_theta": 10000.0,
        "rope_scaling": _YARN | {"factor": 40.0}, "max_position_embeddings": 163840, "index_topk": 2048,
        "quantization_config": FP8 | {"scale_fmt": "ue8m0"}},
    "glm-4.5": _GLM | {
        "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 92,
        "first_k_dense_replace": 3, "n_routed_experts": 160, "routed_scaling_factor": 2.5, "use_qk_norm": True},
    "glm-4.5-air-fp8": _GLM | {
        "hidden_size": 4096, "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 46,
        "first_k_dense_replace": 1, "n_routed_experts": 128, "use_qk_norm": False, "quantization_config": CHANNEL},
    "glm-4.7-flash": _MLA | {
        "model_type": "glm4_moe_lite", "vocab_size": 154880, "hidden_size": 2048, "intermediate_size": 10240,
        "moe_intermediate_size": 1536, "num_hidden_layers": 47, "first_k_dense_replace": 1, "num_attention_heads": 20,
        "q_lora_rank": 768, "qk_nope_head_dim": 192, "v_head_dim": 256, "n_routed_experts": 64, "n_shared_experts": 1,
        "num_experts_per_tok": 4, "norm_topk_prob": True, "routed_scaling_factor": 1.8, "rope_theta": 1e6,
        "max_position_embeddings": 202752},
    "qwen3-235b": _COMMON | {
        "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
        "moe_intermediate_size": 1536, "num_hidden_layers": 94, "num_attention_heads": 64, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "rope_theta": 1e6,
        "max_position_embeddings": 40960, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "deepseek-v2-lite": _MLA | {
        "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944,
        "moe_intermediate_size": 1408, "num_hidden_layers": 27, "first_k_dense_replace": 1, "num_attention_heads": 16,
        "q_lora_rank": None, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
        "topk_method": "greedy", "norm_topk_prob": False, "rope_theta": 10000.0, "max_position_embeddings": 163840},
}  # fmt: skip
MTP = {"deepseek-v3.2", "glm-4.5", "glm-4.5-air-fp8", "glm-4.7-flash"}  # one more layer in the file


def shapes(model: str) -> dict[str, list[int]]:
    """name -> shape of every weight, before quantisation."""
    c = CONFIGS[model].get("text_config", CONFIGS[model])
    d, heads, made = c["hidden_size"], c["num_attention_heads"], {}

    def swiglu(prefix, width):
        made.update({f"{prefix}.gate_proj.weight": [width, d], f"{prefix}.up_proj.weight": [width, d],
                     f"{prefix}.down_proj.weight": [d, width]})

    made |= {"model.embed_tokens.weight": [c["vocab_size"], d], "model.norm.weight": [d],
             "lm_head.weight": [c["vocab_size"], d]}
    for number in range(c["num_hidden_layers"] + (model in MTP)):
        layer = f"model.layers.{number}"
        attn = f"{layer}.self_attn"
        made |= {f"{layer}.input_layernorm.weight": [d], f"{layer}.post_attention_layernorm.weight": [d]}
        if "kv_lora_rank" in c:
            nope, rope, v = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
            if c["q_lora_rank"] is None:
                made[f"{attn}.q_proj.weight"] = [heads * (nope + rope), d]
            else:
                made |= {f"{attn}.q_a_proj.weight": [c["q_lora_rank"], d],
                         f"{attn}.q_a_layernorm.weight": [c["q_lora_rank"]],
                         f"{attn}.q_b_proj.weight": [heads * (nope + rope), c["q_lora_rank"]]}
            made |= {f"{attn}.kv_a_proj_with_mqa.weight": [c["kv_lora_rank"] + rope, d],
                     f"{attn}.kv_a_layernorm.weight": [c["kv_lora_rank"]],
                     f"{attn}.kv_b_proj.weight": [heads * (nope + v), c["kv_lora_rank"]],
                     f"{attn}.o_proj.weight": [d, heads * v]}
            if model == "deepseek-v3.2":
                made |= {f"{attn}.indexer.wq_b.weight": [8192, 1536], f"{attn}.indexer.wk.weight": [128, d],
                         f"{attn}.indexer.weights_proj.weight": [64, d], f"{attn}.indexer.k_norm.weight": [128],
                         f"{attn}.indexer.k_norm.bias": [128]}
        else:
            for name, count in (("q", heads), ("k", c["num_key_value_heads"]), ("v", c["num_key_value_heads"])):
                made[f"{attn}.{name}_proj.weight"] = [count * c["head_dim"], d]
                if c["attention_bias"]:
                    made[f"{attn}.{name}_proj.bias"] = [count * c["head_dim"]]
            made[f"{attn}.o_proj.weight"] = [d, heads * c["head_dim"]]
            if c.get("use_qk_norm", c["model_type"] == "qwen3_moe"):
                made |= {f"{attn}.q_norm.weight": [c["head_dim"]], f"{attn}.k_norm.weight": [c["head_dim"]]}
        if number < c.get("first_k_dense_replace", 0):
            swiglu(f"{layer}.mlp", c["intermediate_size"])
            continue
        experts = c.get("n_routed_experts", c.get("num_experts"))
        made[f"{layer}.mlp.gate.weight"] = [experts, d]
        if c["model_type"] not in ("qwen3_moe", "deepseek_v2"):
            made[f"{layer}.mlp.gate.e_score_correction_bias"] = [experts]
        for expert in range(experts):
            swiglu(f"{layer}.mlp.experts.{expert}", c["moe_intermediate_size"])
        if "n_shared_experts" in c:
            swiglu(f"{layer}.mlp.shared_experts", c["n_shared_experts"] * c["moe_intermediate_size"])
        if number == c["num_hidden_layers"]:
            made |= {f"{layer}.enorm.weight": [d], f"{layer}.hnorm.weight": [d], f"{layer}.eh_proj.weight": [d, 2 * d],
                     f"{layer}.shared_head.norm.weight": [d], f"{layer}.embed_tokens.weight": [c["vocab_size"], d],
                     f"{layer}.shared_head.head.weight": [c["vocab_size"], d]}
    return made


def tensors(model: str) -> dict:
    """What hollow.write takes: the weights as they are stored, and what else the files hold."""
    c = CONFIGS[model]
    prefix, made = "language_model." if "text_config" in c else "", {}
    quantised = c.get("text_config", c).get("quantization_config")
    for name, shape in shapes(model).items():
        routed, linear, name = ".experts." in name, "_proj.weight" in name or ".indexer.w" in name, prefix + name
        if quantised is INT4 and routed:
            out, in_ = shape
            made |= {f"{name}_packed": (["I32", [out, in_ // 8]]), f"{name}_scale": ["BF16", [out, in_ // 32]],
                     f"{name}_shape": ["I32", [2], np.array(shape, "<i4").tobytes()]}
        elif quantised not in (None, INT4) and linear and "weights_proj" not in name and "eh_proj" not in name:
            blocks = [shape[0], 1] if quantised is CHANNEL else [math.ceil(size / 128) for size in shape]
            made |= {name: ["F8_E4M3", shape],
                     name + ("_scale" if quantised is CHANNEL else "_scale_inv"): ["F32", blocks]}
        else:
            made[name] = ["F32" if name.endswith("e_score_correction_bias") else "BF16", shape]
    if prefix:
        made |= {"vision_tower.encoder.blocks.0.wqkv.weight": ["BF16", [3456, 1152]],
                 "vision_tower.patch_embed.pos_emb.weight": ["BF16", [64, 64, 1152]],
                 "mm_projector.proj.0.weight": ["BF16", [4608, 4608]]}
    keys = ("dtype", "shape", "data")
    return {name: {"file": f"model-{i // 20000}.safetensors"} | dict(zip(keys, entry, strict=False))
            for i, (name, entry) in enumerate(made.items())}
