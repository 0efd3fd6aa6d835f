"""Random training runs of the size that compiles in seconds, for comparing planned with compiled memory."""

import random

from kjax import gin_config

KINDS = ("wide mlp", "long rows", "no q_lora", "chunked loss", "grouped queries", "grouped queries, long rows",
         "nf4", "8 bits")


def draw(seed: int, number: int) -> tuple[str, dict, list[str]]:
    """(name, config.json, gin bindings) of one run; the kind follows from the number, the sizes from both."""
    rng, kind = random.Random(f"{seed}/{number}"), KINDS[number % len(KINDS)]
    heads, nope = rng.choice((4, 8)), rng.choice((32, 64))
    content = {
        "model_type": "deepseek_v3", "vocab_size": rng.choice((2048, 4096)), "hidden_size": rng.choice((256, 384, 512)),
        "intermediate_size": rng.choice((512, 1024)), "num_hidden_layers": rng.choice((5, 6)),
        "num_attention_heads": heads, "q_lora_rank": rng.choice((64, 96)), "kv_lora_rank": rng.choice((64, 128)),
        "qk_nope_head_dim": nope, "qk_rope_head_dim": rng.choice((16, 32)), "v_head_dim": nope,
        "first_k_dense_replace": rng.choice((2, 3)), "moe_intermediate_size": rng.choice((128, 256)),
        "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
        "max_position_embeddings": 8192, "rope_theta": 10000.0, "torch_dtype": "float32"}
    rows = rng.choice((4, 8))
    train = {"Train.rows_per_step": rows, "Data.max_length": rng.choice((128, 256)), "Train.loss_chunk": 256,
             "Train.micro_rows": rng.choice((1, 2, rows))}
    if kind == "no q_lora":
        content |= {"q_lora_rank": None}
    elif kind == "chunked loss":
        content |= {"vocab_size": rng.choice((16384, 24576))}
        train |= {"Train.loss_chunk": rng.choice((128, 256, 512))}
    elif kind == "wide mlp":
        content |= {"intermediate_size": 4096}
    elif kind in ("nf4", "8 bits"):
        train |= {"Model.weights": kind.replace(" bits", "bit")}
    if kind.startswith("grouped queries"):
        content |= {"model_type": "glm4_moe", "num_attention_heads": 2 * heads, "num_key_value_heads": heads // 2,
                    "head_dim": nope, "attention_bias": True, "use_qk_norm": rng.choice((True, False)),
                    "partial_rotary_factor": 0.5, "n_group": 1}
    if kind.endswith("long rows"):
        train |= {"Train.rows_per_step": 2, "Train.micro_rows": 1, "Data.max_length": rng.choice((1024, 1536))}
    return kind, content, [f"{name}={value!r}" for name, value in train.items()]


def settings(path, bindings, dtype: str = "float32"):
    return gin_config.load((), [f"Model.directory={str(path)!r}", f"Model.dtype={dtype!r}", *bindings],
                           fallback={"Data.dataset": "x", "Train.run_dir": "x"})
