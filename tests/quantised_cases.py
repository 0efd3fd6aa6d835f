"""Checkpoints in the published quantised formats, made from whole ones by arithmetic that kjax has no part in."""

import json

import ml_dtypes
import numpy as np
from weights_cases import V3, rewrite, tensors_of

BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
# Sizes that are no multiples of 128 or 32: partial blocks along both axes, one row of blocks and several.
SIZES = V3 | {"hidden_size": 160, "intermediate_size": 144, "moe_intermediate_size": 136, "qk_nope_head_dim": 32,
              "v_head_dim": 34, "num_hidden_layers": 2}  # fmt: skip

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def _compressed(layout, weights):
    group = {"input_activations": None, "output_activations": None, "targets": ["Linear"], "weights": weights}
    return {"quant_method": "compressed-tensors", "format": layout, "quantization_status": "compressed",
            "kv_cache_scheme": None, "ignore": ["lm_head"], "config_groups": {"group_0": group}}


INT4 = _compressed("pack-quantized", {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group",
                                      "group_size": 32, "actorder": None, "dynamic": False})
CHANNEL = _compressed("float-quantized", {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel",
                                          "dynamic": False})
INT8 = _compressed("int-quantized", {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "group",
                                     "group_size": 128, "actorder": None, "dynamic": False})
SETTINGS = {"fp8": FP8, "ue8m0": FP8 | {"scale_fmt": "ue8m0"}, "channel": CHANNEL, "channel_bf16": CHANNEL,
            "int4": INT4, "int8": INT8}


def to_e4m3(numbers):
    """By torch where it is installed, else by ml_dtypes: both round to nearest even."""
    try:
        import torch
    except ImportError:
        return numbers.astype(E4M3)
    return torch.from_numpy(np.ascontiguousarray(numbers)).to(torch.float8_e4m3fn).view(torch.uint8).numpy().view(E4M3)


def blockwise(scales, block, shape):
    """A scale for every weight: [out,in] from [blocks,blocks]."""
    return np.kron(scales, np.ones(block, np.float32))[:shape[0], :shape[1]].astype(np.float32)


def fp8(weight, block, power_of_two=False, dtype=np.float32):
    """(codes, scales in dtype, the weight they mean as bf16) of a float32 weight [out,in]."""
    out, in_ = weight.shape
    rows, columns = -(-out // block[0]), -(-in_ // block[1])
    padded = np.zeros((rows * block[0], columns * block[1]), np.float32)
    padded[:out, :in_] = weight
    scales = np.abs(padded.reshape(rows, block[0], columns, block[1])).max((1, 3)) / 448
    scales = np.exp2(np.ceil(np.log2(scales))) if power_of_two else scales
    stored = scales.astype(dtype)
    scales = stored.astype(np.float32)
    codes = to_e4m3(weight / blockwise(scales, block, weight.shape))
    return codes, stored, (codes.astype(np.float32) * blockwise(scales, block, weight.shape)).astype(BF16)


def grouped(weight, width, scale, low, high):
    """(numbers int64, bf16 scales, the weight they mean in fp32, padded to whole groups) of a float32 weight."""
    out, groups = weight.shape[0], -(-weight.shape[1] // width)
    padded = np.zeros((out, groups * width), np.float32)
    padded[:, :weight.shape[1]] = weight
    scales = (np.abs(padded.reshape(out, groups, width)).max(-1) / scale).astype(BF16)
    spread = blockwise(scales.astype(np.float32), (1, width), padded.shape)
    numbers = np.clip(np.rint(padded / spread), low, high).astype(np.int64)
    return numbers, scales, (numbers * spread).astype(np.float32)


def int8(weight):
    """(codes, bf16 scales [out, in/128], the weight they mean as bf16) of a float32 weight [out,in]."""
    numbers, scales, meant = grouped(weight, 128, 127, -127, 127)
    width = weight.shape[1]
    return numbers[:, :width].astype(np.int8), scales, np.ascontiguousarray(meant[:, :width].astype(BF16))


def int4(weight):
    """(packed int32 [out, in/8], bf16 scales [out, in/32], the weight they mean as bf16) of a float32 weight."""
    out, in_ = weight.shape
    numbers, scales, meant = grouped(weight, 32, 7.5, -8, 7)
    words = -(-in_ // 8)
    packed = np.zeros((out, words), np.uint32)
    for column in range(words * 8):
        packed[:, column // 8] |= (numbers[:, column] + 8).astype(np.uint32) << np.uint32(4 * (column % 8))
    return packed.view(np.int32), scales, np.ascontiguousarray(meant.astype(BF16)[:, :in_])


def quantise(tensors, kind):
    """(the quantised tensors, the same model in bf16) of a checkpoint's float32 tensors."""
    stored, meant = {}, {}
    for name, array in tensors.items():
        routed, linear = ".mlp.experts." in name, "_proj" in name and name.endswith(".weight")
        if kind == "int4" and routed:
            packed, scales, meant[name] = int4(array)
            shape = np.array(array.shape, np.int64 if ".up_proj" in name else np.int32)
            stored |= {f"{name}_packed": packed, f"{name}_scale": scales, f"{name}_shape": shape}
        elif kind == "int8" and routed:
            stored[name], stored[f"{name}_scale"], meant[name] = int8(array)
        elif not kind.startswith("int") and linear:
            channel = kind.startswith("channel")
            stored[name], scales, meant[name] = fp8(
                array, (1, array.shape[1]) if channel else (128, 128), power_of_two=kind == "ue8m0",
                dtype=BF16 if kind == "channel_bf16" else np.float32)
            stored[name + ("_scale" if channel else "_scale_inv")] = scales
        else:
            keep = array if name.endswith("e_score_correction_bias") else array.astype(BF16)
            stored[name] = meant[name] = keep
    return stored, meant


def write(directory, source, kind):
    """The whole checkpoint `source` as quantised and as the bf16 one that means the same: two directories.

    Scales come first and then the weights, spread over three shards.
    """
    stored, meant = quantise(tensors_of(source), kind)
    made = []
    config_json = json.loads((source / "config.json").read_text())
    for name, tensors, extra in (("stored", stored, {"quantization_config": SETTINGS[kind]}), ("meant", meant, {})):
        made.append(directory / f"{kind}-{name}")
        made[-1].mkdir()
        (made[-1] / "config.json").write_text(json.dumps(config_json | extra))
        for file in source.glob("tokenizer*.json"):
            (made[-1] / file.name).write_bytes(file.read_bytes())
        rewrite(made[-1], dict(sorted(tensors.items(), key=lambda item: "_scale" not in item[0])), shards=3)
    return *made, stored, meant
