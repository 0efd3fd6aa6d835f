"""Typed access to the keys of a config.json, with errors that name file and key."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from kjax.errors import CheckpointError

_REQUIRED = object()


class Keys:
    """An object of a config.json.  where: how messages name it.  renamed: key -> its spellings here."""

    def __init__(self, where: str, content: dict, renamed: Mapping[str, tuple[str, ...]] | None = None):
        self.where, self.content, self.renamed = where, content, renamed or {}

    def spelled(self, key: str) -> str:
        """How the key is written here."""
        spellings = self.renamed.get(key, (key,))
        return next((spelling for spelling in spellings if spelling in self.content), spellings[0])

    def fail(self, key: str, rule: str):
        key = self.spelled(key)
        value = f" = {self.content[key]!r}" if key in self.content else ""
        raise CheckpointError(f"{self.where}: {key}{value}: {rule}")

    def get(self, key: str, default=_REQUIRED):
        """The value; an absent key or null gives the default."""
        value = self.content.get(self.spelled(key))
        if value is None and default is _REQUIRED:
            self.fail(key, "is missing" if self.spelled(key) not in self.content else "must be given")
        return default if value is None else value

    def integer(self, key: str, default=_REQUIRED, least: int = 1) -> int:
        value = self.get(key, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
            self.fail(key, f"expected a whole number, at least {least}")
        return value

    def number(self, key: str, default=_REQUIRED, positive: bool = True) -> float:
        value = self.get(key, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            self.fail(key, "expected a number")
        if value < 0 or (positive and value == 0):
            self.fail(key, "must be positive" if positive else "must not be negative")
        return float(value)

    def flag(self, key: str, default=_REQUIRED) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            self.fail(key, "expected true or false")
        return value

    def only(self, key: str, supported):
        """Refuses a value whose arithmetic kjax does not have, instead of ignoring it."""
        if self.get(key, supported) != supported:
            self.fail(key, f"not supported, only {json.dumps(supported)}")

    def inner(self, key: str) -> "Keys":
        """An object within this one; empty where it is absent or null."""
        value = self.get(key, {})
        if not isinstance(value, dict):
            self.fail(key, "expected an object")
        return Keys(f"{self.where}: {key}", value)


def read(source: str | Path | dict, where: str) -> Keys:
    """The keys of a config.json: its path, the directory it lies in, or its content, which errors call `where`."""
    if isinstance(source, dict):
        return Keys(where, source)
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: a model directory needs its config.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected an object of settings")
    return Keys(str(path), content)
