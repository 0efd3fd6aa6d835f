"""Models of full size, made up from the published shapes: every tensor is placed, a scale, or skipped by name."""

import json

import full_size
import hollow
import jax
import pytest

from kjax.errors import CheckpointError
from kjax.models import ModelConfig, abstract_params
from kjax.weights import names
from kjax.weights.account import account
from kjax.weights.safetensors import Checkpoint

# Parameters without multi-token prediction, vision and indexer, in millions, as the models' shapes give them.
SIZES = {"kimi-k2-thinking": 1_026_408, "kimi-k2.5": 1_026_408, "deepseek-v3.2": 671_026, "glm-4.5": 352_798,
         "glm-4.5-air-fp8": 106_852, "glm-4.7-flash": 29_943, "qwen3-235b": 235_094, "deepseek-v2-lite": 15_706}


def write(directory, model, change=lambda tensors: None):
    tensors = full_size.tensors(model)
    change(tensors)
    try:
        hollow.write(directory, tensors)
    except OSError:
        pytest.skip("the file system does not take sparse files of this size")
    (directory / "config.json").write_text(json.dumps(full_size.CONFIGS[model]))
    return tensors


@pytest.mark.parametrize("model", full_size.CONFIGS)
def test_every_tensor_is_accounted_for(model, tmp_path):
    tensors = write(tmp_path, model)
    config = ModelConfig.from_json(tmp_path)
    shapes = abstract_params(config, "bfloat16", "device")
    assert round(sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6) == SIZES[model]
    with Checkpoint(tmp_path) as checkpoint:
        _, scales, rest = hollow.accounted(checkpoint, config)
    lengths = {name for name in rest if name.endswith(".weight_shape")}  # read, and compared, when they are found
    assert len(lengths) == (60 * 384 * 3 if "kimi" in model else 0)
    assert all(names.skipped(name, config) for name in rest - lengths)
    assert not any(names.skipped(name, config) for name in lengths)
    beyond = f"model.layers.{config.num_hidden_layers}."
    skipped = {name for name in tensors if beyond in name or ".indexer." in name or "vision" in name
               or "mm_projector" in name}
    assert rest - lengths == skipped
    assert bool(skipped) == (model in full_size.MTP or model == "kimi-k2.5")
    assert bool(scales) == ("quantization_config" in full_size.CONFIGS[model].get("text_config",
                                                                                  full_size.CONFIGS[model]))
    if model == "deepseek-v2-lite":
        assert len(tensors) == 5291


def test_bad_tensors_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(full_size.CONFIGS["kimi-k2.5"]["text_config"], "num_hidden_layers", 10)
    expert = "language_model.model.layers.7.mlp.experts.31.up_proj.weight"

    def change(tensors):
        del tensors[f"{expert}_scale"]
        tensors["language_model.model.layers.5.mlp.experts.0.down_proj.weight_shape"]["data"] = bytes(8)
        tensors["language_model.model.layers.9.self_attn.q_a_proj.weight"]["shape"] = [1536, 7167]
        tensors["audio_tower.weight"] = {"dtype": "BF16", "shape": [1], "file": "model-0.safetensors"}

    write(tmp_path, "kimi-k2.5", change)
    config = ModelConfig.from_json(tmp_path)
    with Checkpoint(tmp_path) as checkpoint, pytest.raises(CheckpointError) as caught:
        account(checkpoint, config, abstract_params(config, "bfloat16"))
    message = str(caught.value)
    assert f"missing: {expert}_scale" in message and "not part of this model: audio_tower.weight" in message
    assert "wrong shape: [1536, 7167], expected [1536, 7168]: language_model.model.layers.9." in message
    assert "it says [0, 0], the weight is [7168, 2048]: language_model.model.layers.5.mlp.experts.0.down" in message
