"""What a saved state was trained from, and in what a run differs from that: settings, base model, data, versions."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kjax import config, env
from kjax.lora import LoraSpec

# Settings whose change would give the saved numbers another meaning, or the step another place in the data.
BINDING = frozenset({
    "lora.targets", "lora.exclude", "lora.rank", "lora.alpha", "lora.rank_pattern", "lora.alpha_pattern",
    "lora.rslora", "lora.experts_home", "train.rows_per_step", "train.seed", "data.rows", "data.max_length",
})  # fmt: skip
# Where things are and when they are written: of no meaning to a saved state.
INDIFFERENT = frozenset({"train.run_dir", "train.keep", "train.tensorboard", "train.plot", "model.stash_gb"})


@dataclass(frozen=True)
class Identity:
    """What a state was trained from. base and dataset are hashes of the model directory and the token rows."""

    config: dict  # dataclasses.asdict of the settings
    base: str
    dataset: str
    adapter: dict  # path -> its scale, which Model.adapter may have set

    @classmethod
    def of(cls, settings: config.Config, base: str, dataset: str, spec: LoraSpec) -> "Identity":
        as_json = json.loads(json.dumps(dataclasses.asdict(settings), default=str))  # tuples become lists, as on disk
        return cls(as_json, base, dataset, {path: adapter.scale for path, adapter in spec.entries})


def versions() -> dict[str, str]:
    """The versions that a state's bits may depend on."""
    found = env.versions()
    return {name: found[name] for name in ("python", "kjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint",
                                           "numpy") if name in found}


def differences(manifest: dict, identity: Identity) -> tuple[list[str], list[str]]:
    """What differs between a saved state and this run: (all that is worth saying, those that change its meaning)."""
    saved, now = _flat(manifest["config"]), _flat(identity.config)
    said, binding = [], []
    for key in sorted(saved.keys() | now.keys()):
        if saved.get(key) != now.get(key) and key not in INDIFFERENT:
            said.append(f"{key}: {saved.get(key)!r} -> {now.get(key)!r}")
            if key in BINDING:
                binding.append(said[-1])
    scales = manifest.get("adapter", identity.adapter)  # states before kjax recorded them have none
    for path in sorted(scales.keys() | identity.adapter.keys()):
        if (before := scales.get(path)) != (after := identity.adapter.get(path)):
            said.append(f"the scale of the adapter of {path}: {before} -> {after}")
            binding.append(said[-1])
            break
    for name, before, after in (("the dataset's tokens", manifest["dataset"], identity.dataset),
                                ("the base model", manifest["base"], identity.base)):
        if before != after:
            said.append(f"{name}: {before[:12]} -> {after[:12]} (SHA-256)")
            binding.append(said[-1])
    installed = versions()
    said += [f"version of {name}: {version} -> {installed.get(name)}"
             for name, version in manifest["versions"].items() if installed.get(name) != version]
    return said, binding


def base_hash(directory: Path, entries: Iterator) -> str:
    """Identifies a base model without reading all of it: config.json, every tensor's place, the start of each shard.

    entries: name, path, dtype, shape, begin and end of every tensor. Two models of one architecture differ in the
    first bytes of their shards, which the headers alone would not show.
    """
    sha = hashlib.sha256((directory / "config.json").read_bytes())
    first: dict[Path, int] = {}
    for entry in sorted(entries, key=lambda entry: entry.name):
        sha.update(repr((entry.name, entry.path.name, entry.dtype, tuple(entry.shape), entry.begin)).encode())
        first[entry.path] = min(entry.begin, first.get(entry.path, entry.begin))
    for path in sorted(first):
        with open(path, "rb") as file:
            file.seek(first[path])
            sha.update(file.read(1 << 16))
    return sha.hexdigest()


def _flat(tree: dict, prefix: str = "") -> dict:
    """{"train": {"steps": 3}} as {"train.steps": 3}, two levels deep: the settings and their fields."""
    return {f"{group}.{name}": value for group, fields in tree.items() for name, value in fields.items()}
