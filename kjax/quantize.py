"""`kjax quantize`: a checkpoint whose routed experts have 8 or 4 bits, out of one in bf16, f16, fp32 or FP8.

The result is a checkpoint like any other: experts in the `compressed-tensors` layout that Kimi-K2-Thinking is published
in (INT4 in groups of 32) or its 8-bit sister (INT8 in groups of 128), scales in bf16. Everything else is copied as it
is, except that FP8 weights outside of the routed experts become bf16: a config.json names one format only.
"""

import json
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kjax.errors import CheckpointError, ConfigError
from kjax.models import ModelConfig
from kjax.models.quantization import FP8_BLOCK, FP8_CHANNEL, INT4_GROUP, INT8_GROUP, Quantization
from kjax.offload.formats import FORMATS, Quantised, decode
from kjax.weights import stored
from kjax.weights.encode import encode
from kjax.weights.files import quote
from kjax.weights.rewrite import check_target, identify, rewrite
from kjax.weights.safetensors import Checkpoint
from kjax.weights.writer import Part, Tensor, copied

ROUTED = re.compile(r"\.mlp\.experts\.\d+\.(gate_proj|up_proj|down_proj)\.weight$")  # of every layer, MTP's too
READABLE = (None, FP8_BLOCK, FP8_CHANNEL)


@dataclass(frozen=True)
class Scheme:
    """A format to quantise to: how its tensors are named, and what config.json says of it."""

    made: Quantization
    layout: str  # the `format` of compressed-tensors
    bits: int
    group: int

    def config(self, ignore: list[str]) -> dict:
        weights = {"num_bits": self.bits, "type": "int", "symmetric": True, "strategy": "group",
                   "group_size": self.group, "actorder": None, "block_structure": None, "dynamic": False,
                   "observer": "minmax", "observer_kwargs": {}}
        group = {"input_activations": None, "output_activations": None, "targets": ["Linear"], "weights": weights}
        return {"quant_method": "compressed-tensors", "format": self.layout, "quantization_status": "compressed",
                "kv_cache_scheme": None, "global_compression_ratio": None, "ignore": ignore,
                "config_groups": {"group_0": group}}


SCHEMES = {"int8": Scheme(INT8_GROUP, "int-quantized", 8, 128), "int4": Scheme(INT4_GROUP, "pack-quantized", 4, 32)}
# The linear layers that stay whole, for readers that would look for codes in them: Kimi's list, and MTP's own layer.
IGNORED = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
           "re:.*eh_proj.*"]


@dataclass
class Errors:
    """Squared errors and squares of what was quantised, by projection; added to from several threads."""

    sums: dict[str, list[float]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, kind: str, wanted: np.ndarray, got: np.ndarray):
        difference = (got - wanted).ravel()
        with self._lock:
            sums = self.sums.setdefault(kind, [0.0, 0.0, 0.0])
            sums[0] += float(difference @ difference)
            sums[1] += float(wanted.ravel() @ wanted.ravel())
            sums[2] = max(sums[2], float(np.abs(difference).max(initial=0)))

    def __str__(self) -> str:
        return "\n".join(f"{kind}: relative error {np.sqrt(error / max(whole, 1e-300)):.3%} (root of squares), "
                         f"largest {largest:.3g}" for kind, (error, whole, largest) in sorted(self.sums.items()))


@dataclass(frozen=True)
class Quantized:
    """What was written; print it. errors are those of the shards that this run wrote."""

    directory: Path
    before: int  # bytes of the tensors
    after: int
    errors: Errors

    def __str__(self) -> str:
        return (f"{self.directory}: {self.after / 1e9:.2f} GB, {self.before / 1e9:.2f} GB before\n{self.errors}"
                ).rstrip()


def quantize(source: str | os.PathLike, target: str | os.PathLike, format: str, *, progress: bool = True) -> Quantized:
    """Writes the checkpoint `source` to the new directory `target`, its routed experts in `format`, "int8" or "int4".

    Shards keep their names. The source is never changed. An interrupted run is gone on with by the same call: it left
    `target`.partial, whose finished shards are checked and kept. Takes some hundred MB of memory whatever the model.
    """
    if format not in SCHEMES:
        raise ConfigError(f"format {format!r}: expected {' or '.join(SCHEMES)}")
    scheme, errors = SCHEMES[format], Errors()
    with Checkpoint(source) as checkpoint:
        check_target(checkpoint, Path(target).absolute())
        content = checkpoint.config_json
        present = ModelConfig.from_json(content, str(checkpoint.config_path)).quantization
        if present not in READABLE:
            raise CheckpointError(f"{checkpoint.directory}: its experts are quantised already ({present.format}); "
                                  "quantise the bf16 or FP8 checkpoint that it was made from")
        weights = stored.weights(checkpoint, present)
        if not any(map(ROUTED.search, weights)):
            raise CheckpointError(f"{checkpoint.directory}: no routed experts (*.mlp.experts.N.*_proj.weight)")
        shard_of, shards = {path: name for name, path in checkpoint.shards.items()}, {}
        for name, weight in weights.items():
            shard = shard_of[stored.main(weight).path]
            shards.setdefault(shard, []).append(_part(checkpoint, name, weight, scheme, errors))
        config = content | {"quantization_config": scheme.config(IGNORED)}
        before = sum(entry.end - entry.begin for entry in map(checkpoint.entry, checkpoint.names()))
        directory = rewrite(checkpoint, Path(target), dict(sorted(shards.items())),
                            config=json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n",
                            made_from={"verb": "quantize", "format": format, "source": identify(checkpoint)},
                            progress=progress)
    return Quantized(directory, before, sum(part.nbytes for parts in shards.values() for part in parts), errors)


def _part(checkpoint: Checkpoint, name: str, weight: stored.Source, scheme: Scheme, errors: Errors) -> Part:
    if routed := ROUTED.search(name):
        if not isinstance(weight, Quantised) and weight.dtype not in stored.WHOLE:
            raise CheckpointError(f"{checkpoint.directory}: {quote(name)} is {weight.dtype}, which config.json does "
                                  f"not explain; expected {', '.join(stored.WHOLE)}, or FP8 with its "
                                  "quantization_config")
        return _quantised(checkpoint, name, weight, scheme.made, errors, routed[1])
    if isinstance(weight, Quantised):
        def bands() -> Iterator[tuple[np.ndarray]]:
            for start, stop in stored.bands(weight.shape):
                yield (stored.numbers(checkpoint, weight, start, stop).astype(stored.DTYPES["BF16"]),)
        return Part((Tensor(name, "BF16", weight.shape),), bands)
    return copied(checkpoint, weight)


def _quantised(checkpoint, name, weight, made: Quantization, errors: Errors, kind: str) -> Part:
    format_, (out, in_) = FORMATS[made.format], weight.shape
    tensors = [Tensor(name + made.codes, format_.dtype, format_.shape(out, in_)),
               Tensor(name + made.scales, format_.scale_dtype, format_.scales_shape(out, in_))]
    if made.shape:
        tensors.append(Tensor(name + made.shape, "I32", (2,)))

    def bands() -> Iterator[list[np.ndarray]]:
        for start, stop in stored.bands(weight.shape):
            wanted = stored.numbers(checkpoint, weight, start, stop)
            band = list(encode(made.format, wanted))
            got = np.empty_like(wanted)
            decode(made.format, *band, got)
            errors.add(kind, wanted, got)
            if made.shape:
                band.append(np.array([out, in_] if start == 0 else [], np.int32))
            yield band
    return Part(tuple(tensors), bands)
