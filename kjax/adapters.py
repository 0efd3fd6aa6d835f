"""LoRA adapters on disk: the files PEFT reads and writes, checked against the model and published whole."""

import functools
import hashlib
import json
import logging
import math
import os
import re
import shutil
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from kjax import peft_config
from kjax.errors import CheckpointError, ConfigError, RunError
from kjax.lora import Linears, LoraSpec, abstract, group, module_names
from kjax.weights.safetensors import parse_json, quote

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
RECORD, TEMPLATE = "kjax_adapter.json", "chat_template.jinja"
DTYPES = ("F32", "BF16", "F16", "F64")
MAX_NORM = 1 << 20  # numbers: larger ones are no norm of any model, and nothing to read for a hash
MAX_JSON = 1 << 24  # bytes: far above the 60 kB of a config that names every projection of 61 layers


@dataclass(frozen=True)
class Base:
    """Which base model an adapter belongs to: its name, and SHA-256 hashes ("" where unknown)."""

    name: str
    config: str = ""  # of config.json's contents
    tensors: str = ""  # of all tensors' names, types and shapes
    weights: str = ""  # of the norm weights as fp32: equal for the bf16 and fp8 copies of one model


def identify(checkpoint, name: str | None = None) -> Base:
    """The identity of an open `kjax.weights.safetensors.Checkpoint`; `name` is the directory unless given.

    Norm weights stand for all: they are few, stay unquantised, and tell a model from its fine-tuned sibling of the
    same shapes.
    """
    found = map(checkpoint.entry, checkpoint.names())
    entries = sorted((entry.name, entry.dtype, list(entry.shape)) for entry in found)
    config_json, weights = checkpoint.config_json, hashlib.sha256()
    for tensor, _, shape in entries:
        layer = re.match(r"model\.layers\.(\d{1,9})\.", tensor)
        # Layers above the model's own predict further tokens; copies of a model come with and without them.
        own = layer is None or int(layer[1]) < config_json.get("num_hidden_layers", 0)
        if tensor.endswith("norm.weight") and own and math.prod(shape) <= MAX_NORM:
            weights.update(tensor.encode() + np.asarray(checkpoint.read(tensor), np.float32).tobytes())
    config, tensors = (hashlib.sha256(_json(part)).hexdigest() for part in (config_json, entries))
    return Base(name or str(checkpoint.directory), config, tensors, weights.hexdigest())


def notes(spec: LoraSpec) -> tuple[str, ...]:
    """What users of the files should know: programs that load them only in part."""
    dropped = sorted({path.split("/", 1)[1].replace("/", ".") for path in spec.paths
                      if group(path) in ("shared", "dense")})
    if not dropped:
        return ()
    return (f"peft with transformers 5 drops the adapters on {', '.join(dropped)} of DeepSeek models without a word: "
            "give model.config.model_type another name before PeftModel.from_pretrained, use transformers 4, or merge",)


def save(directory: str | os.PathLike, tree: dict, spec: LoraSpec, linears: Linears, *,
         base: Base, chat_template: str | None = None) -> Path:
    """Writes a lora tree as PEFT files, with the base's identity and the chat template beside them.

    tree: path -> {"lora_A": [L, R, in], "lora_B": [L, out, R]}. A new directory appears complete or not at all; in
    an existing one each file is replaced in one go, the weights last. What was there survives a full disk.
    """
    files = {
        CONFIG: _json(peft_config.write(spec, linears, base.name), indent=2),
        RECORD: _json({"format": 1, "base": asdict(base), "notes": notes(spec)}, indent=2),
        WEIGHTS: safetensors.numpy.save(_tensors(tree, spec, linears), {"format": "pt"}),
    }
    if chat_template is not None:
        files = {TEMPLATE: chat_template.encode(), **files}
    _publish(Path(directory), files)
    for note in notes(spec):
        _tell_once(note)
    return Path(directory)


def load(directory: str | os.PathLike, linears: Linears,
         base: Base | None = None) -> tuple[LoraSpec, dict]:
    """Reads a PEFT adapter, kjax's or another's, into a spec and a lora tree of fp32 arrays.

    linears: those of the model. Everything that does not fit it is reported at once. Where both
    `base` and the files identify the base model they must agree.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory; give the one that holds {CONFIG}")
    settings = peft_config.read(_read_json(directory / CONFIG), str(directory / CONFIG))
    _check_base(directory, base)
    file = directory / WEIGHTS
    if not file.is_file():
        pickles = sorted(item.name for item in directory.glob("*.bin"))
        raise CheckpointError(f"{directory}: no {WEIGHTS}" + (
            f"; {pickles[0]} is a pickle, which kjax does not open because it can run code: save it again with "
            "safe_serialization=True" if pickles else ""))
    try:
        with safetensors.safe_open(file, "np") as tensors:
            found = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118  not a dict
            found = {key: (entry.get_dtype(), tuple(entry.get_shape())) for key, entry in found.items()}
            spec = _match(directory, settings, found, linears)
            return spec, _read(file, tensors, spec, linears)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{file}: not readable as safetensors ({error}); copy the adapter again") from error


def _key(module: str, matrix: str) -> str:
    """The tensor's name in PEFT files: its two wrappers come before the module's own name."""
    return f"base_model.model.{module}.{matrix}.weight"


def _tensors(tree: dict, spec: LoraSpec, linears) -> dict[str, np.ndarray]:
    """PEFT's names and one contiguous fp32 array per layer; the tree must be the spec's, and finite."""
    leaves, expected = flatten_dict(tree, sep="/"), flatten_dict(abstract(spec, linears), sep="/")
    shapes, wanted = ({name: leaf.shape for name, leaf in of.items()} for of in (leaves, expected))
    if shapes != wanted:
        wrong = sorted(name for name in shapes | wanted if shapes.get(name) != wanted.get(name))
        raise ConfigError("the lora tree is not that of its spec: "
                          + _listed([f"{n} is {shapes.get(n)}, not {wanted.get(n)}" for n in wrong]))
    tensors = {}
    for name, leaf in leaves.items():
        path, matrix = name.rsplit("/", 1)
        stack = np.ascontiguousarray(leaf, np.float32).reshape(-1, *leaf.shape[-2:])
        if not np.isfinite(stack).all():
            raise RunError(f"{name} holds NaN or Inf: not saved")
        tensors |= {_key(module, matrix): array
                    for module, array in zip(module_names(path, linears), stack, strict=True)}
    return tensors


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise CheckpointError(f"{path.parent}: no {path.name}; give the directory that PEFT or kjax wrote")
    if path.stat().st_size > MAX_JSON:
        raise CheckpointError(f"{path}: {path.stat().st_size} bytes are too many for this file")
    return parse_json(path.read_bytes(), str(path))


def _check_base(directory: Path, base: Base | None):
    """Refuses an adapter whose record names another base model. Foreign adapters have no record."""
    if base is None or not (directory / RECORD).exists():
        return
    recorded = _read_json(directory / RECORD).get("base")
    recorded = recorded if isinstance(recorded, dict) else {}
    name = quote(recorded.get("name", ""))
    if base.weights and recorded.get("weights") and recorded["weights"] != base.weights:
        raise CheckpointError(
            f"{directory}: trained on another base model, {name}: the norm weights of {base.name} differ from it. "
            f"Load it with its own base, or delete {RECORD} to use it here all the same")
    if base.config and recorded.get("config") and recorded["config"] != base.config:
        warnings.warn(f"{directory}: config.json of {base.name} is not the one the adapter was trained with ({name})",
                      stacklevel=3)


def _match(directory: Path, settings: peft_config.Settings, found: dict, linears) -> LoraSpec:
    """The spec that a file's tensors (name -> dtype, shape) make up; raises with all that does not fit."""
    keys = {_key(module, matrix): (path, module, matrix) for path in linears
            for module in module_names(path, linears) for matrix in ("lora_A", "lora_B")}
    problems = _strangers([key for key in found if key not in keys])
    present = {keys[key][1] for key in found if key in keys}
    entries = []
    for path, size in linears.items():
        modules = module_names(path, linears)
        named = [module for module in modules if (settings.names(module) if settings.targets else module in present)]
        if unnamed := present.intersection(modules).difference(named):
            problems.append(f"{min(unnamed)} has tensors, but target_modules in {CONFIG} does not name it")
        elif 0 < len(named) < len(modules):
            problems.append(f"{path} is adapted in {len(named)} of {len(modules)} layers; kjax needs all of them")
        if not named:
            continue
        modules = named
        adapters = {module: settings.adapter(module) for module in modules}
        for module, adapter in adapters.items():
            wanted = {"lora_A": (adapter.rank, size.width_in), "lora_B": (size.width_out, adapter.rank)}
            for matrix, shape in wanted.items():
                dtype, actual = found.get(_key(module, matrix), (None, None))
                if dtype is None:
                    problems.append(f"{_key(module, matrix)} is missing")
                elif actual != shape:
                    problems.append(f"{_key(module, matrix)} is {list(actual)}, the model and rank {adapter.rank} "
                                    f"need {list(shape)}")
                elif dtype not in DTYPES:
                    problems.append(f"{_key(module, matrix)} has dtype {dtype}, not one of {', '.join(DTYPES)}")
        if len(set(adapters.values())) > 1:
            problems.append(f"{path} has layers of different rank or alpha, which a stack of layers cannot have")
        entries.append((path, adapters[modules[0]]))
    if not found:
        problems.append("the file holds no tensors")
    if problems:
        raise CheckpointError(f"{directory}: this adapter (of {quote(settings.base)}) does not fit the model: "
                              + _listed(problems))
    return LoraSpec(tuple(sorted(entries)))


def _strangers(keys: list[str]) -> list[str]:
    """What the tensors are that belong to no adaptable linear of the model."""
    routed = [key for key in keys if ".mlp.experts." in key]
    router = [key for key in keys if ".mlp.gate." in key]
    others = [key for key in keys if key not in routed and key not in router]
    problems = [f"{quote(key)} belongs to no linear layer of this model" for key in others]
    if routed:
        problems.append(f"{len(routed)} tensors adapt the routed experts ({quote(routed[0])}, ...), not supported yet")
    if router:
        problems.append(f"{len(router)} tensors adapt the router ({quote(router[0])}, ...), which kjax never does")
    return problems


def _read(file: Path, tensors, spec: LoraSpec, linears) -> dict:
    """The stacked fp32 arrays of a matched file."""
    leaves, bad = {}, []
    for name, leaf in flatten_dict(abstract(spec, linears), sep="/").items():
        path, matrix = name.rsplit("/", 1)
        stack = np.empty((math.prod(leaf.shape[:-2]), *leaf.shape[-2:]), np.float32)
        for i, module in enumerate(module_names(path, linears)):
            stack[i] = tensors.get_tensor(_key(module, matrix))
            if not np.isfinite(stack[i]).all():
                bad.append(_key(module, matrix))
        leaves[name] = jnp.asarray(stack.reshape(leaf.shape))
    if bad:
        raise CheckpointError(f"{file}: NaN or Inf in {_listed(bad)}")
    return unflatten_dict(leaves, sep="/")


def _publish(directory: Path, files: dict[str, bytes]):
    """Writes the files so that a reader finds each of them whole, old or new, whenever the machine stops."""
    staging = directory.parent / f".{directory.name}.partial"
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        for name, data in files.items():
            with open(staging / name, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        _sync(staging)
        if directory.exists():
            for name in files:
                os.replace(staging / name, directory / name)
            if TEMPLATE not in files:
                (directory / TEMPLATE).unlink(missing_ok=True)
            _sync(directory)
        else:
            os.rename(staging, directory)
        _sync(directory.parent)
    except OSError as error:
        raise RunError(f"{directory}: the adapter could not be written ({error.strerror}); a previous one there is "
                       "unchanged. Free some space or give another directory") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _sync(directory: Path):
    """Makes renames in a directory durable."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@functools.lru_cache
def _tell_once(note: str):
    logging.getLogger("kjax").warning(note)


def _json(value, indent: int | None = None) -> bytes:
    return json.dumps(value, indent=indent, sort_keys=True, ensure_ascii=False).encode()


def _listed(items: list[str], limit: int = 20) -> str:
    return "; ".join(items[:limit]) + (f"; and {len(items) - limit} more" if len(items) > limit else "")
