"""Published checkpoints by their tensor lists alone: every tensor is placed, a scale of one that is, or skipped."""

import dataclasses
import gzip
import json

import hollow
import pytest

from kjax.errors import CheckpointError
from kjax.models import ModelConfig, abstract_params
from kjax.weights import names
from kjax.weights.account import account
from kjax.weights.safetensors import Checkpoint

LISTS = {"r1map.json.gz": ("deepseek_r1", 91_991, 163), "k2map.json.gz": ("kimi_k2_instruct_0711", 139_644, 61)}


@pytest.fixture(scope="module", params=LISTS)
def published(request, shared_data, tmp_path_factory):
    """(open checkpoint, config, tensors of the list, number of tensors and shards published)."""
    folder, count, shards = LISTS[request.param]
    config = next(iter((shared_data / "configs").glob(f"{folder}*.json")), None)
    if config is None or not (shared_data / "tensor_maps" / request.param).exists():
        pytest.skip("no tensor list")
    tensors = json.loads(gzip.decompress((shared_data / "tensor_maps" / request.param).read_bytes()))
    directory = tmp_path_factory.mktemp("hollow")
    try:
        hollow.write(directory, tensors)
    except OSError:
        pytest.skip("the file system does not take sparse files of this size")
    with Checkpoint(directory) as checkpoint:
        yield checkpoint, ModelConfig.from_json(config), tensors, count, shards


def test_index_of_a_published_checkpoint(published):
    checkpoint, _, tensors, count, shards = published
    assert len(tensors) == count and set(checkpoint.names()) == set(tensors)
    assert len({checkpoint.entry(name).path for name in tensors}) == shards
    for name, tensor in tensors.items():
        entry = checkpoint.entry(name)
        assert (entry.path.name, entry.dtype, list(entry.shape)) == (tensor["file"], tensor["dtype"], tensor["shape"])


def test_every_tensor_is_accounted_for(published):
    """By kjax itself, reading no data: what is loaded or opened, and by the list: nothing else is left."""
    checkpoint, config, tensors, _, _ = published
    weights, scales, rest = hollow.accounted(checkpoint, config)
    assert all(scale == f"{weight}_scale_inv" for scale, weight in scales.items())
    assert scales.keys() == {name for name in tensors if name.endswith("_scale_inv") and
                             not names.skipped(name, config)}
    assert all(names.skipped(name, config) for name in rest)
    # K2 has a rotary_emb.inv_freq per layer, R1 one layer more than config.json counts.
    assert len(rest) == (61 if config.model_type == "kimi_k2" else sum(".layers.61." in name for name in tensors))
    apart = sum(tensors[scale]["file"] != tensors[weight]["file"] for scale, weight in scales.items())
    assert apart or config.model_type == "kimi_k2"  # R1 breaks shards between a weight and its scale


def test_device_experts_have_places_too(published):
    _, config, tensors, _, _ = published
    placed = names.places(abstract_params(config, "bfloat16", "device"))
    routed = {name: shape for _, _, _, name, shape in names.experts(config)}
    assert {name: tuple(placed[name].shape) for name in routed} == routed
    gate = placed[f"model.layers.{config.first_k_dense_replace + 5}.mlp.experts.17.gate_proj.weight"]
    assert gate.index == (5, 17) and gate.leaf == "moe_layers/mlp/experts/gate_proj"


def test_quantised_weights_without_a_word_in_the_config(published):
    checkpoint, config, _, _, _ = published
    config = dataclasses.replace(config, quantization=None)
    with pytest.raises(CheckpointError) as caught:
        account(checkpoint, config, abstract_params(config, "bfloat16", "host"))
    message = str(caught.value)
    assert "wrong dtype: F8_E4M3" in message and "self_attn.o_proj.weight" in message
    assert ".mlp.experts.{0-255}." in message or ".mlp.experts.{0-383}." in message
    assert "config.json has no quantization_config" in message and len(message) < 8000
