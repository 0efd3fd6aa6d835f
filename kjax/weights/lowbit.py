"""Weights in 8 or 4 bits on the device: codes with one scale for each block of them.

    W[o,i] = bf16(value(code[o,i]) * scale[o // rows, i // columns])        the product in fp32, rounded once

They are quantised on the host while they are loaded and dequantised on the device, layer by layer, inside the scan. In
the parameter tree a weight that is held so has, in place of its leaf `weight` [O,I], the name of its format:
`o_proj/nf4/codes` uint8 [O,I/2] and `o_proj/nf4/scales` bf16 [O,I/64] (with the layers of a stack in front). So the
tree itself says how each weight is to be read. Adapters, norms and biases are not quantised.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from kjax.offload import formats
from kjax.offload.formats import BAND, Format
from kjax.weights.encode import encode
from kjax.weights.safetensors import DTYPES

# 15 G weights of DeepSeek-V3 in 4 bits with a bf16 scale for each 64 take 8.1 GB; groups of 32 would take 8.5 GB.
FORMATS = {
    "fp8_block": formats.FORMATS["fp8_block"],
    "fp8_channel": formats.FORMATS["fp8_channel"],
    "int8": formats.FORMATS["int8_group128"],
    "nf4": Format("U8", "BF16", (1, 64), packed=2),
    "int4": Format("U8", "BF16", (1, 64), packed=2),
}
SETTINGS = ("full", "8bit", "nf4", "int4")  # the values of config.Model.weights

# NormalFloat (QLoRA, arXiv:2305.14314): quantiles of the normal distribution, scaled to [-1, 1], with 0 among them.
NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], np.float32)  # fmt: skip
_NF4_BOUNDS = (NF4[1:] + NF4[:-1]) / 2  # a number goes to the nearest value

FP8_MAX = 448.0  # of e4m3
_STORED = {"int8": "int8_group128"}  # formats that checkpoints call otherwise


def of(path: str, weights: str, quantization) -> str | None:
    """The format of the leaf at `path` (`moe_layers/self_attn/o_proj/weight`); None: it stays as it is.

    weights: one of SETTINGS.  quantization: of the checkpoint (kjax.models.quantization). The choice of experts and the
    norms are too sensitive and too small to quantise; so is every logit, whence 8 bits for the output head.
    """
    *_, module, leaf = ("", *path.split("/"))
    if weights == "full" or leaf != "weight":
        return None
    if module == "lm_head":
        return "int8"
    if "_proj" not in module:  # Hugging Face calls every linear layer *_proj*, and neither the router nor a norm
        return None
    if weights != "8bit":
        return weights
    return quantization.format if quantization is not None and quantization.format in FORMATS else "int8"


def hosts_table(config, weights: str) -> bool:
    """Whether the embedding table stays in host memory: wherever weights are low-bit and no output head needs it."""
    return weights != "full" and not config.tie_word_embeddings


def held(tree: Mapping, weights: str, quantization) -> dict:
    """The shapes of a parameter tree as it lies on the device, from those of the whole one."""
    leaves = {}
    for path, leaf in flatten_dict(tree, sep="/").items():
        form = of(path, weights, quantization)
        if form is None:
            leaves[path] = leaf
        else:
            leaves |= {f"{name(path, form)}/{part}": shape for part, shape in shapes(form, leaf.shape).items()}
    return unflatten_dict(leaves, sep="/")


def name(path: str, form: str) -> str:
    """What stands in place of the leaf at `path`: `.../o_proj/weight` becomes `.../o_proj/nf4`."""
    return path.removesuffix("weight") + form


def shapes(form: str, shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    """The codes and scales of a stack of weights [...,O,I]."""
    made, stack = FORMATS[form], shape[:-2]
    return {"codes": jax.ShapeDtypeStruct((*stack, *made.shape(*shape[-2:])), DTYPES[made.dtype]),
            "scales": jax.ShapeDtypeStruct((*stack, *made.scales_shape(*shape[-2:])), DTYPES[made.scale_dtype])}


def find(parameters: Mapping) -> str | None:
    """The format of a module's weight, from the names of its parameters; None where it is whole."""
    return next((form for form in FORMATS if form in parameters), None)


def dequantise(form: str, parts: Mapping, width: int, dtype) -> jax.Array:
    """W [O,I] in dtype; parts: its codes and scales as arrays, width: I."""
    made, codes = FORMATS[form], parts["codes"]
    rows, columns = made.block[0], made.block[1] or width
    scales = jnp.repeat(parts["scales"].astype(jnp.float32), columns, axis=1)[:, :width]
    if rows > 1:
        scales = jnp.repeat(scales, rows, axis=0)[:codes.shape[0]]
    numbers = _values(form, codes) if made.packed == 1 else _values(form, _unpacked(codes))[:, :width]
    # Rounded by reduce_precision: XLA may drop a conversion to bf16 and back where dtype is wider.
    return jax.lax.reduce_precision(numbers * scales, exponent_bits=8, mantissa_bits=7).astype(dtype)


def _unpacked(codes):
    """[O,I/2] bytes -> [O,I] numbers below 16; the low half of a byte comes first."""
    return ((codes[:, :, None] >> jnp.array([0, 4], jnp.uint8)) & 15).reshape(codes.shape[0], -1)


def _values(form: str, codes):
    if form == "nf4":
        return jnp.asarray(NF4)[codes]
    return codes.astype(jnp.float32) - (8 if form == "int4" else 0)


def quantise(form: str, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(codes, scales) as stored, of rows of a weight [n,I] fp32 that begin at a multiple of BAND.

    Finite numbers give finite ones. Deterministic: plain fp32 arithmetic, every number to the nearest value of its
    block's scale.
    """
    made = FORMATS[form]
    codes = np.empty(made.shape(*weight.shape), DTYPES[made.dtype])
    scales = np.empty(made.scales_shape(*weight.shape), DTYPES[made.scale_dtype])
    for start in range(0, len(weight), BAND):  # little memory beside the result, most of it in a cache
        band = weight[start : start + BAND]
        blocks = slice(start // made.block[0], math.ceil((start + len(band)) / made.block[0]))
        found = _4bit(form, band) if made.packed == 2 else encode(_STORED.get(form, form), band)
        codes[start : start + BAND], scales[blocks] = found
    return codes, scales


def _4bit(form: str, band: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    made, width = FORMATS[form], band.shape[1]
    columns = made.block[1]
    groups = np.pad(band, ((0, 0), (0, -width % columns))).reshape(len(band), -1, columns)
    high, low = groups.max(axis=2), groups.min(axis=2)
    if form == "nf4":
        scales = np.maximum(high, -low)
    else:
        # -8 stands for the largest number, whichever its sign. Of normal weights' size the error is 9.5 %; it would be
        # 10.3 % with the largest magnitude / 7.5 and 10.8 % with / 7.
        scales = np.where(high > -low, high, low) / np.float32(-8)
    scales = scales.astype(DTYPES[made.scale_dtype])
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratio = groups / scales.astype(np.float32)[:, :, None]
    ratio = np.where(np.isfinite(ratio), ratio, 0)  # a block of zeros, or of numbers too small for a scale
    codes = _nf4_codes(ratio) if form == "nf4" else (np.clip(np.rint(ratio), -8, 7) + 8).astype(np.uint8)
    codes = codes.reshape(len(band), -1)[:, : width + width % 2]
    return codes[:, ::2] | codes[:, 1::2] << 4, scales


def _nf4_codes(ratio: np.ndarray) -> np.ndarray:
    codes = np.zeros(ratio.shape, np.uint8)
    for bound in _NF4_BOUNDS:  # six times as fast as np.searchsorted
        codes += ratio > bound
    return codes
