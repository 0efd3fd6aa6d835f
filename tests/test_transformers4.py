"""What transformers 4 and peft wrote: a base, and an adapter of every kind of module with keys for each expert."""

import json

import numpy as np
import pytest
import safetensors.numpy
from make_transformers4_goldens import GOLDEN, weight

import kjax
from kjax import adapters
from kjax.merge import merge
from kjax.models import ModelConfig, linears

LOGITS = 1e-5  # fp32 in another order of sums


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN, allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="module")
def base(golden, tmp_path_factory):
    directory = tmp_path_factory.mktemp("transformers4") / "base"
    directory.mkdir()
    (directory / "config.json").write_text(str(golden["config"]))
    names = json.loads(str(golden["names"]))
    assert {dtype for dtype, _ in names.values()} == {"F32"}
    safetensors.numpy.save_file({name: weight(name, tuple(shape), 0) for name, (_, shape) in names.items()},
                                directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def adapter(golden, base):
    directory = base.parent / "adapter"
    directory.mkdir()
    (directory / "adapter_config.json").write_text(str(golden["adapter_config"]))
    tensors, at = {}, 0
    for key, shape in zip(golden["keys"].tolist(), json.loads(str(golden["shapes"])), strict=True):
        tensors[key] = golden["values"][at:at + np.prod(shape)].reshape(shape)
        at += tensors[key].size
    safetensors.numpy.save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    return directory


def error(model, golden, key):
    got, wanted = np.asarray(model.logits(golden["tokens"])), golden[key]
    return np.abs(got - wanted).max() / np.abs(wanted).max()


def test_the_base(golden, base):
    config = json.loads(str(golden["config"]))
    assert config["transformers_version"].startswith("4.") and "rope_scaling" in config
    with kjax.load(base, dtype="float32", progress=False) as model:
        assert error(model, golden, "plain") <= LOGITS < 0.05 < error(model, golden, "logits")


def test_the_adapter(golden, base, adapter, tmp_path):
    sizes = linears(ModelConfig.from_json(base))
    spec, tree = adapters.load(adapter, sizes)
    assert spec.paths == tuple(sorted(sizes))  # every linear of the model
    assert spec.get("moe_layers/self_attn/o_proj").rank == 3 and spec.get("moe_layers/mlp/experts/up_proj").rank == 2
    with kjax.load(base, adapter, "float32", experts="device", progress=False) as model:
        assert error(model, golden, "logits") <= LOGITS
    merge(base, adapter, tmp_path / "m", progress=False)
    with kjax.load(tmp_path / "m", dtype="float32", progress=False) as model:
        assert error(model, golden, "logits") <= LOGITS
    adapters.save(tmp_path / "again", tree, spec, sizes, base=adapters.Base("base"))
    theirs, ours = (safetensors.numpy.load_file(of / "adapter_model.safetensors") for of in (
        adapter, tmp_path / "again"))
    assert theirs.keys() == ours.keys()
    for key in theirs:
        np.testing.assert_array_equal(theirs[key], ours[key])
