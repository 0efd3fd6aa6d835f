"""Tiny random models in checkpoint directories, for the tests of loading and generating."""

import json

import jax
import numpy as np
import tokenizers
from safetensors.numpy import save_file

from kjax.models import ModelConfig, abstract_params
from kjax.weights.safetensors import INDEX, Checkpoint
from kjax.weights.save import save_checkpoint

V3 = {
    "model_type": "deepseek_v3", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48,
    "moe_intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
    "q_lora_rank": 12, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
    "first_k_dense_replace": 1, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 3, "n_group": 4,
    "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "rope_theta": 10000.0,
    "max_position_embeddings": 1024, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "topk_method": "noaux_tc",
    "scoring_func": "sigmoid", "hidden_act": "silu", "attention_bias": False,
}  # fmt: skip
V2 = V3 | {
    "model_type": "deepseek_v2", "q_lora_rank": None, "topk_method": "greedy", "scoring_func": "softmax",
    "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.0,
}  # fmt: skip


def random_params(config_json, dtype="float32", seed=0):
    """A whole tree, routed experts included: weights of a size that keeps every layer's output visible."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        values = rng.standard_normal(shape.shape, np.float32)
        name = jax.tree_util.keystr(path)
        values = 1 + 0.1 * values if "norm" in name else 0.1 * values if "bias" in name else 0.2 * values
        return values.astype(shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, abstract_params(ModelConfig.from_json(config_json), dtype, "device"))


def write(directory, config_json, dtype="float32", seed=0, shards=1):
    """A random checkpoint; returns its directory and tree."""
    params = random_params(config_json, dtype, seed)
    return save_checkpoint(directory, params, config_json, shards=shards), params


def tensors_of(directory) -> dict[str, np.ndarray]:
    with Checkpoint(directory) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.names()}


def rewrite(directory, tensors, shards=1):
    """Replaces the weights; with several shards neighbouring tensors lie in different ones."""
    for path in [*directory.glob("*.safetensors"), *directory.glob(INDEX)]:
        path.unlink()
    if shards == 1:
        return save_file(tensors, directory / "model.safetensors")
    names = [f"model-{shard + 1:05}-of-{shards:05}.safetensors" for shard in range(shards)]
    weight_map = {tensor: names[i % shards] for i, tensor in enumerate(tensors)}
    for name in names:
        save_file({tensor: tensors[tensor] for tensor in tensors if weight_map[tensor] == name}, directory / name)
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))


SPECIALS = ("<bos>", "<eos>", "<user>", "<reply>")
BYTE_VOCABULARY = 256 + len(SPECIALS)  # of the tokenizer below: one token per byte, then the specials
TEMPLATE = (
    "<bos>{% for m in messages %}{% if m.role == 'user' %}<user>{{ m.content }}{% else %}<reply>{{ m.content }}<eos>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<reply>{% endif %}"
)


def write_tokenizer(directory):
    """A byte-level tokenizer with a chat template in the files of Hugging Face."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens(list(SPECIALS))
    bpe.save(str(directory / "tokenizer.json"))
    settings = {"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
