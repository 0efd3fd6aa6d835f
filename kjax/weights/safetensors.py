"""A checked, lazy reader of safetensors checkpoints that knows where in which file every tensor lies.

The routed experts are multiplied straight out of the mapped files, so kjax needs byte offsets, which the safetensors
library does not give; hence its own header parser. A checkpoint is untrusted: nothing is used before it is checked.
"""

import dataclasses
import math
import os
import re
import struct
import weakref
from collections.abc import Iterable
from pathlib import Path

import ml_dtypes
import numpy as np

from kjax.errors import CheckpointError
from kjax.weights.files import fill, inside, open_regular, parse_json, quote

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
MAX_JSON = 1 << 29  # bytes; the index of a 140,000-tensor checkpoint has 15 MB
MAX_DIMENSIONS = 32

DTYPES = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16, "U32": np.uint32,
    "I32": np.int32, "U64": np.uint64, "I64": np.int64, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F32": np.float32, "F64": np.float64, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}  # fmt: skip
ITEMSIZE = {code: np.dtype(dtype).itemsize for code, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies: bytes `begin` to `end` of the file `path`, row-major and little-endian."""

    name: str
    path: Path
    dtype: str  # the safetensors code: "BF16", "F32", "F8_E4M3", ...
    shape: tuple[int, ...]
    begin: int
    end: int


def _tensor(shown: str, name: str, spec: object, path: Path, data: int, size: int) -> TensorEntry:
    """One header item, checked; `data` is where the tensors begin and `size` the file's length."""
    where = f"{shown}: tensor {quote(name)}"
    if not isinstance(spec, dict) or not {"dtype", "shape", "data_offsets"} <= spec.keys():
        raise CheckpointError(f"{where}: needs dtype, shape and data_offsets, has {quote(spec)}; the header is damaged")
    dtype, shape, offsets = spec["dtype"], spec["shape"], spec["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where}: unknown dtype {quote(dtype)}; kjax knows {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(type(d) is int and d >= 0 for d in shape):
        raise CheckpointError(f"{where}: shape {quote(shape)} is not a list of sizes; the header is damaged")
    if math.prod(max(d, 1) for d in shape) * ITEMSIZE[dtype] >= 1 << 63:
        raise CheckpointError(f"{where}: shape {quote(shape)} is larger than any memory; the header is damaged")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(o) is int for o in offsets):
        raise CheckpointError(f"{where}: data_offsets {quote(offsets)} are not two integers; the header is damaged")
    begin, end = offsets
    if not 0 <= begin <= end:
        raise CheckpointError(f"{where}: data_offsets {quote(offsets)} are negative or reversed; the header is damaged")
    if data + end > size:
        raise CheckpointError(
            f"{where}: its bytes end at {data + end}, past the end of the file at {size}: "
            "the shard is truncated or damaged; download it again"
        )
    if end - begin != math.prod(shape) * ITEMSIZE[dtype]:
        raise CheckpointError(
            f"{where}: {dtype} {shape} takes {math.prod(shape) * ITEMSIZE[dtype]} bytes, "
            f"data_offsets span {end - begin}; the header is damaged, download the shard again"
        )
    return TensorEntry(name, path, dtype, tuple(shape), data + begin, data + end)


def read_header(handle: int, size: int, path: Path, shown: str) -> list[TensorEntry]:
    """The tensors of one safetensors file, in the order of their bytes.

    As the format demands, every byte after the header belongs to exactly one tensor: overlaps, gaps and trailing
    bytes are refused (a file with room for something else may be read differently by another program).
    """
    prefix = bytearray(min(8, size))
    fill(handle, memoryview(prefix), 0, shown)
    if prefix == b"version ":
        raise CheckpointError(f"{shown}: a Git LFS pointer, not the file itself; run `git lfs pull`")
    if size < 8:
        raise CheckpointError(f"{shown}: {size} bytes are no safetensors file; download it again")
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER:
        raise CheckpointError(f"{shown}: a header of {length} bytes (the format allows {MAX_HEADER}): not a "
                              "safetensors file, or damaged; download it again")
    data = 8 + length
    if data > size:
        raise CheckpointError(f"{shown}: the header ends at byte {data}, past the end of the file at {size}: "
                              "the shard is truncated or damaged; download it again")
    header = bytearray(length)
    fill(handle, memoryview(header), 8, shown)
    items = parse_json(bytes(header), f"{shown}: header")
    metadata = items.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{shown}: __metadata__ is not an object; the header is damaged")

    entries = [_tensor(shown, name, spec, path, data, size) for name, spec in items.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    cursor, before = data, None
    for entry in entries:
        if entry.begin < cursor:
            raise CheckpointError(f"{shown}: tensors {quote(before.name)} and {quote(entry.name)} overlap; "
                                  "the header is damaged, download the shard again")
        if entry.begin > cursor:
            raise CheckpointError(f"{shown}: {entry.begin - cursor} bytes before tensor {quote(entry.name)} belong to "
                                  "no tensor; the header is damaged, download the shard again")
        cursor, before = entry.end, entry
    if cursor != size:
        raise CheckpointError(f"{shown}: {size - cursor} bytes after the last tensor belong to no tensor; "
                              "the file is damaged, download it again")
    return entries


# save_pretrained of transformers 5 (seen in 5.23) undoes its own renaming of Kimi-K2.5's vision blocks in the text
# model too, whose layers it so writes under another name than they were published.
_BLOCKS = "language_model.model.blocks."


def published(name: str) -> str:
    """A tensor's name as it was published, whichever program wrote the file."""
    return name.replace("blocks", "layers", 1) if name.startswith(_BLOCKS) else name


class Checkpoint:
    """A checkpoint directory: `config.json` and one safetensors file or shards with an index.

    Opening reads the headers only (each shard is opened once and stays open); tensors are read when asked for.
    Use it as a context manager or call `close()`.

    Tensors have the names of the published checkpoint, see `published`.

    Attributes: directory; shards: file name -> the file's path, links resolved.
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise CheckpointError(f"{self.directory}: no such directory; give the one that holds config.json and the "
                                  "safetensors files")
        self._handles: dict[Path, int] = {}
        self._entries: dict[str, TensorEntry] = {}
        self._close = weakref.finalize(self, _close_all, self._handles)
        try:
            self._open_shards()
        except BaseException:
            self.close()
            raise

    def _open_shards(self):
        weight_map = self._weight_map()
        names = sorted(set(weight_map.values()), key=_by_number) if weight_map is not None else [SINGLE]
        self.shards = paths = {name: inside(self.directory, name) for name in names}
        shard_of = {path: name for name, path in paths.items()}  # a hub cache resolves names to hashes
        missing = [name for name, path in paths.items() if not path.exists()]
        if missing:
            raise CheckpointError(
                f"{self.directory}: {len(missing)} of {len(names)} shards missing: {_listed(missing)}; "
                "download them again"
            )
        weight_map = weight_map and {published(name): shard for name, shard in weight_map.items()}
        for name, path in paths.items():
            shown = str(self.directory / name)
            if path in self._handles:
                raise CheckpointError(f"{shown}: the same file as another shard of the index")
            handle, size = open_regular(path, shown)
            self._handles[path] = handle
            for entry in read_header(handle, size, path, shown):
                entry = dataclasses.replace(entry, name=published(entry.name))
                if (other := self._entries.setdefault(entry.name, entry)) is not entry:
                    raise CheckpointError(
                        f"{self.directory}: tensor {quote(entry.name)} is in two shards, "
                        f"{quote(shard_of[other.path])} and {quote(name)}; remove the stale one, or download "
                        "the checkpoint again"
                    )
        absent = [name for name, shard in (weight_map or {}).items()
                  if name not in self._entries or self._entries[name].path != paths[shard]]
        if absent:
            raise CheckpointError(
                f"{self.directory}: {len(absent)} tensors are not in the shard that {INDEX} names: "
                + _listed([f"{name} ({weight_map[name]})" for name in absent])
                + "; index and shards are of different checkpoints, download both again"
            )

    def _weight_map(self) -> dict[str, str] | None:
        """Tensor -> shard file, or None for a single-file checkpoint."""
        index = self.json(INDEX, required=False)
        if index is None:
            if not os.path.lexists(self.directory / SINGLE):
                raise CheckpointError(f"{self.directory}: neither {INDEX} nor {SINGLE}; {self._what_is_there()}")
            return None
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{self.directory / INDEX}: no weight_map; download the file again")
        for name, shard in weight_map.items():
            if not isinstance(shard, str):
                raise CheckpointError(f"{self.directory / INDEX}: weight_map[{quote(name)}] is {quote(shard)}, "
                                      "not a file name; download the file again")
        return weight_map

    def _what_is_there(self) -> str:
        names = sorted(item.name for item in self.directory.iterdir())
        if any(name.endswith(".safetensors") for name in names):
            return f"the directory has safetensors files but no {INDEX} that says which belong to the model"
        if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
            return ("it holds PyTorch pickles, which kjax does not open because they can run code; "
                    "convert them with save_pretrained(..., safe_serialization=True)")
        return "no safetensors file at all; give the directory that holds the model's weights"

    def json(self, name: str, required: bool = True) -> dict | None:
        """The object in a JSON file of the directory; None if it is not there and not required."""
        path, shown = inside(self.directory, name), str(self.directory / name)
        if not path.exists():
            if required:
                raise CheckpointError(f"{self.directory}: no {name}; give the directory that holds it and the weights")
            return None
        handle, size = open_regular(path, shown)
        try:
            if size > MAX_JSON:
                raise CheckpointError(f"{shown}: {size} bytes are too many for a JSON file of a checkpoint")
            data = bytearray(size)
            fill(handle, memoryview(data), 0, shown)
        finally:
            os.close(handle)
        return parse_json(bytes(data), shown)

    @property
    def config_path(self) -> Path:
        return self.directory / CONFIG

    @property
    def config_json(self) -> dict:
        """The contents of config.json."""
        return self.json(CONFIG)

    def names(self) -> Iterable[str]:
        """All tensor names, shard by shard in the order of their bytes."""
        return self._entries.keys()

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def entry(self, name: str) -> TensorEntry:
        """Where the tensor lies."""
        try:
            return self._entries[name]
        except KeyError:
            raise CheckpointError(f"{self.directory}: no tensor {quote(name)}") from None

    def read_bytes(self, entry: TensorEntry, out: np.ndarray, offset: int = 0):
        """Fills `out`, a contiguous array, with the tensor's bytes from `offset` on. Safe to call from many threads."""
        view = memoryview(out.reshape(-1).view(np.uint8))
        if entry.begin + offset + len(view) > entry.end:
            raise ValueError(f"{entry.name}: {len(view)} bytes at {offset} reach past the tensor")
        if entry.path not in self._handles:
            raise CheckpointError(f"{self.directory}: the checkpoint is closed")
        fill(self._handles[entry.path], view, entry.begin + offset, f"{entry.path}: tensor {quote(entry.name)}")

    def read(self, name: str) -> np.ndarray:
        """The tensor as a numpy array of the stored dtype (ml_dtypes for bfloat16 and float8)."""
        entry = self.entry(name)
        out = np.empty(entry.shape, DTYPES[entry.dtype])
        self.read_bytes(entry, out)
        return out

    def close(self):
        """Closes the files; entries stay valid as places."""
        self._close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _close_all(handles: dict[Path, int]):
    while handles:
        os.close(handles.popitem()[1])


def _by_number(name: str) -> str:
    """Sorts model-2-of-61 before model-10-of-61."""
    return re.sub(r"\d+", lambda digits: digits[0].zfill(20), name)


def _listed(names: list[str], limit: int = 20) -> str:
    shown = ", ".join(quote(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
