"""A tiny model and an adapter of every kind of module as transformers 4 and peft write them; remakes their golden.

    pip install --no-deps --target DIR transformers==4.57.6 huggingface_hub==0.36.0 tokenizers==0.22.1
    PYTHONPATH=DIR python tests/make_transformers4_goldens.py

The base's weights come from a seed; the golden holds its config.json and tensor names as saved, the adapter's two
files, and the logits with and without the adapter.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file

GOLDEN = Path(__file__).parent / "goldens_peft" / "transformers4.npz"
CONTENT = dict(
    model_type="deepseek_v3", vocab_size=64, hidden_size=24, intermediate_size=28, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, q_lora_rank=10, kv_lora_rank=12, qk_nope_head_dim=6,
    qk_rope_head_dim=4, v_head_dim=8, first_k_dense_replace=1, moe_intermediate_size=14, n_routed_experts=4,
    n_shared_experts=1, num_experts_per_tok=2, n_group=2, topk_group=1, norm_topk_prob=True, routed_scaling_factor=2.5,
    rms_norm_eps=1e-6, hidden_act="silu", attention_bias=False, tie_word_embeddings=False, max_position_embeddings=640,
    rope_theta=10000.0, rope_scaling=dict(type="yarn", factor=40, original_max_position_embeddings=16, beta_fast=32,
                                          beta_slow=1, mscale=1.0, mscale_all_dim=1.0))
TARGETS = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def weight(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """A tensor of the base: the same in numpy's frozen stream for ever."""
    noise = np.random.RandomState([seed, sum(name.encode()) * 7919 % 2**31, len(name)]).standard_normal(shape)
    if "norm" in name:
        return (1 + 0.3 * noise).astype(np.float32)
    return (0.1 * noise if name.endswith("bias") else noise * shape[-1] ** -0.5).astype(np.float32)


def main():
    import peft
    import torch
    import transformers

    assert transformers.__version__.startswith("4."), transformers.__version__
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = transformers.DeepseekV3Config(**CONTENT, attn_implementation="eager")
    model = transformers.DeepseekV3ForCausalLM(config).eval()
    model.load_state_dict({name: torch.from_numpy(weight(name, tuple(t.shape), 0))
                           for name, t in model.state_dict().items()})
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(f"{directory}/base")
        with safe_open(f"{directory}/base/model.safetensors", "np") as file:
            names = {name: [file.get_slice(name).get_dtype(), file.get_slice(name).get_shape()] for name in file.keys()}
        adapted = peft.get_peft_model(model, peft.LoraConfig(
            r=2, lora_alpha=3, target_modules=TARGETS, rank_pattern={"o_proj": 3}, task_type="CAUSAL_LM",
            init_lora_weights=False)).eval()
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                parameter.data.normal_(std=0.2)
        adapted.save_pretrained(f"{directory}/adapter")
        tensors = load_file(f"{directory}/adapter/adapter_model.safetensors")
        tokens = np.random.RandomState(0).randint(0, CONTENT["vocab_size"], (2, 12)).astype(np.int32)
        with torch.no_grad():
            logits = adapted(input_ids=torch.from_numpy(tokens).long()).logits.numpy()
            with adapted.disable_adapter():
                plain = adapted(input_ids=torch.from_numpy(tokens).long()).logits.numpy()
        np.savez_compressed(
            GOLDEN, config=Path(f"{directory}/base/config.json").read_text(), names=json.dumps(names), tokens=tokens,
            adapter_config=Path(f"{directory}/adapter/adapter_config.json").read_text(), logits=logits, plain=plain,
            keys=list(tensors), values=np.concatenate([array.ravel() for array in tensors.values()]),
            shapes=json.dumps([array.shape for array in tensors.values()]))


if __name__ == "__main__":
    main()
