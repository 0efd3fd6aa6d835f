"""Gin files to bindings: gin's parser reads the text, names are checked, and nothing in it is ever executed.

Everything refused is refused with file and line. gin itself would run `import` statements and `@name()` calls and
keep its bindings in process-wide state; only its parser is used here, and the bindings stay data.
"""

import io
import math
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gin import config_parser

from kjax.errors import ConfigError
from kjax.gin_names import CLASSES, class_name, key_of, near

PACKAGED = Path(__file__).parent / "configs"
MAX_BYTES = 1 << 20  # a gin file is written by hand; a larger one is something else
MAX_DEPTH = 32  # nested brackets in one value: far above any use, far below Python's recursion limit


class Macro(NamedTuple):
    """`%NAME` in a value."""

    name: str


class Call(NamedTuple):
    """`@name` or `@name()` in a value: kept until its line is known, then refused."""

    text: str


class Binding(NamedTuple):
    """A value as written, before its macros are filled in, and where: `file.gin:7` or the command-line text.

    earlier: the macros of the bindings that this one overrides.  overrides: where the last of them is, or "".
    """

    value: Any
    origin: str
    earlier: frozenset[str] = frozenset()
    overrides: str = ""


def read(file: str | Path, macros: dict[str, Binding], bound: dict[str, Binding]):
    """Adds the bindings of a file and its includes to `macros` ("RANK") and `bound` ("Lora.rank"); later ones win."""
    path = _find(Path(file))
    _read(path, str(file), macros, bound, ())


def parse_value(text: str) -> Any:
    """One value on its own, as the command line gives it. Raises SyntaxError, whatever the fault, or ConfigError."""
    try:
        parser = _Parser(text, "")
        value = parser.parse_value()
        if parser.current_token.type not in (tokenize.NEWLINE, tokenize.ENDMARKER):
            raise SyntaxError("more than one value")
    except (tokenize.TokenError, ValueError, TypeError, RecursionError, StopIteration, RuntimeError) as error:
        raise SyntaxError(str(error)) from None
    return value


class _Parser(config_parser.ConfigParser):
    """gin's parser, which also refuses a dictionary key given twice and brackets without end."""

    def __init__(self, source: str, file: str):
        stream = io.StringIO(source)
        stream.name = file
        self._keys: list[set] = []
        self.opened = 1  # the line where the outermost bracket opened, for text that ends inside it
        super().__init__(stream, _Delegate())

    def _maybe_parse_container(self):
        if not self._keys:
            self.opened = self.current_token.start[0]
        if len(self._keys) >= MAX_DEPTH:
            self._raise_syntax_error(f"more than {MAX_DEPTH} nested brackets")
        self._keys.append(set())
        try:
            return super()._maybe_parse_container()
        finally:
            self._keys.pop()

    def _parse_dict_item(self):
        key, value = super()._parse_dict_item()
        if not isinstance(key, (str, int, float)):
            self._raise_syntax_error(f"a dictionary key must be a string or a number, not {key!r}")
        if key in self._keys[-1]:
            self._raise_syntax_error(f"the dictionary key {key!r} is given twice")
        self._keys[-1].add(key)
        return key, value


class _Delegate(config_parser.ParserDelegate):
    def configurable_reference(self, scoped_configurable_name, evaluate):
        return Call(f"@{scoped_configurable_name}" + ("()" if evaluate else ""))

    def macro(self, macro_name):
        return Macro(macro_name)


def _find(path: Path) -> Path:
    """A file named by the user: anywhere; a relative name that is not there may be a packaged config."""
    if path.is_file():
        return path
    packaged = PACKAGED / path
    if not path.is_absolute() and ".." not in path.parts and packaged.is_file():
        return packaged
    names = sorted(p.relative_to(PACKAGED).as_posix() for p in PACKAGED.rglob("*.gin"))
    raise ConfigError(f"{path}: no such gin file{near(str(path), names)} (packaged configs: {', '.join(names)})")


def _find_include(name: str, file: Path, shown: str, where: str) -> tuple[Path, str]:
    """An included file, and its name for messages: only below the including file's directory, or packaged."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise ConfigError(f"{where}: include {name!r}: give a path below this file's directory or the name of a "
                          "packaged config; absolute paths and '..' are refused")
    for directory, label in ((file.parent, str(Path(shown).parent / path)), (PACKAGED, name)):
        candidate = directory / path
        if candidate.is_file():
            if not candidate.resolve().is_relative_to(directory.resolve()):
                raise ConfigError(f"{where}: include {name!r}: the link leads out of {directory}; copy the file there")
            return candidate, label
    raise ConfigError(f"{where}: include {name!r}: not found in {file.parent} nor among the packaged configs")


def _source(path: Path, shown: str) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{shown}:1: larger than {MAX_BYTES} bytes: not a gin file")
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{shown}: cannot be read: {error.strerror}") from error
    if raw.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise ConfigError(f"{shown}:1: starts with a byte-order mark; save the file as UTF-8 without one")
    try:
        source = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        byte = raw[error.start]
        raise ConfigError(f"{shown}:{line}: not UTF-8 (byte {byte:#04x}); save the file as UTF-8") from error
    if "\0" in source:
        raise ConfigError(f"{shown}:{source.count(chr(10), 0, source.index(chr(0))) + 1}: holds a NUL character")
    return source


def _statements(source: str, file: str) -> Iterator:
    """The statements of a file; every way in which gin's parser or tokenizer can fail becomes a ConfigError."""
    parser = None
    try:
        parser = _Parser(source, file)
        yield from parser
    except ConfigError:
        raise
    except SyntaxError as error:
        raise ConfigError(f"{file}:{error.lineno}: {_plain(error.msg)}") from None
    except tokenize.TokenError as error:
        line = parser.opened if parser is not None and "statement" in error.args[0] else error.args[1][0]
        raise ConfigError(f"{file}:{line}: a bracket or a quote is not closed ({error.args[0]})") from None
    except (ValueError, TypeError, RecursionError, RuntimeError) as error:
        line = parser.current_token.start[0] if parser is not None and parser.current_token else 1
        raise ConfigError(f"{file}:{line}: cannot be read: {str(error).splitlines()[0]}") from None


def _plain(message: str) -> str:
    """gin's syntax message, said for people."""
    if token := re.search(r"Failed to parse token '(.*)'", message, re.DOTALL):
        shown = token[1] if len(token[1]) <= 40 else token[1][:40] + "..."
        return (f"cannot read {shown}: a value is a literal (strings need quotes; True, False and None are "
                "capitalised), a list, a dictionary or %MACRO; calls and arithmetic are not")
    return message.strip().rstrip(".")


def _read(path: Path, shown: str, macros: dict, bound: dict, including: tuple[Path, ...]):
    real = path.resolve()
    if real in including:
        raise ConfigError(f"{shown}:1: includes itself by way of {' -> '.join(p.name for p in (*including, real))}")
    seen: dict[str, str] = {}
    for statement in _statements(_source(path, shown), shown):
        where = f"{shown}:{statement.location.line_num}"
        if isinstance(statement, config_parser.ImportStatement):
            raise ConfigError(f"{where}: `{statement.format()}`: kjax reads gin files as data; imports and dynamic "
                              "registration are refused, and none is needed: remove the line")
        if isinstance(statement, config_parser.IncludeStatement):
            target, label = _find_include(statement.filename, path, shown, where)
            _read(target, label, macros, bound, (*including, real))
        elif isinstance(statement, config_parser.BlockDeclaration):
            class_name(statement.scope, statement.selector, where)
        else:
            key, is_macro = key_of(statement.scope, statement.selector, statement.arg_name, where)
            if key in seen:
                raise ConfigError(f"{where}: {key} is already bound at {seen[key]}; keep one of them")
            seen[key] = where
            check_value(statement.value, f"{where}: {key}")
            bind(macros if is_macro else bound, key, statement.value, where)


def bind(bindings: dict[str, Binding], key: str, value: Any, origin: str):
    """Binds a name, over what it was bound to before."""
    before = bindings.get(key)
    earlier = before.earlier | set(macro_names(before.value)) if before else frozenset()
    bindings[key] = Binding(value, origin, earlier, before.origin if before else "")


def macro_names(value: Any) -> Iterator[str]:
    """The macros in a value."""
    if isinstance(value, Macro):
        yield value.name
    elif isinstance(value, dict):
        for pair in value.items():
            yield from macro_names(pair)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from macro_names(item)


def check_value(value, what: str):
    """Numbers are finite (gin reads 1e400 as inf), nothing is called, and all else has a JSON equivalent."""
    if isinstance(value, Call):
        raise ConfigError(f"{what} = {value.text}: kjax reads gin files as data and calls nothing; write the values "
                          f"themselves (bindable are {', '.join(CLASSES)})")
    if isinstance(value, dict):
        for pair in value.items():
            check_value(pair, what)
    elif isinstance(value, (list, tuple)) and not isinstance(value, Macro):
        for item in value:
            check_value(item, what)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{what}: the number is not finite")
    elif isinstance(value, (bytes, complex)):
        raise ConfigError(f"{what}: {value!r} is neither text nor a real number")
