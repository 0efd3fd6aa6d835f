"""Rows of JSON and JSON Lines files, found by path or by an entry of a LLaMA-Factory dataset_info.json."""

import difflib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kjax.errors import DataError

_ENTRY_KEYS = ("file_name", "formatting", "columns", "tags", "num_samples", "ranking")
_REFUSED_KEYS = {
    "hf_hub_url": "download the dataset and name the file",
    "ms_hub_url": "download the dataset and name the file",
    "om_hub_url": "download the dataset and name the file",
    "cloud_file_name": "download the file and name it",
    "script_url": "a dataset script is remote code; convert the rows to JSON Lines",
    "subset": "only local files are read",
    "split": "only local files are read; choose rows with data.select",
    "folder": "name one file with file_name",
}


@dataclass(frozen=True)
class Row:
    """One JSON object and where it stands, for messages: `data.jsonl, line 12`."""

    where: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """A file and how its columns are named; format None leaves it to detection."""

    path: Path
    format: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    num_samples: int | None = None


class _NotJson:
    """Stands for NaN, Infinity or a number beyond float64 until its row is known."""

    def __init__(self, text: str):
        self.text = text


def _float(text: str):
    value = float(text)
    return value if math.isfinite(value) else _NotJson(text)


def _parse(text: str):
    return json.loads(text, parse_constant=_NotJson, parse_float=_float)


def _find_not_json(value) -> _NotJson | None:
    pending = [value]
    while pending:
        match pending.pop():
            case _NotJson() as found:
                return found
            case dict() as items:
                pending.extend(items.values())
            case list() as items:
                pending.extend(items)
    return None


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        return data.decode("utf-8-sig")  # Windows tools write a byte-order mark
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8 (byte {data[error.start]:#04x}); convert the file") from error


def _values(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """(where, value) of each element: an array if the text opens with '[', else one JSON value per line."""
    if text.lstrip()[:1] == "[":
        try:
            values = _parse(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: invalid JSON: {error}") from error
        yield from ((f"{path}, row {number}", value) for number, value in enumerate(values, 1))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                yield where, _parse(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: invalid JSON: {error}; a file holds an array of objects, or one object "
                                "per line") from error


def read(path: Path) -> list[Row]:
    """All rows of a .json or .jsonl file, in order; the first thing wrong is a DataError that names file and row."""
    rows = []
    for where, value in _values(path, _text(path)):
        if not isinstance(value, dict):
            raise DataError(f"{where}: a row must be an object with named columns, not {type(value).__name__}")
        if found := _find_not_json(value):
            raise DataError(f"{where}: {found.text} is not a finite JSON number; write null or leave it out")
        rows.append(Row(where, value))
    if not rows:
        raise DataError(f"{path}: holds no rows")
    return rows


def columns_of(rows: list[Row]) -> list[str]:
    """Names of all columns, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row.values))


def select(rows: list[Row], filters: Mapping[str, Any], path: Path) -> list[Row]:
    """Rows whose columns equal the given values; a filter that names no column or keeps nothing is an error."""
    for name, wanted in filters.items():
        if name not in (names := columns_of(rows)):
            raise DataError(f"{path}: no column {name!r} to select rows by; the file has: {', '.join(names)}")
        kept = [row for row in rows if _same(row.values.get(name), wanted)]
        if not kept:
            seen = list(dict.fromkeys(repr(row.values.get(name)) for row in rows))
            listed = ", ".join(seen[:8]) + (", ..." if len(seen) > 8 else "")
            raise DataError(f"{path}: no row has {name} = {wanted!r}; it holds {listed}")
        rows = kept
    return rows


def _same(value, wanted) -> bool:
    return value == wanted and isinstance(value, bool) == isinstance(wanted, bool)  # JSON true is not 1


def resolve(dataset: str, dataset_dir: str | None) -> Source:
    """The file behind `data.dataset`: a path (also relative to dataset_dir), or an entry of dataset_info.json."""
    directory = Path(dataset_dir) if dataset_dir is not None else None
    for path in [Path(dataset)] + ([directory / dataset] if directory else []):
        if path.is_file():
            if path.suffix not in (".json", ".jsonl"):
                raise DataError(f"{path}: only .json and .jsonl files are read; convert it")
            return Source(path)
    if Path(dataset).suffix in (".json", ".jsonl"):
        raise DataError(f"{dataset}: no such file" + (f", nor in {directory}" if directory else ""))
    if directory is None:
        raise DataError(f"dataset {dataset!r} is no .json or .jsonl file; to use an entry of a dataset_info.json, "
                        "set data.dataset_dir to its directory")
    return _entry(dataset, directory)


def _entry(name: str, directory: Path) -> Source:
    info = directory / "dataset_info.json"
    if not info.is_file():
        raise DataError(f"dataset {name!r} is no file, and {info} does not exist")
    try:
        entries = _parse(_text(info))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{info}: invalid JSON: {error}") from error
    if not isinstance(entries, dict):
        raise DataError(f"{info}: must be an object of entries by name")
    if name not in entries:
        near = difflib.get_close_matches(name, entries, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "it has: " + ", ".join(list(entries)[:20])
        raise DataError(f"{info}: no entry {name!r}; {hint}")
    where, entry = f"{info}, entry {name!r}", entries[name]
    if not isinstance(entry, dict):
        raise DataError(f"{where}: must be an object")
    for key, value in entry.items():
        if key in _REFUSED_KEYS and value is not None:
            raise DataError(f"{where}: {key} is not supported: {_REFUSED_KEYS[key]}")
        if key not in _ENTRY_KEYS and key not in _REFUSED_KEYS:
            raise DataError(f"{where}: unknown key {key!r}; known: {', '.join(_ENTRY_KEYS)}")
    if entry.get("ranking"):
        raise DataError(f"{where}: ranking is not supported: preference pairs need another loss")
    return Source(_inside(directory, entry.get("file_name"), where), _formatting(entry.get("formatting"), where),
                  _names(entry, "columns", where), _names(entry, "tags", where),
                  _count(entry.get("num_samples"), where))


def _inside(directory: Path, file_name, where: str) -> Path:
    if not isinstance(file_name, str) or not file_name:
        raise DataError(f"{where}: file_name must name a file in {directory}")
    try:
        path = (directory / file_name).resolve()
        inside = path.is_relative_to(directory.resolve())
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"{where}: file_name {file_name!r} cannot be resolved: {error}") from error
    if not inside:
        raise DataError(f"{where}: file_name {file_name!r} leaves {directory}")
    if not path.is_file():
        raise DataError(f"{where}: {path} is no file")
    if path.suffix not in (".json", ".jsonl"):
        raise DataError(f"{where}: {path.name}: only .json and .jsonl files are read; convert it")
    return path


def _formatting(value, where: str) -> str:
    known = {None: "alpaca", "alpaca": "alpaca", "sharegpt": "sharegpt", "openai": "messages"}
    if not (value is None or isinstance(value, str)) or value not in known:
        raise DataError(f"{where}: formatting {value!r} is not one of alpaca, sharegpt, openai")
    return known[value]


def _names(entry: Mapping, key: str, where: str) -> dict[str, str]:
    value = entry.get(key) or {}
    if not isinstance(value, dict) or not all(v is None or isinstance(v, str) for v in value.values()):
        raise DataError(f"{where}: {key} must map names to names")
    return {name: column for name, column in value.items() if column is not None}


def _count(value, where: str) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise DataError(f"{where}: num_samples must be a positive whole number, not {value!r}")
    return value
