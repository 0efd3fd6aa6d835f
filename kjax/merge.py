"""`kjax merge`: an adapter added into its base, W + scale * B A, as a new checkpoint in the base's own format.

Weights without an adapter are copied bit for bit: multi-token prediction and tensors that kjax does not know too.
Names, shards, config.json and tokenizer stay. Quantised weights get new codes in the same layout, see
kjax.weights.encode.

Most changes of a fine-tuning are smaller than half a step of 8 or 4 bits. Rounding to nearest would lose these, and
with them most of what was learned; hence codes are rounded so that they are right on average ("stochastic"), from a
seed that follows from the weight's name.
"""

import functools
import hashlib
import os
import threading
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from kjax import adapters, lora
from kjax.errors import CheckpointError, ConfigError
from kjax.models import ModelConfig, linears
from kjax.offload.formats import Quantised, decode
from kjax.weights import stored
from kjax.weights.encode import encode
from kjax.weights.files import quote
from kjax.weights.rewrite import check_target, identify, rewrite
from kjax.weights.safetensors import DTYPES, Checkpoint
from kjax.weights.writer import Part, Tensor, copied

ROUNDINGS = ("stochastic", "nearest")


@dataclass
class Effect:
    """How much of the adapter's change is in the merged weights, by group; added to from several threads."""

    sums: dict[str, list[float]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, group: str, change: np.ndarray, made: np.ndarray):
        """change: what the adapter wants.  made: what became of it."""
        change, made = change.ravel(), made.ravel()
        rest = made - change
        with self._lock:
            sums = self.sums.setdefault(group, [0.0, 0.0, 0.0])
            for i, (one, other) in enumerate(((made, change), (rest, rest), (change, change))):
                sums[i] += float(one @ other)

    def kept(self, group: str) -> float:
        """The part of the change that the merged weights have: 1 if rounding took nothing away."""
        return self.sums[group][0] / (self.sums[group][2] or 1.0)

    def noise(self, group: str) -> float:
        """The size of the rounding relative to the change."""
        return (self.sums[group][1] / (self.sums[group][2] or 1.0)) ** 0.5

    def __str__(self) -> str:
        return "\n".join(f"{group}: {self.kept(group):.1%} of the adapter's change kept, rounding "
                         f"{self.noise(group):.3g} times as large" for group in sorted(self.sums))


@dataclass(frozen=True)
class Merged:
    """What was written; print it. effect is that of the shards that this run wrote."""

    directory: Path
    weights: int  # that the adapter changed
    effect: Effect

    def __str__(self) -> str:
        return f"{self.directory}: {self.weights:,} weights merged\n{self.effect}".rstrip()


def merge(source: str | os.PathLike, adapter: str | os.PathLike, target: str | os.PathLike, *,
          rounding: Literal["stochastic", "nearest"] = "stochastic", progress: bool = True) -> Merged:
    """Writes the checkpoint `source` with the PEFT adapter in it to the new directory `target`.

    rounding: of quantised weights. bf16, f16 and fp32 are always rounded to nearest.
    The source is never changed. An interrupted run is gone on with by the same call: it left `target`.partial, whose
    finished shards are checked and kept. Takes less than 4 GB of memory whatever the model.
    """
    if rounding not in ROUNDINGS:
        raise ConfigError(f"rounding {rounding!r}: expected {' or '.join(ROUNDINGS)}")
    with Checkpoint(source) as checkpoint:
        check_target(checkpoint, Path(target).absolute())
        config = ModelConfig.from_json(checkpoint.config_json, str(checkpoint.config_path))
        base = adapters.identify(checkpoint)
        with adapters.opened(adapter, linears(config), base) as opened:
            merging = _Merging(checkpoint, config.quantization, opened, base.prefix, rounding)
            directory = rewrite(
                checkpoint, Path(target), merging.shards(), config=checkpoint.config_path.read_bytes(),
                made_from={"verb": "merge", "rounding": rounding, "source": identify(checkpoint),
                           "adapter": {name: _sha256(Path(adapter) / name)
                                       for name in (adapters.CONFIG, adapters.WEIGHTS)}}, progress=progress)
    return Merged(directory, len(merging.sites), merging.effect)


@dataclass(frozen=True)
class _Site:
    """Where an adapter goes."""

    path: str
    index: tuple[int, ...]
    scale: float


class _Merging:
    """The parts of the new checkpoint."""

    def __init__(self, checkpoint: Checkpoint, quantization, adapter: adapters.Adapter, prefix: str, rounding: str):
        self.checkpoint, self.adapter, self.rounding, self.effect = checkpoint, adapter, rounding, Effect()
        self.power_of_two = _scale_format(checkpoint.config_json) == "ue8m0"
        self.weights = stored.weights(checkpoint, quantization)
        self.sites = {f"{prefix}{module}.weight": _Site(path, index, made.scale) for path, made in adapter.spec.entries
                      for index, module in adapters.layouts.modules(path, adapter.linears).items()}
        for name, site in self.sites.items():
            self._require_mergeable(name, site)

    def _require_mergeable(self, name: str, site: _Site):
        size = self.adapter.linears[site.path]
        shape = size.width_out, size.width_in
        weight = self.weights.get(name)
        if weight is None:
            raise CheckpointError(f"{self.checkpoint.directory}: no {quote(name)}, which the adapter changes; give the "
                                  "base that it was trained on")
        if tuple(weight.shape) != shape:
            raise CheckpointError(f"{self.checkpoint.directory}: {quote(name)} is {list(weight.shape)}, config.json "
                                  f"and the adapter need {list(shape)}")
        if not isinstance(weight, Quantised) and weight.dtype not in stored.WHOLE:
            raise CheckpointError(f"{self.checkpoint.directory}: {quote(name)} is {weight.dtype}, which config.json "
                                  f"does not explain; expected {', '.join(stored.WHOLE)}, or a quantization_config")

    def shards(self) -> dict[str, list[Part]]:
        """shard -> its parts: every tensor where the source has it."""
        owners = {}  # of the tensors that are made anew
        for name in self.sites:
            weight = self.weights[name]
            entries = (weight.codes, weight.scales) if isinstance(weight, Quantised) else (weight,)
            owners |= {entry.name: name for entry in entries}
        shard_of = {path: shard for shard, path in self.checkpoint.shards.items()}
        shards, anew = {shard: [] for shard in sorted(self.checkpoint.shards)}, {}
        for entry in map(self.checkpoint.entry, self.checkpoint.names()):
            if entry.name in owners:
                anew.setdefault((shard_of[entry.path], owners[entry.name]), []).append(entry)
            else:
                shards[shard_of[entry.path]].append(copied(self.checkpoint, entry))
        for (shard, name), entries in anew.items():
            shards[shard].append(Part(tuple(Tensor(entry.name, entry.dtype, entry.shape) for entry in entries),
                                      functools.partial(self._bands, name, [entry.name for entry in entries])))
        return shards

    def _bands(self, name: str, wanted: list[str]) -> Iterator[list[np.ndarray]]:
        """The wanted tensors of a merged weight: FP8 scales may lie in another shard than what they scale."""
        site, weight = self.sites[name], self.weights[name]
        a, b = (self.adapter.matrix(site.path, matrix, site.index) for matrix in adapters.layouts.MATRICES)
        for start, stop in stored.bands(weight.shape):
            base = stored.numbers(self.checkpoint, weight, start, stop, exact=True)
            change = np.float32(site.scale) * (b[start:stop] @ a)
            if isinstance(weight, Quantised):
                random = np.random.Generator(np.random.SFC64([zlib.crc32(name.encode()), start]))
                codes, scales = encode(weight.format, base + change, scale_dtype=weight.scales.dtype,
                                       power_of_two=self.power_of_two,
                                       kept=stored.scales(self.checkpoint, weight, start, stop),
                                       random=random if self.rounding == "stochastic" else None)
                made = {weight.codes.name: codes, weight.scales.name: scales}
                result = np.empty_like(base)
                decode(weight.format, codes, scales, result, exact=True)
            else:
                with np.errstate(over="ignore"):
                    whole = (base + change).astype(DTYPES[weight.dtype])
                made, result = {name: whole}, whole.astype(np.float32)
                if not np.isfinite(result).all():
                    raise CheckpointError(f"{quote(name)}: with the adapter it has numbers beyond the range of "
                                          f"{weight.dtype}; merge into a bf16 copy of the base")
            if next(iter(made)) in wanted:  # once, where scales lie elsewhere
                self.effect.add(lora.group(site.path), change, result - base)
            yield [made[key] for key in wanted]


def _scale_format(content: Mapping) -> object:
    for part in (content, content.get("text_config")):
        if isinstance(part, dict) and isinstance(part.get("quantization_config"), dict):
            return part["quantization_config"].get("scale_fmt")
    return None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
