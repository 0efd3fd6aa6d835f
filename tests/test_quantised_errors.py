"""Quantised checkpoints that do not fit, are damaged or not understood: refused with the tensor or key named."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
import quantised_cases as cases
import weights_cases
from test_weights_load import params_of

import kjax
from kjax.errors import CheckpointError
from kjax.models import ModelConfig, abstract_params
from kjax.offload import ExpertStore
from kjax.offload.formats import Quantised
from kjax.weights import load
from kjax.weights.safetensors import Checkpoint


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, make):
    return lambda tensors: tensors.update({name: make(tensors[name])})


ATTENTION, EXPERT = "model.layers.0.self_attn.o_proj.weight", "model.layers.1.mlp.experts.3.up_proj.weight"
BAD_TENSORS = [
    ("fp8", drop(f"{ATTENTION}_scale_inv"), rf"missing: {ATTENTION}_scale_inv"),
    ("fp8", drop(f"{EXPERT}_scale_inv"), rf"missing: {EXPERT}_scale_inv"),
    ("fp8", put(f"{ATTENTION}_scale_inv", lambda a: a[:1]),
     rf"wrong shape: \[1, 2\], expected \[2, 2\]: {ATTENTION}_scale_inv"),
    ("fp8", put(f"{EXPERT}_scale_inv", lambda a: a.T[:1]),
     rf"wrong shape: \[1, 2\], expected \[2, 2\]: {EXPERT}_scale_inv"),
    ("fp8", put(f"{EXPERT}_scale_inv", lambda a: a.astype(np.float16)),
     rf"wrong dtype: F16, expected F32: {EXPERT}_scale_inv"),
    ("fp8", put(ATTENTION, lambda a: a.astype(np.float32)), rf"not part of this model: {ATTENTION}_scale_inv"),
    ("fp8", put(ATTENTION, lambda a: a[:, :-1].copy()), rf"wrong shape: \[160, 135\], expected .*: {ATTENTION}"),
    ("fp8", lambda t: t.update({EXPERT: t[EXPERT].astype(np.float32)}) or t.pop(f"{EXPERT}_scale_inv"),
     rf"23 fp8_block and 1 F32 routed experts.*{EXPERT}"),
    ("channel", drop(f"{EXPERT}_scale"), rf"missing: {EXPERT}_scale"),
    ("channel", put(f"{ATTENTION}_scale", lambda a: a[:, 0].copy()), r"wrong shape: \[160\], expected \[160, 1\]"),
    ("int4", drop(f"{EXPERT}_scale"), rf"missing: {EXPERT}_scale"),
    ("int4", drop(f"{EXPERT}_packed"), rf"missing: {EXPERT}_packed"),
    ("int4", drop(f"{EXPERT}_shape"), rf"missing: {EXPERT}_shape"),
    ("int4", put(f"{EXPERT}_shape", lambda a: a[::-1].copy()),
     rf"wrong shape: it says \[160, 136\], the weight is \[136, 160\]: {EXPERT}_shape"),
    ("int4", put(f"{EXPERT}_shape", lambda a: a[:1]), rf"wrong shape: \[1\], expected \[2\]: {EXPERT}_shape"),
    ("int4", put(f"{EXPERT}_shape", lambda a: a.astype(np.float32)), rf"wrong dtype: F32, .*: {EXPERT}_shape"),
    ("int4", put(f"{EXPERT}_packed", lambda a: a[:, 1:].copy()), rf"wrong shape: .*\[136, 20\]: {EXPERT}_packed"),
    ("int4", put(f"{EXPERT}_scale", lambda a: a.astype(np.float32)),
     rf"wrong dtype: F32, expected BF16: {EXPERT}_scale"),
]  # fmt: skip


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """The tensors of one model in each format, with sizes that leave partial blocks."""
    directory, _ = weights_cases.write(tmp_path_factory.mktemp("whole") / "model", cases.SIZES)
    tensors = weights_cases.tensors_of(directory)
    return {kind: cases.quantise(tensors, kind)[0] for kind in ("fp8", "channel", "int4")}


@pytest.mark.parametrize("experts", ["host", "device"])
@pytest.mark.parametrize(("kind", "change", "message"), BAD_TENSORS)
def test_tensors_that_do_not_fit(quantised, tmp_path, kind, change, message, experts):
    tensors = dict(quantised[kind])
    change(tensors)
    weights_cases.rewrite(tmp_path, tensors)
    config = ModelConfig.from_json(cases.SIZES | {"quantization_config": cases.SETTINGS[kind]})
    if "routed experts" in message and experts == "device":
        params_of(tmp_path, config, "bfloat16", "device")  # in device memory all are bf16
        return
    with pytest.raises(CheckpointError, match=message):
        params_of(tmp_path, config, "bfloat16", experts)
    if "experts" in message and experts == "host" and "not part" not in message:
        with Checkpoint(tmp_path) as checkpoint, pytest.raises(CheckpointError, match=message):
            load.open_experts(checkpoint, config)


@pytest.mark.parametrize("name", [ATTENTION, EXPERT])
def test_the_code_of_nan_is_refused_by_name(quantised, tmp_path, name):
    tensors = dict(quantised["fp8"])
    codes = tensors[name].copy()
    codes.view(np.uint8)[130, 131] = 0xFF
    weights_cases.rewrite(tmp_path, tensors | {name: codes})
    (tmp_path / "config.json").write_text(json.dumps(cases.SIZES | {"quantization_config": cases.FP8}))
    with pytest.raises(CheckpointError, match=rf"NaN or Inf in routed experts[^/]*{name}|{name}' holds NaN or Inf"):
        kjax.load(tmp_path)


def test_scales_that_overflow_are_refused_by_name(quantised, tmp_path):
    tensors = dict(quantised["fp8"])
    tensors[f"{ATTENTION}_scale_inv"] = np.full_like(tensors[f"{ATTENTION}_scale_inv"], 3e38)
    weights_cases.rewrite(tmp_path, tensors)
    config = ModelConfig.from_json(cases.SIZES | {"quantization_config": cases.FP8})
    with pytest.raises(CheckpointError, match=f"{ATTENTION}' holds NaN or Inf"):
        params_of(tmp_path, config, "bfloat16", "host")


@dataclasses.dataclass(frozen=True)
class Entry:
    name: str
    path: str
    dtype: str
    shape: tuple
    begin: int
    end: int = 0


def changed(weight, part, **what):
    return dataclasses.replace(weight, **{part: dataclasses.replace(getattr(weight, part), **what)})


@pytest.mark.parametrize(("change", "message"), [
    (lambda w: w.codes, r"w: F8_E4M3 experts are not supported without their scales"),
    (lambda w: changed(w, "scales", shape=(1, 2)), r"w_scale_inv: F32\[1, 2\], expected F32\[2, 2\]"),
    (lambda w: changed(w, "scales", dtype="BF16"), r"w_scale_inv: BF16\[2, 2\], expected F32\[2, 2\]"),
    (lambda w: changed(w, "codes", dtype="I8"), r"w: I8\[136, 160\], expected F8_E4M3\[136, 160\]"),
    (lambda w: changed(w, "scales", begin=66), r"w_scale_inv: its offset in the file, 66, is no multiple of 4"),
    (lambda w: dataclasses.replace(w, format="fp8_channel"), r"w: fp8_channel\[136, 160\], expected fp8_block\[136"),
])  # fmt: skip
def test_the_store_checks_for_itself(tmp_path, change, message):
    file = tmp_path / "shard"
    file.write_bytes(bytes(1 << 16))

    def weight(shape):
        return Quantised("w", "fp8_block", shape, Entry("w", str(file), "F8_E4M3", shape, 64),
                         Entry("w_scale_inv", str(file), "F32", (2, 2), 64))

    experts = [[{"gate_proj": weight((136, 160)), "up_proj": weight((136, 160)), "down_proj": weight((160, 136))}]]
    ExpertStore(experts).close()
    experts[0][0]["up_proj"] = change(weight((136, 160)))
    with pytest.raises(CheckpointError, match=message):
        ExpertStore(experts)


def group(**what):
    weights = cases.INT4["config_groups"]["group_0"]["weights"] | what
    return cases.INT4 | {"config_groups": {"group_0": {"weights": weights}}}


@pytest.mark.parametrize(("settings", "message"), [
    ([], "quantization_config = .*expected an object"),
    ({"bits": 4}, "quantization_config: quant_method: is missing"),
    ({"quant_method": "gptq"}, "quant_method = 'gptq': not understood"),
    (cases.FP8 | {"fmt": "e5m2"}, "fmt = 'e5m2': not supported"),
    (cases.FP8 | {"weight_block_size": [64, 128]}, r"weight_block_size = \[64, 128\]: not supported"),
    (cases.FP8 | {"weight_block_size": None}, "weight_block_size"),
    (cases.FP8 | {"activation_scheme": "static"}, "activation_scheme = 'static': not supported"),
    (cases.FP8 | {"scale_fmt": "e5m2"}, "scale_fmt = 'e5m2': not supported"),
    (cases.INT4 | {"format": "marlin-24"}, "format = 'marlin-24': not supported"),
    (cases.INT4 | {"format": ["x"]}, "format = .*not supported"),
    (cases.INT4 | {"quantization_status": "frozen"}, "quantization_status = 'frozen'"),
    (cases.INT4 | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
    (cases.INT4 | {"config_groups": {}}, "config_groups = {}: expected one group"),
    (cases.INT4 | {"config_groups": {"a": 1}}, "config_groups = .*expected one group"),
    (cases.INT4 | {"config_groups": {"a": {"weights": []}}}, "config_groups: a: weights"),
    (group(num_bits=8), "group_0: weights: num_bits = 8: not supported with format = 'pack-quantized', only 4"),
    (group(group_size=128), "group_size = 128"),
    (group(symmetric=False), "symmetric = False"),
    (group(actorder="weight"), "actorder = 'weight'"),
    (cases.CHANNEL | {"config_groups": group()["config_groups"]}, "num_bits = 4: not supported .*float-quantized"),
])  # fmt: skip
def test_quantisation_that_is_not_understood_is_refused_by_key(settings, message):
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_json(cases.SIZES | {"quantization_config": settings})


def test_unquantised_weights_under_a_config_that_says_otherwise(quantised, tmp_path):
    """An FP8 model whose weights were made bf16 but whose config still says FP8 loads as it is."""
    tensors = {name: array.astype(ml_dtypes.bfloat16) if array.dtype.itemsize == 1 else array
               for name, array in quantised["fp8"].items() if not name.endswith("_scale_inv")}
    weights_cases.rewrite(tmp_path, tensors)
    config = ModelConfig.from_json(cases.SIZES | {"quantization_config": cases.FP8})
    params = params_of(tmp_path, config, "bfloat16", "device")
    assert abstract_params(config, "bfloat16", "device").keys() == params.keys()
