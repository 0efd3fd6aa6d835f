"""Published quantised formats: what is loaded and what the host multiplies equal the bf16 weights that they mean."""

import dataclasses
import itertools
import json
import re
import tracemalloc

import ext_oracle
import family_cases
import jax
import ml_dtypes
import numpy as np
import pytest
import quantised_cases as cases
import tiny
import weights_cases
from rich.console import Console
from test_weights_load import assert_equal, params_of
from variant import variant

import kjax
from kjax import _ext, adapters, plan
from kjax.models import ModelConfig, abstract_params, unembed
from kjax.offload import formats, host_experts
from kjax.offload.formats import FORMATS, Quantised
from kjax.offload.store import PROJECTIONS
from kjax.weights import load
from kjax.weights.account import account, expert_sources
from kjax.weights.safetensors import Checkpoint

TOKENS = np.random.default_rng(0).integers(0, 96, (2, 19))
FORMATS_OF = {"channel": "fp8_channel", "channel_bf16": "fp8_channel", "ue8m0": "fp8_block"}
KINDS = ("fp8", "ue8m0", "channel", "int4")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A float32 checkpoint with sizes that leave partial blocks."""
    return weights_cases.write(tmp_path_factory.mktemp("whole") / "model", cases.SIZES)[0]


@pytest.fixture(scope="module", params=KINDS)
def pair(request, whole, tmp_path_factory):
    """(directory of the quantised checkpoint, of the bf16 one that means the same, its tensors)."""
    stored, meant, _, tensors = cases.write(tmp_path_factory.mktemp("pair"), whole, request.param)
    return stored, meant, tensors


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize(("rows", "columns"), [(300, 136), (128, 128), (5, 37), (129, 1)])
def test_any_rows_of_any_format(format_, rows, columns):
    made = FORMATS[format_]
    codes, scales, expected, _ = ext_oracle.quantised(np.random.default_rng(0), format_, 1, rows, columns)
    dtypes = {"F8_E4M3": np.uint8, "I32": "<i4", "I8": np.int8, "F32": np.float32, "BF16": ml_dtypes.bfloat16}
    codes = codes[0].view(dtypes[made.dtype]).reshape(made.shape(rows, columns))
    scales = scales[0].view(dtypes[made.scale_dtype]).reshape(made.scales_shape(rows, columns))
    for start, stop in ((0, rows), (1, rows), (rows // 2, rows // 2 + 1), (rows - 1, rows)):
        height = made.block[0]
        out = np.empty((stop - start, columns), np.float32)
        formats.decode(format_, codes[start:stop], scales[start // height:(stop - 1) // height + 1], out, start)
        np.testing.assert_array_equal(out, expected[0, start:stop])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("experts", ["host", "device"])
def test_loaded_weights_bit_for_bit(pair, dtype, experts):
    """Into fp32 too: a quantised weight means a bf16 number."""
    stored, meant, _ = pair
    configs = [ModelConfig.from_json(directory) for directory in (stored, meant)]
    assert configs[0].quantization and dataclasses.replace(configs[0], quantization=None) == configs[1]
    assert_equal(params_of(stored, configs[0], dtype, experts), params_of(meant, configs[1], dtype, experts))


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_blocks_that_split_scales(pair, monkeypatch, backend):
    """Blocks of 7 rows of the widest weight, on both paths."""
    stored, meant, _ = pair
    expected = params_of(meant, ModelConfig.from_json(meant), "bfloat16", "host")
    monkeypatch.setattr(load, "BLOCK", 7 * 160 * 4)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert_equal(params_of(stored, ModelConfig.from_json(stored), "bfloat16", "host"), expected)


def test_experts_in_place_bit_for_bit(pair):
    stored, _, tensors = pair
    config = ModelConfig.from_json(stored)
    with Checkpoint(stored) as checkpoint, load.open_experts(checkpoint, config) as store:
        assert store.format == config.quantization.format
        for expert in range(config.n_routed_experts):
            for name in ("gate_proj", "up_proj", "down_proj"):
                np.testing.assert_array_equal(store.decode(0, expert, name), np.float32(
                    tensors[f"model.layers.1.mlp.experts.{expert}.{name}.weight"]))


@pytest.mark.parametrize("storage", ["mapped", "resident"])
def test_bf16_scales_of_rows(whole, tmp_path, storage):
    """compressed-tensors writes scales in the dtype that the weights had: kernels get them as fp32."""
    stored, _, _, tensors = cases.write(tmp_path, whole, "channel_bf16")
    config = ModelConfig.from_json(stored)
    with Checkpoint(stored) as checkpoint:
        store = load.open_experts(checkpoint, config, storage=storage)
    with store:
        for layer in range(config.num_moe_layers):
            for expert, name in itertools.product(range(config.n_routed_experts), PROJECTIONS):
                tensor = f"model.layers.{config.num_dense_layers + layer}.mlp.experts.{expert}.{name}.weight"
                np.testing.assert_array_equal(store.decode(layer, expert, name), np.float32(tensors[tensor]))


def test_scales_lie_in_other_shards(pair):
    stored, _, _ = pair
    with Checkpoint(stored) as checkpoint:
        pairs = [(checkpoint.entry(name), checkpoint.entry(re.sub("_scale(_inv)?$", "", name) if
                  re.sub("_scale(_inv)?$", "", name) in checkpoint else name.replace("_scale", "_packed")))
                 for name in checkpoint.names() if "_scale" in name]
    assert sum(scale.path != codes.path for scale, codes in pairs) > len(pairs) / 3


def assert_same_sums(found, expected, format_, products=3):
    """Kernels of one format may add the same products in another order than those of bf16 do. That moves fp32 sums by
    some 2^-22, which rounds one number of h in 2000 to the next bf16, 2^-8 of it away. Kernels may leave weights
    unrounded (ext/kernels.h), not those of FP8 in blocks in products of bf16. Such are up to 2^-9 from the copy's in
    each of the products that follow one another: for weights that share a scale and have few codes the signs are
    alike."""
    rounded = format_ == "fp8_block" and _ext.isa()["name"] in ("amx", "amx_soft", "avx512bf16")
    rounding = 0 if rounded else products * 2.0**-9
    assert np.abs(expected).max() > 0
    assert np.linalg.norm(found - expected) <= (2.0**-12 + rounding) * np.linalg.norm(expected)


def test_logits_are_those_of_the_bf16_copy(pair):
    """The same products of the same numbers."""
    stored, meant, _ = pair
    with kjax.load(stored) as model, kjax.load(meant) as copy:
        assert model.store.format != "bf16"
        logits, expected = (np.asarray(m.logits(TOKENS)) for m in (model, copy))
        assert_same_sums(logits, expected, model.store.format)


@pytest.mark.parametrize(("family", "kind"), [
    variant("glm4_moe qk_norm", "channel"), variant("glm4_moe", "channel_bf16"), ("deepseek_v32", "ue8m0")])
def test_whole_models_as_they_are_published(tmp_path, family, kind):
    """GLM's FP8 and DeepSeek-V3.2's, with prediction layer and indexer beside what is loaded."""
    content = family_cases.content(family, 0) | {"vocab_size": 96, "hidden_size": 160, "moe_intermediate_size": 136}
    weights_cases.write(tmp_path / "whole", content)
    stored, meant, tensors, _ = cases.write(tmp_path, tmp_path / "whole", kind)
    if kind == "ue8m0":
        scales = [array for name, array in tensors.items() if name.endswith("_scale_inv")]
        assert all((np.frexp(array)[0] == 0.5).all() for array in scales)
    last, beyond = content["num_hidden_layers"] - 1, content["num_hidden_layers"]
    extra = {name.replace(f"layers.{last}.", f"layers.{beyond}."): array for name, array in tensors.items()
             if f"layers.{last}." in name}
    if family == "deepseek_v32":
        extra |= {name.replace("q_a_proj", "indexer.wk"): array for name, array in tensors.items()
                  if "q_a_proj" in name}
    assert len(extra) > 20
    weights_cases.rewrite(stored, tensors | extra, shards=2)
    tokens = TOKENS[:, :16]  # within index_topk
    with kjax.load(stored, dtype="float32") as model, kjax.load(meant, dtype="float32") as copy:
        assert model.store.format == FORMATS_OF[kind] and copy.store.format == "bf16"
        logits, expected = (np.asarray(m.logits(tokens)) for m in (model, copy))
        assert_equal(model.params, copy.params)
    assert_same_sums(logits, expected, FORMATS_OF[kind])
    with kjax.load(stored, dtype="float32", weights="8bit") as model:  # its own codes, and an INT8 head
        errors = np.asarray(model.logits(tokens)) - expected
    assert 0 < np.abs(errors).max() <= 0.02 * np.abs(expected).max()


def test_plan_counts_the_bytes_of_the_files(pair):
    content, config = json.loads((pair[0] / "config.json").read_text()), ModelConfig.from_json(pair[0])
    of_experts, of_others = plan.formats(content | {"dtype": "bfloat16"}, config.quantization, "config.json")
    with Checkpoint(pair[0]) as checkpoint:
        hosted = [source for expert in expert_sources(checkpoint, config)[0] for source in expert.values()]
        others = [source for source, place in account(checkpoint, config, abstract_params(config, "bfloat16"))
                  if "_proj" in place.leaf and len(source.shape) == 2]
    assert len(hosted) == 24 and len(others) > 10
    for source, planned in [(source, of_experts) for source in hosted] + [(source, of_others) for source in others]:
        tensors = (source.codes, source.scales) if isinstance(source, Quantised) else (source,)
        assert planned.bytes(*source.shape) == sum(entry.end - entry.begin for entry in tensors)


def test_memory_beside_the_result_is_bounded(tmp_path, monkeypatch):
    directory, _ = weights_cases.write(tmp_path / "model", cases.SIZES | {"intermediate_size": 4000})
    stored, *_ = cases.write(tmp_path, directory, "fp8")
    monkeypatch.setattr(load, "BLOCK", 1 << 16)
    monkeypatch.setattr(formats, "BAND", 16)
    config = ModelConfig.from_json(stored)
    params_of(stored, config, "bfloat16", "host")
    tracemalloc.start()
    params = params_of(stored, config, "bfloat16", "host")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    up = params["dense_layers"]["mlp"]["up_proj"]["weight"]
    assert up.nbytes > 16 * load.BLOCK
    leaves = jax.tree.leaves(params)
    # At worst 2 * WORKERS blocks in hand, each as codes, a mask and scales, and WORKERS bands as fp32, thrice:
    # less than 2 blocks for each. 500 kB of Python objects.
    assert peak < sum(leaf.nbytes for leaf in leaves) + 2 * load.WORKERS * 2 * load.BLOCK + 500_000


def test_gradients_are_those_of_the_bf16_copy(pair):
    """Forward and backward of one layer's experts, both ways through the weights."""
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((40, 160)).astype(np.float32) for _ in range(2))
    idx = np.stack([rng.permutation(8)[:3] for _ in range(40)]).astype(np.int32)
    gate = rng.random((40, 3)).astype(np.float32)
    results = []
    for directory in pair[:2]:
        with Checkpoint(directory) as checkpoint, load.open_experts(
                checkpoint, ModelConfig.from_json(directory)) as store:
            y, vjp = jax.vjp(lambda x, gate, store=store: host_experts(store, 0, x, idx, gate), x, gate)
            results.append(jax.tree.map(np.asarray, (y, *vjp(dy))))
    format_ = ModelConfig.from_json(pair[0]).quantization.format
    for found, expected in zip(*results, strict=True):
        assert_same_sums(found, expected, format_, products=6)


@pytest.mark.parametrize("kind", ["fp8", variant("int4")])
def test_training(tmp_path, kind):
    """A step, and an adapter that changes the logits of the quantised base and of its bf16 copy alike."""
    tiny.model(tmp_path / "model", hidden_size=160, moe_intermediate_size=136, num_hidden_layers=2)
    made = cases.write(tmp_path, tmp_path / "model", kind)[:2]
    run = kjax.train(tiny.settings(tmp_path, model__directory=str(made[0]), train__steps=1, data__val_size=0.0),
                     console=Console(quiet=True))
    assert run.status == "finished" and np.isfinite(run.losses).all()
    with kjax.load(made[0], run.adapter, dtype="float32") as model:
        format_ = model.store.format
        base, plain = model.base, model.transformer.clone(lora=None)
        adapted = np.asarray(model.logits(TOKENS))
        positions = np.broadcast_to(np.arange(19), TOKENS.shape)
        hidden = plain.apply({"params": model.params}, TOKENS, positions, np.ones_like(TOKENS))
        assert np.abs(adapted - np.asarray(unembed(model.params, hidden))).max() > 1e-3
    assert json.loads((run.adapter / adapters.RECORD).read_text())["base"]["weights"] == base.weights
    with pytest.warns(UserWarning, match="config.json"), kjax.load(made[1], run.adapter, dtype="float32") as model:
        assert_same_sums(np.asarray(model.logits(TOKENS)), adapted, format_)
