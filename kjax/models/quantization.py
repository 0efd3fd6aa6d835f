"""How a checkpoint's weights are quantised, read from quantization_config; what is not understood is refused by key."""

import json
from dataclasses import dataclass


@dataclass(frozen=True)
class Quantization:
    """One of the published formats.

    format: a key of kjax.offload.formats.FORMATS.
    Of a weight `X.weight`, the codes are the tensor `X.weight` + codes, the scales `X.weight` + scales, and where it is
    not empty, `X.weight` + shape holds [out, in].
    """

    format: str
    codes: str
    scales: str
    shape: str = ""


FP8_BLOCK = Quantization("fp8_block", "", "_scale_inv")
FP8_CHANNEL = Quantization("fp8_channel", "", "_scale")
INT4_GROUP = Quantization("int4_group32", "_packed", "_scale", "_shape")
INT8_GROUP = Quantization("int8_group128", "", "_scale")


def read(keys) -> Quantization | None:
    """From the `Keys` of a config.json; None where the weights are stored whole."""
    content = keys.get("quantization_config", None)
    if content is None:
        return None
    if not isinstance(content, dict):
        keys.fail("quantization_config", "expected an object")
    found = type(keys)(f"{keys.where}: quantization_config", content)
    method = found.get("quant_method")
    if method == "fp8":
        found.only("fmt", "e4m3")
        found.only("activation_scheme", "dynamic")
        found.only("scale_fmt", "ue8m0")  # scales are powers of two then, stored as float32 all the same
        if found.get("weight_block_size") != [128, 128]:
            found.fail("weight_block_size", "not supported, only [128, 128]")
        return FP8_BLOCK
    if method == "compressed-tensors":
        return _compressed_tensors(found)
    found.fail("quant_method", "not understood, only fp8 and compressed-tensors; give a BF16 copy of the checkpoint")


# What `weights` of a group says, by the checkpoint's `format`.
_WEIGHTS = {
    "pack-quantized": ({"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
                       INT4_GROUP),
    "int-quantized": ({"num_bits": 8, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128},
                      INT8_GROUP),
    "float-quantized": ({"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}, FP8_CHANNEL),
}  # fmt: skip


def _compressed_tensors(keys) -> Quantization:
    layout = keys.get("format")
    if not isinstance(layout, str) or layout not in _WEIGHTS:
        keys.fail("format", f"not supported, only {' and '.join(_WEIGHTS)}")
    keys.only("quantization_status", "compressed")
    for key in ("kv_cache_scheme", "transform_config", "sparsity_config"):
        value = keys.get(key, None)
        if value and value != {"format": "dense"}:
            keys.fail(key, "not supported")
    groups = keys.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1 or not all(isinstance(g, dict) for g in groups.values()):
        keys.fail("config_groups", "expected one group")
    name, group = next(iter(groups.items()))
    group = type(keys)(f"{keys.where}: config_groups: {name}", group)
    if not isinstance(group.get("weights"), dict):
        group.fail("weights", "expected an object")
    weights = type(keys)(f"{group.where}: weights", group.content["weights"])
    expected, made = _WEIGHTS[layout]
    for key, value in expected.items():
        if weights.get(key) != value:
            weights.fail(key, f"not supported with format = {layout!r}, only {json.dumps(value)}")
    if weights.get("actorder", None) is not None:
        weights.fail("actorder", "not supported: the groups must be in the order of the columns")
    return made
