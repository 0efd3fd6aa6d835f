"""Random tiny configs of every family: what varies between published models, and between draws of a seed."""

import numpy as np

FAMILIES = ("deepseek_v2 greedy", "deepseek_v2 grouped", "deepseek_v3", "moonlight", "deepseek_v32", "kimi_k2",
            "kimi_k25", "qwen3_moe", "glm4_moe", "glm4_moe qk_norm", "glm4_moe_lite")  # fmt: skip
_VISION = {"patch_size": 2, "pos_emb_height": 4, "pos_emb_width": 4, "pos_emb_time": 1, "num_attention_heads": 2,
           "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16}


def yarn(pick):
    """A YaRN extension whose ramp lies within few pairs."""
    m = pick([0.707, 1.0])
    return {"type": "yarn", "factor": pick([4.0, 32.0, 40.0]), "original_max_position_embeddings": pick([16, 64]),
            "beta_fast": pick([1.0, 32.0]), "beta_slow": 1.0, "mscale": m, "mscale_all_dim": m}


def content(family: str, seed: int) -> dict:
    """A config.json of the family, drawn."""
    random = np.random.RandomState([FAMILIES.index(family), seed])

    def pick(values):
        return values[random.randint(len(values))]

    heads, layers, experts = pick([2, 3, 4, 6]), pick([2, 3]), pick([8, 12, 16])
    made = dict(
        vocab_size=pick([70, 96]), hidden_size=pick([36, 48]), intermediate_size=pick([40, 64]),
        moe_intermediate_size=pick([12, 20, 24]), num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, n_routed_experts=experts, n_shared_experts=pick([1, 2]),
        num_experts_per_tok=pick([2, 3, 4]), first_k_dense_replace=1, n_group=1, topk_group=1, norm_topk_prob=True,
        routed_scaling_factor=pick([1.0, 1.8, 2.5]), rms_norm_eps=pick([1e-6, 1e-5]), hidden_act="silu",
        attention_bias=pick([False, True]), tie_word_embeddings=False, max_position_embeddings=640,
        rope_theta=pick([1e4, 5e4]), rope_scaling=None)
    latent = dict(q_lora_rank=pick([None, 20, 28]), kv_lora_rank=pick([16, 24]), qk_nope_head_dim=pick([8, 12]),
                  qk_rope_head_dim=pick([8, 12]), v_head_dim=pick([8, 16, 20]))
    sigmoid = dict(topk_method="noaux_tc", scoring_func="sigmoid")
    match family.split():
        case ["deepseek_v2", kind]:
            made |= latent | dict(model_type="deepseek_v2", norm_topk_prob=False, scoring_func="softmax",
                                  topk_method="greedy", rope_scaling=pick([None, yarn(pick)]))
            if kind == "grouped":
                made |= dict(topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=16.0)
        case ["deepseek_v3"]:
            made |= latent | sigmoid | dict(model_type="deepseek_v3", n_group=4, topk_group=pick([2, 3]),
                                            rope_scaling=yarn(pick), rope_interleave=seed % 3 != 2)
        case ["moonlight"]:
            made |= latent | sigmoid | dict(model_type="deepseek_v3", q_lora_rank=None, rms_norm_eps=1e-5)
        case ["deepseek_v32"]:
            made |= latent | sigmoid | dict(
                model_type="deepseek_v32", q_lora_rank=24, n_group=pick([2, 4]), topk_group=2, rope_scaling=yarn(pick),
                index_topk=pick([16, 64]), index_n_heads=2, index_head_dim=16)
        case ["kimi_k2"]:
            made |= latent | sigmoid | dict(model_type="kimi_k2", rope_scaling=yarn(pick) | {"beta_fast": 1.0},
                                            num_experts_per_tok=pick([4, 8]), routed_scaling_factor=2.827)
        case ["kimi_k25"]:
            latent |= {"q_lora_rank": latent["q_lora_rank"] or 24}  # without one transformers saves names of its own
            text = made | latent | sigmoid | dict(model_type="kimi_k2", rope_scaling=yarn(pick))
            made = dict(model_type="kimi_k25", text_config=text, vision_config=_VISION, projection_hidden_size=16,
                        tie_word_embeddings=False)
        case ["qwen3_moe"]:
            del made["n_shared_experts"], made["first_k_dense_replace"], made["n_group"], made["topk_group"]
            del made["routed_scaling_factor"]
            made["num_experts"] = made.pop("n_routed_experts")
            made |= dict(model_type="qwen3_moe", norm_topk_prob=pick([True, True, False]), decoder_sparse_step=1,
                         mlp_only_layers=[], num_attention_heads=2 * heads, head_dim=pick([8, 12]),
                         rope_scaling=pick([None, {"rope_type": "yarn", "factor": 4.0,
                                                   "original_max_position_embeddings": 64}]))
        case ["glm4_moe", *norm]:
            made |= sigmoid | dict(
                model_type="glm4_moe", num_attention_heads=heads * pick([1, 2]), num_key_value_heads=heads,
                head_dim=pick([8, 12, 16]), use_qk_norm=bool(norm), partial_rotary_factor=pick([0.5, 0.5, 1.0]),
                first_k_dense_replace=pick([1, layers - 1]))
        case ["glm4_moe_lite"]:
            made |= latent | sigmoid | dict(model_type="glm4_moe_lite")
    return made
