"""Placing tensors into the tree: exact copies, every misfit by name at once, little memory beside the result."""

import re
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
from weights_cases import V2, V3, rewrite, tensors_of, write

from kjax.errors import CheckpointError
from kjax.models import ModelConfig, abstract_params
from kjax.weights import load, names
from kjax.weights.load import load_params, open_experts
from kjax.weights.safetensors import INDEX, SINGLE, Checkpoint
from kjax.weights.save import save_checkpoint

CONFIG = ModelConfig.from_json(V3)


def params_of(directory, config=CONFIG, dtype="float32", experts="device"):
    with Checkpoint(directory) as checkpoint:
        return load_params(checkpoint, config, abstract_params(config, dtype, experts))


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert isinstance(a, jax.Array) and a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=jax.tree_util.keystr(path))


def without_experts(params):
    return params | {"moe_layers": params["moe_layers"] | {
        "mlp": {name: leaf for name, leaf in params["moe_layers"]["mlp"].items() if name != "experts"}}}


def refusal(directory, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        params_of(directory, **options)
    assert str(directory) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("config_json", [V3, V2, V3 | {"tie_word_embeddings": True}, V3 | {"first_k_dense_replace": 0},
                                         V3 | {"first_k_dense_replace": 3}, V3 | {"attention_bias": True}],
                         ids=["v3", "v2", "tied", "all moe", "all dense", "bias"])  # fmt: skip
@pytest.mark.parametrize("shards", [1, 4])
def test_round_trip(tmp_path, config_json, shards):
    directory, params = write(tmp_path / "model", config_json, shards=shards)
    assert len(list(directory.glob("*.safetensors"))) == shards
    assert_equal(params_of(directory, ModelConfig.from_json(config_json)), params)


def test_saved_names_are_those_of_hugging_face(tmp_path):
    directory, params = write(tmp_path / "model", V3)
    tensors = tensors_of(directory)
    np.testing.assert_array_equal(tensors["model.layers.2.mlp.experts.5.down_proj.weight"],
                                  params["moe_layers"]["mlp"]["experts"]["down_proj"][1, 5])
    np.testing.assert_array_equal(tensors["model.layers.1.mlp.gate.e_score_correction_bias"],
                                  params["moe_layers"]["mlp"]["gate"]["e_score_correction_bias"][0])
    np.testing.assert_array_equal(tensors["model.layers.0.mlp.up_proj.weight"],
                                  params["dense_layers"]["mlp"]["up_proj"]["weight"][0])
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= tensors.keys()
    # Three layers of 9 attention and norm tensors, 3 dense, 2 x (router 2, shared 3, routed 8 x 3), and 3 outside.
    assert len(tensors) == 3 * 9 + 3 + 2 * (2 + 3 + 24) + 3


def test_a_layer_spread_over_shards(tmp_path):
    directory, params = write(tmp_path / "model", V3)
    rewrite(directory, tensors_of(directory), shards=5)
    assert_equal(params_of(directory), params)


@pytest.mark.parametrize("block", [64, 200, 1 << 20])
@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_blocks_of_any_size_on_either_path(tmp_path, monkeypatch, block, backend):
    """The accelerator's path (donated buffers) runs here on the CPU; blocks split tensors within a layer."""
    directory, params = write(tmp_path / "model", V3)
    monkeypatch.setattr(load, "BLOCK", block)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert_equal(params_of(directory), params)


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_dtypes_are_converted(tmp_path, stored, wanted):
    directory, _ = write(tmp_path / "model", V3)
    tensors = {name: array.astype(stored) for name, array in tensors_of(directory).items()}
    rewrite(directory, tensors)
    params = params_of(directory, dtype=wanted)
    assert params["embed_tokens"]["weight"].dtype == wanted
    np.testing.assert_array_equal(params["embed_tokens"]["weight"], tensors["model.embed_tokens.weight"].astype(wanted))
    # The router keeps fp32 in any case.
    gate = params["moe_layers"]["mlp"]["gate"]["weight"]
    assert gate.dtype == np.float32
    np.testing.assert_array_equal(gate[1], tensors["model.layers.2.mlp.gate.weight"].astype(np.float32))


def test_arrays_are_taken_over_without_a_copy(monkeypatch, tmp_path):
    directory, _ = write(tmp_path / "model", V3)
    addresses, plain = [], load._aligned
    monkeypatch.setattr(load, "_aligned", lambda *a: addresses.append(x := plain(*a)) or x)
    params = params_of(directory)
    assert ({leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)}
            == {array.ctypes.data for array in addresses})


def test_memory_beside_the_result_is_bounded(tmp_path, monkeypatch):
    """numpy reports its allocations to tracemalloc: result, and blocks in flight, stored and converted."""
    wide = V3 | {"vocab_size": 40_000}
    directory, _ = write(tmp_path / "model", wide)
    monkeypatch.setattr(load, "BLOCK", 1 << 16)
    config = ModelConfig.from_json(wide)
    abstract = abstract_params(config, "bfloat16", "device")
    result = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    with Checkpoint(directory) as checkpoint:
        load_params(checkpoint, config, abstract)
        tracemalloc.start()
        params = load_params(checkpoint, config, abstract)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert params["embed_tokens"]["weight"].nbytes > 2_000_000
    # At worst 2 * WORKERS blocks in hand at five bytes a stored one (bytes, converted, mask); 300 kB of Python objects.
    assert peak < result + 2 * load.WORKERS * 5 * load.BLOCK / 2 + 300_000


def test_readers_do_not_run_ahead():
    drawn, items = [], range(100)
    results = load._in_order(lambda item: -item, (drawn.append(item) or item for item in items))
    for done, result in enumerate(results):
        assert result == -done
        assert len(drawn) - done <= 2 * load.WORKERS
    assert drawn == list(items)


def test_what_is_skipped(tmp_path):
    directory, params = write(tmp_path / "model", V3 | {"tie_word_embeddings": True})
    extra = {
        "model.layers.3.self_attn.o_proj.weight": np.zeros((2, 2), np.float32),
        "model.layers.3.enorm.weight": np.zeros(2, np.float32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32),
        "lm_head.weight": np.zeros((96, 32), np.float32),
    }
    rewrite(directory, tensors_of(directory) | extra)
    assert_equal(params_of(directory, ModelConfig.from_json(V3 | {"tie_word_embeddings": True})), params)
    assert names.skipped("model.layers.3.enorm.weight", CONFIG).startswith("multi-token prediction")
    assert names.skipped("lm_head.weight", CONFIG) is None
    assert names.skipped("model.layers.2.enorm.weight", CONFIG) is None


@pytest.mark.parametrize("experts", ["host", "device"])
def test_misfits_are_reported_at_once_by_name(tmp_path, experts):
    directory, _ = write(tmp_path / "model", V3)
    tensors = tensors_of(directory)
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    tensors["model.layers.1.self_attn.k_norm.weight"] = np.zeros(4, np.float32)
    tensors["model.layers.0.self_attn.o_proj.weight"] = np.zeros((32, 31), np.float32)
    tensors["model.layers.2.mlp.experts.7.down_proj.weight"] = np.zeros((16, 32), np.float32)
    tensors["model.layers.2.input_layernorm.weight"] = np.zeros(32, np.int32)
    rewrite(directory, tensors)
    message = refusal(directory, experts=experts)
    for line in [
        r"missing: .*model\.norm\.weight",
        r"missing: .*model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight",
        r"not part of this model: model\.layers\.1\.self_attn\.k_norm\.weight",
        r"wrong shape: \[32, 31\], expected \[32, 32\]: model\.layers\.0\.self_attn\.o_proj\.weight",
        r"wrong shape: \[16, 32\], expected \[32, 16\]: model\.layers\.2\.mlp\.experts\.7\.down_proj\.weight",
        r"wrong dtype: I32, readable are BF16, F16, F32: model\.layers\.2\.input_layernorm\.weight",
    ]:
        assert re.search(line, message), (line, message)
    assert len(message.splitlines()) == 7


def test_many_misfits_stay_readable(tmp_path):
    directory, _ = write(tmp_path / "model", V3)
    rewrite(directory, {name: x for name, x in tensors_of(directory).items() if ".experts." not in name})
    message = refusal(directory)
    assert "missing: model" in message and "model.layers.{1-2}.mlp.experts.{0-7}.gate_proj.weight (16)" in message
    assert len(message) < 600


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_nan_and_inf_are_refused_by_name(tmp_path, value, dtype):
    directory, _ = write(tmp_path / "model", V3)
    tensors = {name: array.astype(dtype) for name, array in tensors_of(directory).items()}
    tensors["model.layers.2.self_attn.kv_b_proj.weight"][5, 7] = value
    rewrite(directory, tensors)
    message = refusal(directory)
    assert "'model.layers.2.self_attn.kv_b_proj.weight' holds NaN or Inf (first at [5, 7]" in message


def test_value_beyond_the_wanted_dtype(tmp_path):
    directory, _ = write(tmp_path / "model", V3)
    tensors = tensors_of(directory)
    tensors["model.norm.weight"][3] = 3.4e38  # bf16 ends at 3.39e38
    rewrite(directory, tensors)
    params_of(directory)
    assert "'model.norm.weight' holds NaN or Inf (first at [3], as bfloat16)" in refusal(directory, dtype="bfloat16")


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_experts_are_opened_in_place(tmp_path, stored):
    directory, params = write(tmp_path / "model", V3, dtype=stored)
    rewrite(directory, tensors_of(directory), shards=3)
    with Checkpoint(directory) as checkpoint:
        store = open_experts(checkpoint, CONFIG)
        assert_equal(load_params(checkpoint, CONFIG, abstract_params(CONFIG, stored, "host")),
                     without_experts(params))
    with store:
        assert (store.layers, store.experts, store.width, store.hidden) == (2, 8, 32, 16)
        for projection, stack in params["moe_layers"]["mlp"]["experts"].items():
            for layer, expert in np.ndindex(2, 8):
                np.testing.assert_array_equal(store.decode(layer, expert, projection),
                                              np.asarray(stack[layer, expert], np.float32))


def test_experts_that_do_not_fit_are_reported_at_once(tmp_path):
    directory, _ = write(tmp_path / "model", V3)
    tensors = tensors_of(directory)
    prefix = "model.layers.1.mlp.experts"
    del tensors[f"{prefix}.0.gate_proj.weight"]
    tensors[f"{prefix}.1.gate_proj.weight"] = np.zeros((32, 16), np.float32)
    tensors[f"{prefix}.2.gate_proj.weight"] = tensors[f"{prefix}.2.gate_proj.weight"].astype(np.float16)
    rewrite(directory, tensors)
    with Checkpoint(directory) as checkpoint, pytest.raises(CheckpointError) as caught:
        open_experts(checkpoint, CONFIG)
    for line in [rf"missing: {prefix}\.0\.gate_proj\.weight", rf"wrong shape: .*: {prefix}\.1\.gate_proj",
                 rf"wrong dtype: F16, experts on the host are BF16 or F32 .*: {prefix}\.2\.gate_proj"]:
        assert re.search(line, str(caught.value)), str(caught.value)
    assert "experts.2.gate_proj" in refusal(directory, experts="host")


def test_experts_of_mixed_dtypes_are_refused(tmp_path):
    directory, _ = write(tmp_path / "model", V3)
    tensors = tensors_of(directory)
    name = "model.layers.2.mlp.experts.4.up_proj.weight"
    tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)
    rewrite(directory, tensors)
    with Checkpoint(directory) as checkpoint, pytest.raises(CheckpointError, match=f"47 F32 and 1 BF16 .*{name}"):
        open_experts(checkpoint, CONFIG)


def test_experts_with_nan_are_refused_by_name(tmp_path):
    directory, _ = write(tmp_path / "model", V3)
    tensors = tensors_of(directory)
    tensors["model.layers.2.mlp.experts.4.up_proj.weight"][3, 3] = np.nan
    rewrite(directory, tensors)
    with Checkpoint(directory) as checkpoint:
        with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.experts\.4\.up_proj\.weight"):
            open_experts(checkpoint, CONFIG)
        open_experts(checkpoint, CONFIG, check=False).close()


def test_a_dense_model_has_no_store(tmp_path):
    directory, _ = write(tmp_path / "model", dense := V3 | {"first_k_dense_replace": 3})
    with Checkpoint(directory) as checkpoint:
        assert open_experts(checkpoint, ModelConfig.from_json(dense)) is None


def test_saving_over_a_model_is_refused(tmp_path):
    directory, params = write(tmp_path / "model", V3)
    before = (directory / SINGLE).stat()
    with pytest.raises(CheckpointError, match="already holds model.safetensors"):
        save_checkpoint(directory, params, V3, shards=2)
    assert (directory / SINGLE).stat() == before and not (directory / INDEX).exists()


def test_every_shard_gets_a_tensor(tmp_path):
    params = {"embed_tokens": {"weight": np.zeros((1000, 8), np.float32)}, "norm": {"weight": np.zeros(8, np.float32)},
              "lm_head": {"weight": np.zeros((2, 8), np.float32)}}
    for shards in (1, 2, 3):
        directory = save_checkpoint(tmp_path / str(shards), params, {}, shards=shards)
        assert len(list(directory.glob("*.safetensors"))) == shards
        assert len(tensors_of(directory)) == 3
    with pytest.raises(ValueError, match="between 1 and the number of tensors, 3"):
        save_checkpoint(tmp_path / "4", params, {}, shards=4)


def test_grouped_names():
    grid = [f"a.{i}.b.{j}.c" for i in (0, 1, 3) for j in range(2)]
    assert names.grouped(grid) == "a.{0-1,3}.b.{0-1}.c (6)"
    assert names.grouped(grid[:2]) == "a.0.b.{0-1}.c (2)"
    assert names.grouped(grid[:5]) == ", ".join(grid[:5])
    assert names.grouped(["x.{}.y", "x\x1b.1.z"]) == r"x.{}.y, x\x1b.1.z"
    assert names.grouped(["a.01.b", "a.1.b", "a.2.b", "a.3.b", "a.4.b"]) == "a.01.b, a.{1-4}.b (4)"
    many = names.grouped([f"t{i}" for i in range(100)])
    assert many.endswith("t19, ... 80 more")
    ragged = names.grouped([f"a.{i}.b.{j}.c" for i in range(40) for j in range(40) if i != j])
    assert "more like a.*.b.*.c" in ragged and len(ragged) < 400
