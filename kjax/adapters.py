"""LoRA adapters on disk: the files PEFT reads and writes, checked against the model and published whole."""

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax.traverse_util import flatten_dict, unflatten_dict

from kjax import adapter_layouts as layouts
from kjax import peft_config
from kjax.adapter_match import listed, match
from kjax.data import templates
from kjax.errors import CheckpointError, ConfigError, RunError
from kjax.lora import Linears, LoraSpec, group
from kjax.progress import bytes_bar
from kjax.weights.files import parse_json, quote
from kjax.weights.writer import Part, sync, write_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
RECORD, TEMPLATE = "kjax_adapter.json", templates.OF_ADAPTER
Layout = Literal["experts", "fused"]
MAX_NORM = 1 << 20  # numbers: larger ones are no norm of any model, and nothing to read for a hash
MAX_JSON = 1 << 24  # bytes: far above the 60 kB of a config that names every projection of 61 layers


@dataclass(frozen=True)
class Base:
    """Which base model an adapter belongs to: its name, and SHA-256 hashes ("" where unknown)."""

    name: str
    config: str = ""  # of config.json's contents
    tensors: str = ""  # of all tensors' names, types and shapes
    weights: str = ""  # of the norm weights as fp32: equal for the bf16 and fp8 copies of one model
    prefix: str = ""  # before `model.layers` in all names of a text model inside of a multimodal one


def identify(checkpoint, name: str | None = None) -> Base:
    """The identity of an open `kjax.weights.safetensors.Checkpoint`; `name` is the directory unless given.

    Norm weights stand for all: they are few, stay unquantised, and tell a model from its fine-tuned sibling of the
    same shapes.
    """
    found = map(checkpoint.entry, checkpoint.names())
    entries = sorted((entry.name, entry.dtype, list(entry.shape)) for entry in found)
    config_json, weights, prefix = checkpoint.config_json, hashlib.sha256(), ""
    text_config = config_json.get("text_config")
    layers = (text_config if isinstance(text_config, dict) else config_json).get("num_hidden_layers", 0)
    for tensor, _, shape in entries:
        layer = re.match(r"(language_model\.)?model\.layers\.(\d{1,9})\.", tensor)
        # Layers above the model's own predict further tokens; copies of a model come with and without them.
        own = layer is None or int(layer[2]) < layers
        prefix = prefix or layer and layer[1] or ""
        if tensor.endswith("norm.weight") and own and math.prod(shape) <= MAX_NORM:
            weights.update(tensor.encode() + np.asarray(checkpoint.read(tensor), np.float32).tobytes())
    config, tensors = (hashlib.sha256(_json(part)).hexdigest() for part in (config_json, entries))
    return Base(name or str(checkpoint.directory), config, tensors, weights.hexdigest(), prefix)


def notes(spec: LoraSpec, layout: Layout = "experts") -> tuple[str, ...]:
    """What users of the files should know: programs that load them only in part, or not at all."""
    found, others = [], sorted({path.split("/", 1)[1].replace("/", ".") for path in spec.paths
                                if group(path) in ("shared", "dense")})
    gate, up, routed = spec.get(layouts.GATE), spec.get(layouts.UP), any(p.startswith(layouts.EXPERTS)
                                                                        for p in spec.paths)
    if others:
        way = ("give model.config.model_type another name before PeftModel.from_pretrained" + (
            ", of this adapter in the fused layout (kjax export --layout fused)" if routed and layout == "experts" else
            ""))
        found.append(f"peft with transformers 5 drops the adapters on {', '.join(others)} of mixture-of-experts models "
                     f"without a word: {way}, use transformers 4, or merge (kjax merge)")
    if layout == "experts" and gate != up:
        found.append("peft with transformers 5 reads adapters of single experts only where gate_proj and up_proj have "
                     "one rank and alpha, which they do not here: use the fused layout (kjax export --layout fused), "
                     "transformers 4, or merge (kjax merge)")
    if layout == "fused":
        found.append("transformers 4, SGLang and converters for llama.cpp do not read the fused layout: for them "
                     "export with --layout experts, or merge (kjax merge)")
    return tuple(found)


def save(directory: str | os.PathLike, tree: dict, spec: LoraSpec, linears: Linears, **settings) -> Path:
    """Writes a lora tree as PEFT files; settings are those of `write`.

    tree: path -> {"lora_A": [L, R, in], "lora_B": [L, out, R]}, of routed experts {[L, E, R, in], [L, E, out, R]}.
    """
    _require_saveable(tree, spec, linears)
    leaves = {name: np.asarray(leaf) for name, leaf in flatten_dict(tree, sep="/").items()}
    return write(directory, lambda path, matrix, index: leaves[f"{path}/{matrix}"][index], spec, linears, **settings)


def write(directory: str | os.PathLike, read: layouts.Read, spec: LoraSpec, linears: Linears, *, base: Base,
          chat_template: str | None = None, layout: Layout = "experts",
          dtype: Literal["float32", "bfloat16"] = "float32", progress: bool = False) -> Path:
    """Writes PEFT files, with the base's identity and the chat template beside them.

    read: gives each matrix of the spec when it is written, see kjax.adapter_layouts.Reader.matrix.
    layout: of the routed experts' adapters, see kjax.adapter_layouts.  dtype: of the file.
    A new directory appears complete or not at all; in an existing one each file is replaced in one go, the weights
    last. What was there survives a full disk. Memory: a layer's lora_B of one projection for each writer.
    """
    code = {"float32": "F32", "bfloat16": "BF16"}[dtype]
    if layout == "fused":
        rest, made = layouts.fuse(spec)
        config = peft_config.write(rest, linears, base.name, made)
        parts = list(layouts.fused(read, spec, linears, code, base.prefix))
    else:
        config = peft_config.write(spec, linears, base.name)
        parts = list(layouts.per_expert(read, spec, linears, code, base.prefix))
    files = {
        CONFIG: _json(config, indent=2),
        RECORD: _json({"format": 1, "base": asdict(base), "notes": notes(spec, layout)}, indent=2),
    }
    if chat_template is not None:
        files = {TEMPLATE: chat_template.encode(), **files}
    with bytes_bar("Writing the adapter", sum(part.nbytes for part in parts), progress) as advance:
        _publish(Path(directory), files, parts, advance)
    for note in notes(spec, layout):
        _tell_once(note)
    return Path(directory)


def load(directory: str | os.PathLike, linears: Linears, base: Base | None = None) -> tuple[LoraSpec, dict]:
    """Reads a PEFT adapter, kjax's or another's, into a spec and a lora tree of fp32 arrays.

    linears: those of the model. Everything that does not fit it is reported at once. Where both `base` and the files
    identify the base model they must agree. The experts' arrays stay on the host.
    """
    with opened(directory, linears, base) as adapter:
        total = 4 * sum(math.prod(linears[path].stack) * made.rank * (linears[path].width_in + linears[path].width_out)
                        for path, made in adapter.spec.entries)
        with bytes_bar("Reading the adapter", total) as advance:
            leaves = {f"{path}/{matrix}": _place(path, adapter.stack(path, matrix, advance))
                      for path, _ in adapter.spec.entries for matrix in layouts.MATRICES}
        return adapter.spec, unflatten_dict(leaves, sep="/")


def spec(directory: str | os.PathLike, linears: Linears) -> LoraSpec:
    """The spec that `load` makes of a PEFT adapter, from its config and the tensors' names and shapes alone.

    Of adapters fused over all experts B is read too, a layer at a time, since only its zeros tell whether gate and up
    share their ranks.
    """
    with opened(directory, linears) as adapter:
        return adapter.spec


class Adapter(NamedTuple):
    """An open adapter: `spec`, and matrices that are read when asked for."""

    spec: LoraSpec
    reader: layouts.Reader
    linears: Linears
    file: Path

    def matrix(self, path: str, matrix: str, index: tuple[int, ...]) -> np.ndarray:
        """A [R, in] or B [out, R] of one linear, fp32 and finite; index is its layer, and its expert.

        Without the expert those of all of the layer, [E, ...].
        """
        found = self.reader.matrix(path, matrix, index)
        if not np.isfinite(found).all():
            if len(index) < len(self.linears[path].stack):
                index = (*index, next(e for e, one in enumerate(found) if not np.isfinite(one).all()))
            fused = self.reader.fused.get(path)
            name = fused.module(index[0], self.linears) if fused else layouts.module(path, index, self.linears)
            raise CheckpointError(f"{self.file}: NaN or Inf in {layouts.key(name, matrix)}")
        return found

    def stack(self, path: str, matrix: str, advance: Callable[[int], object]) -> np.ndarray:
        """A or B of all layers (and experts); advance(n) is told of every n bytes."""
        size, rank = self.linears[path], self.spec.get(path).rank
        shape = (rank, size.width_in) if matrix == "lora_A" else (size.width_out, rank)
        found = np.empty((*size.stack, *shape), np.float32)
        for layer in range(size.layers):
            found[layer] = self.matrix(path, matrix, (layer,))
            advance(found[layer].nbytes)
        return found


@contextlib.contextmanager
def opened(directory: str | os.PathLike, linears: Linears, base: Base | None = None) -> Iterator[Adapter]:
    """A PEFT adapter whose matrices are read one by one; checks and errors as for `load`."""
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
            spec, reader = match(directory, settings, tensors, linears)
            yield Adapter(spec, reader, linears, file)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{file}: not readable as safetensors ({error}); copy the adapter again") from error


def _place(path: str, stack: np.ndarray) -> jax.Array:
    """On the default device; the experts' on the host, where they are as large as all the rest together."""
    return jax.device_put(stack, jax.local_devices(backend="cpu")[0]) if path.startswith(layouts.EXPERTS) else (
        jnp.asarray(stack))


def _require_saveable(tree: dict, spec: LoraSpec, linears: Linears):
    """The tree must be the spec's, and finite."""
    leaves, wanted = flatten_dict(tree, sep="/"), {}
    for path, adapter in spec.entries:
        size = linears[path]
        wanted |= {f"{path}/lora_A": (*size.stack, adapter.rank, size.width_in),
                   f"{path}/lora_B": (*size.stack, size.width_out, adapter.rank)}
    shapes = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
    if shapes != wanted:
        wrong = sorted(name for name in shapes | wanted if shapes.get(name) != wanted.get(name))
        raise ConfigError("the lora tree is not that of its spec: "
                          + listed([f"{n} is {shapes.get(n)}, not {wanted.get(n)}" for n in wrong]))
    for name, leaf in leaves.items():
        if not all(np.isfinite(layer).all() for layer in np.asarray(leaf)):
            raise RunError(f"{name} holds NaN or Inf: not saved")


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


def _publish(directory: Path, files: dict[str, bytes], weights: list[Part], advance: Callable[[int], object]):
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
        write_file(staging / WEIGHTS, weights, advance)
        if directory.exists():
            for name in (*files, WEIGHTS):
                os.replace(staging / name, directory / name)
            if TEMPLATE not in files:
                (directory / TEMPLATE).unlink(missing_ok=True)
            sync(directory)
        else:
            os.rename(staging, directory)
        sync(directory.parent)
    except OSError as error:
        raise RunError(f"{directory}: the adapter could not be written ({error.strerror}); a previous one there is "
                       "unchanged. Free some space or give another directory") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@functools.lru_cache
def _tell_once(note: str):
    logging.getLogger("kjax").warning(note)


def _json(value, indent: int | None = None) -> bytes:
    return json.dumps(value, indent=indent, sort_keys=True, ensure_ascii=False).encode()

