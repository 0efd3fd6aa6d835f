"""`kjax export`: what it writes from either layout, in little memory, and what it refuses."""

import json
import tracemalloc

import adapter_cases as cases
import numpy as np
import pytest
import weights_cases
from safetensors.numpy import load_file, save_file

from kjax import adapters
from kjax.errors import CheckpointError
from kjax.export import export
from kjax.models import ModelConfig, linears
from kjax.weights.safetensors import Checkpoint

CONTENT = weights_cases.V3
EVERY = ("attention", "shared", "dense", "experts")
EXPERT = "base_model.model.model.layers.2.mlp.experts.5.up_proj.lora_B.weight"


def write_adapter(directory, base, content=CONTENT, groups=EVERY, **kwargs):
    """A base (only its norms are looked at) and an adapter of it."""
    base.mkdir()
    (base / "config.json").write_text(json.dumps(content))
    save_file({"model.norm.weight": np.ones(content["hidden_size"], np.float32)}, base / "model.safetensors")
    spec, found = cases.spec_of(content, groups), linears(ModelConfig.from_json(content))
    with Checkpoint(base) as checkpoint:
        adapters.save(directory, cases.random_tree(spec, found), spec, found, base=adapters.identify(checkpoint),
                      **kwargs)
    return base, directory


def weights(adapter):
    return load_file(adapter / adapters.WEIGHTS)


def test_either_layout_and_back(tmp_path):
    base, adapter = write_adapter(tmp_path / "a", tmp_path / "base", chat_template="{{ messages }}")
    export(base, adapter, tmp_path / "b", layout="fused", dtype="bfloat16", base_name="org/name")
    config = json.loads((tmp_path / "b/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/name"
    assert config["target_parameters"] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert (tmp_path / "b/chat_template.jinja").read_text() == "{{ messages }}"
    export(base, adapter, tmp_path / "c", layout="fused")
    export(base, tmp_path / "c", tmp_path / "d")
    there, half, back = weights(adapter), weights(tmp_path / "b"), weights(tmp_path / "d")
    assert all(array.dtype == adapters.layouts.DTYPES["BF16"] for array in half.values())
    assert back.keys() == there.keys() and not half.keys() & {EXPERT}
    for name, array in there.items():
        np.testing.assert_array_equal(back[name], array)
    export(base, tmp_path / "b", tmp_path / "e")
    for name, array in weights(tmp_path / "e").items():
        np.testing.assert_allclose(array, there[name], rtol=2**-8)
    with pytest.raises(CheckpointError, match="already exists"):
        export(base, adapter, tmp_path / "b")


def test_a_number_that_is_none_is_named_and_nothing_is_left(tmp_path):
    base, adapter = write_adapter(tmp_path / "a", tmp_path / "base")
    tensors = weights(adapter)
    tensors[EXPERT][3, 1] = np.nan
    save_file(tensors, adapter / adapters.WEIGHTS)
    for layout in ("experts", "fused"):
        with pytest.raises(CheckpointError, match=f"NaN or Inf in {EXPERT}"):
            export(base, adapter, tmp_path / "b", layout=layout)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base"]


def test_memory_does_not_grow_with_the_layers(tmp_path):
    """71 MB of adapters on routed experts in 24 layers, into the other layout and back."""
    content = CONTENT | {"num_hidden_layers": 25, "hidden_size": 1024, "moe_intermediate_size": 256,
                         "n_routed_experts": 64, "num_experts_per_tok": 2}
    base, adapter = write_adapter(tmp_path / "a", tmp_path / "base", content, ("experts",))
    layer = (adapter / adapters.WEIGHTS).stat().st_size / 24
    for number, (source, layout) in enumerate([("a", "fused"), ("0", "experts")]):
        tracemalloc.start()  # numpy tells it of every array
        try:
            export(base, tmp_path / source, tmp_path / str(number), layout=layout)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        # At most the lora_B of two layers, and what is known of the 9,216 tensors of one file.
        assert peak < 2 * layer + 3e3 * 9216 < 12 * layer, f"{source} to {layout}: {peak / 1e6:.1f} MB"
