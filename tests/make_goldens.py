"""Tiny random models whose logits and gradients transformers computes in torch; run it to remake tests/goldens.

    python tests/make_goldens.py

The weights come from a seed and a generator whose stream numpy has frozen, so a golden holds only what torch said.
"""

import copy
import json
import re
import zlib
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from kjax.models import ModelConfig, abstract_params

GOLDENS = Path(__file__).parent / "goldens"
MARGIN = 1e-4  # a draw in which a rounding error could flip a route is drawn again

_YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1,
         "mscale": 1.0, "mscale_all_dim": 1.0}
_V2 = dict(
    model_type="deepseek_v2", vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=4, q_lora_rank=None, kv_lora_rank=24, qk_nope_head_dim=12,
    qk_rope_head_dim=8, v_head_dim=16, first_k_dense_replace=1, moe_intermediate_size=20, n_routed_experts=8,
    n_shared_experts=2, num_experts_per_tok=3, n_group=1, topk_group=1, topk_method="greedy", norm_topk_prob=False,
    scoring_func="softmax", routed_scaling_factor=1.0, rms_norm_eps=1e-6, hidden_act="silu", attention_bias=False,
    tie_word_embeddings=False, max_position_embeddings=640, moe_layer_freq=1, rope_theta=10000.0, rope_scaling=None)
_V3 = _V2 | dict(
    model_type="deepseek_v3", q_lora_rank=28, n_routed_experts=16, n_shared_experts=1, num_experts_per_tok=4, n_group=4,
    topk_group=2, topk_method="noaux_tc", norm_topk_prob=True, scoring_func="sigmoid", routed_scaling_factor=2.5,
    rope_scaling=_YARN)
CASES = {
    "v2_greedy": _V2 | dict(rope_scaling=_YARN | dict(mscale=0.707, mscale_all_dim=0.707)),
    "v2_grouped": _V2 | dict(q_lora_rank=20, n_routed_experts=12, n_group=4, topk_group=2, num_experts_per_tok=4,
                             topk_method="group_limited_greedy", routed_scaling_factor=16.0, rope_scaling=_YARN),
    "v3": _V3,
    "v3_plain": _V3 | dict(q_lora_rank=None, n_group=1, topk_group=1, first_k_dense_replace=0, num_hidden_layers=2,
                           attention_bias=True, rope_interleave=False, rope_scaling=None, tie_word_embeddings=True),
    "k2": _V3 | dict(num_attention_heads=2, num_key_value_heads=2, n_group=1, topk_group=1, n_routed_experts=24,
                     num_experts_per_tok=8, routed_scaling_factor=2.827, rope_theta=50000.0, rms_norm_eps=1e-3,
                     rope_scaling=_YARN | dict(factor=32.0, beta_fast=1.0)),
}


def random_params(config: ModelConfig, seed: int) -> dict:
    """A params tree (device experts) in fp32 in which nothing is trivial: norms and biases are drawn too."""
    leaves = flatten_dict(abstract_params(config, "float32", "device"), sep="/")
    for path in leaves:
        shape = leaves[path].shape
        noise = np.random.RandomState([seed, zlib.crc32(path.encode())]).standard_normal(shape).astype(np.float32)
        if "norm" in path:
            leaves[path] = 1 + 0.3 * noise
        elif path.endswith(("/bias", "e_score_correction_bias")):
            leaves[path] = 0.1 * noise
        elif path.endswith("mlp/gate/weight"):
            leaves[path] = noise * 2 * shape[-1] ** -0.5
        else:
            leaves[path] = noise * shape[-1] ** -0.5
    return unflatten_dict(leaves, sep="/")


def state_dict(params: dict, config: ModelConfig) -> dict[str, np.ndarray]:
    """The same weights under the names transformers 5 has in memory, routed experts fused."""
    state = {}
    for path, leaf in flatten_dict(params, sep="/").items():
        stack, _, tail = path.partition("/")
        first = {"dense_layers": 0, "moe_layers": config.num_dense_layers}.get(stack)
        if first is None:
            state[("" if stack == "lm_head" else "model.") + path.replace("/", ".")] = leaf
        else:
            for i, array in enumerate(leaf):
                state[f"model.layers.{first + i}.{tail.replace('/', '.')}"] = array
    for name in [name for name in state if name.endswith("experts.gate_proj")]:
        fused = np.concatenate([state.pop(name), state.pop(name.replace("gate_proj", "up_proj"))], axis=1)
        state[name.replace("gate_proj", "gate_up_proj")] = fused
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state


# model_type: the classes of transformers. It has none for kimi_k2, whose arithmetic is that of deepseek_v3.
_CLASSES = {
    "deepseek_v2": ("DeepseekV2Config", "DeepseekV2ForCausalLM"),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM"),
    "deepseek_v32": ("DeepseekV32Config", "DeepseekV32ForCausalLM"),
    "kimi_k2": ("DeepseekV3Config", "DeepseekV3ForCausalLM"),
    "kimi_k25": ("Kimi_K25Config", "Kimi_K25ForConditionalGeneration"),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM"),
    "glm4_moe": ("Glm4MoeConfig", "Glm4MoeForCausalLM"),
    "glm4_moe_lite": ("Glm4MoeLiteConfig", "Glm4MoeLiteForCausalLM"),
}


def text_model(model):
    """The decoder within a model of transformers, multimodal or not."""
    return getattr(model.model, "language_model", model.model)


def torch_name(model, name: str) -> str:
    """The name that a model of transformers has in memory for a tensor of the text model."""
    nested = hasattr(model.model, "language_model")
    return name.replace("model.", "model.language_model.", 1) if nested and name.startswith("model.") else name


def torch_model(content: dict, params: dict):
    """transformers' own model of a config.json's content, holding these weights; fp32, eager attention."""
    import torch
    import transformers

    torch.set_num_threads(1)
    made, causal = (getattr(transformers, name) for name in _CLASSES[content["model_type"]])
    config = made(**{key: value for key, value in copy.deepcopy(content).items() if key != "model_type"},
                  attn_implementation="eager")
    config._experts_implementation = config.get_text_config()._experts_implementation = "eager"
    model = causal(config)
    state = {torch_name(model, name): torch.from_numpy(np.array(array))
             for name, array in state_dict(params, ModelConfig.from_json(content)).items()}
    left = model.load_state_dict(state, strict=False)
    # What kjax leaves out by name: the indexer of sparse attention, and the vision part.
    absent = [name for name in left.missing_keys if not re.search(r"\.indexer\.|vision_tower|mm_projector", name)]
    assert not absent and not left.unexpected_keys, (absent, left.unexpected_keys)
    return model.eval()


def least_margin(model, config: ModelConfig, tokens) -> float:
    """The smallest gap, over tokens and layers, between what a top-k of the router took and what it left."""
    import torch

    logits = []
    hooks = [layer.mlp.gate.register_forward_hook(lambda module, _, out: logits.append((module, out[0].numpy())))
             for layer in text_model(model).layers if hasattr(layer.mlp, "gate")]
    with torch.no_grad():
        model(torch.from_numpy(tokens).long())
    for hook in hooks:
        hook.remove()
    gaps = []
    for module, score in logits:
        if config.topk_method == "noaux_tc":
            choice = 1 / (1 + np.exp(-score)) + module.e_score_correction_bias.numpy()
        else:
            choice = np.exp(score - score.max(-1, keepdims=True))
            choice /= choice.sum(-1, keepdims=True)
        if config.topk_method != "greedy" and config.n_group > config.topk_group:
            groups = np.sort(choice.reshape(len(choice), config.n_group, -1))
            best = groups[..., -1] if config.topk_method == "group_limited_greedy" else groups[..., -2:].sum(-1)
            order = np.sort(best)[:, ::-1]
            gaps.append((order[:, config.topk_group - 1] - order[:, config.topk_group]).min())
            kept = best >= order[:, config.topk_group - 1, None]
            choice = np.where(np.repeat(kept, choice.shape[1] // config.n_group, axis=1), choice, -np.inf)
        order = np.sort(choice)[:, ::-1]
        if config.num_experts_per_tok < config.n_routed_experts:
            gaps.append((order[:, config.num_experts_per_tok - 1] - order[:, config.num_experts_per_tok]).min())
    return float(min(gaps, default=np.inf))


def draw(case: str, seed: int):
    """A random model of a case and tokens [2,16] that keep clear of ties, its seed, and torch's model."""
    content = CASES[case]
    config = ModelConfig.from_json(content)
    for attempt in range(seed * 1000, seed * 1000 + 1000):
        params = random_params(config, attempt)
        tokens = np.random.RandomState(attempt).randint(0, config.vocab_size, (2, 16)).astype(np.int32)
        model = torch_model(content, params)
        if least_margin(model, config, tokens) >= MARGIN:
            return content, params, tokens, attempt, model
    raise AssertionError(f"{case}: a thousand draws with ties")


def torch_logits_and_grads(model, tokens):
    """Logits [B,T,V], and the gradient of the next-token loss (mean over B, T-1) to every parameter by name."""
    import torch

    ids = torch.from_numpy(tokens).long()
    logits = model(ids).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    grads = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach().numpy(), grads


def main():
    GOLDENS.mkdir(exist_ok=True)
    for case in CASES:
        content, _, tokens, seed, model = draw(case, 1)
        logits, grads = torch_logits_and_grads(model, tokens)
        np.savez_compressed(GOLDENS / f"{case}.npz", config=json.dumps(content), seed=seed, tokens=tokens,
                            logits=logits, embedding_grad=grads["model.embed_tokens.weight"])


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
