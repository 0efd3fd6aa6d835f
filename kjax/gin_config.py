"""Gin text in, one checked frozen `Config` out, and back.

`load` has no global state: it can be called again and again, in notebooks and from several threads.
"""

import dataclasses
import re
import types
import typing
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from kjax import config as settings
from kjax import gin_names, gin_reader
from kjax.errors import ConfigError
from kjax.gin_names import CLASSES, hints
from kjax.gin_reader import Binding, Macro

REQUIRED = "gin.REQUIRED"

Files = str | Path | Iterable[str | Path]
Bindings = Mapping[str, Any] | str | Iterable[str]


class Resolved(NamedTuple):
    """A config with where each of its settings comes from: {"Lora.rank": "run.gin:7"}; defaults are absent."""

    config: settings.Config
    origins: dict[str, str]


def load(files: Files = (), bindings: Bindings = (), fallback: Mapping[str, Any] | None = None) -> settings.Config:
    """Reads gin files in order (later ones win), then bindings: ["Lora.rank=16", "RANK=4"] or {"Lora.rank": 16}.

    fallback: values for settings that would otherwise be missing, for uses that do not need them.
    """
    return resolve(files, bindings, fallback).config


def resolve(files: Files = (), bindings: Bindings = (), fallback: Mapping[str, Any] | None = None) -> Resolved:
    """As `load`, together with the origin of every setting."""
    fallback = fallback or {}
    macros: dict[str, Binding] = {}
    bound: dict[str, Binding] = {}
    for file in [files] if isinstance(files, (str, Path)) else files:
        gin_reader.read(file, macros, bound)
    _bind_command_line(bindings, macros, bound)
    values, origins, used, missing = dict(fallback), {}, set(), {}
    for key, binding in bound.items():
        lacking = {}
        value, origin = _fill(key, binding, macros, used, lacking)
        if not lacking or key not in fallback:
            values[key], origins[key] = value, origin
            missing |= {name: place for name, place in lacking.items() if name not in missing}
    config = _build(values, origins, missing)
    for binding in (*bound.values(), *macros.values()):
        used |= binding.earlier  # what a later file overrides was not forgotten
    for name, binding in macros.items():
        if name not in used:
            warnings.warn(f"{binding.origin}: nothing uses the macro {name}"
                          f"{gin_names.near(name, used) or gin_names.suggest(name)}", stacklevel=3)
    return Resolved(config, origins)


def text(config: settings.Config, defaults: bool = True) -> str:
    """Gin text that `load` reads back to an equal config; without `defaults`, only the settings that differ."""
    blocks = ["# Written by kjax; `kjax train --gin_file` reads it back.\n"]
    for name, cls in CLASSES.items():
        part = getattr(config, name.lower())
        lines = [f"{name}.{field} = {_literal(value, hints(name)[field], f'{name}.{field}')}\n"
                 for field, value in vars(part).items() if defaults or value != _default(cls, field)]
        if lines:
            blocks.append("".join(lines))
    return "\n".join(blocks)


def annotated(resolved: Resolved) -> str:
    """Every setting with where it comes from, as gin text, and what follows from the settings."""
    config = resolved.config
    lines = [f"{key} = {_literal(value, _hint(key), key)}" for key, value in flat(config).items()]
    width = min(60, max(map(len, lines)))
    lines = [f"{line:{width}}  # {resolved.origins.get(key, 'default')}"
             for line, key in zip(lines, flat(config), strict=True)]
    rows, length = config.train.rows_per_step, config.data.max_length
    lines += ["", f"# tokens per step: at most {rows * length:,} ({rows} rows of {length})"]
    return "\n".join(lines) + "\n"


def flat(config: settings.Config) -> dict[str, Any]:
    """{"Lora.rank": 8, ...}: every setting of a config by its gin name."""
    return {f"{name}.{field}": value for name in CLASSES
            for field, value in vars(getattr(config, name.lower())).items()}


def changes(before: settings.Config, after: settings.Config) -> dict[str, tuple[Any, Any]]:
    """The settings in which two configs differ, by gin name, as (before, after)."""
    old, new = flat(before), flat(after)
    return {key: (old[key], new[key]) for key in new if old[key] != new[key]}


def _bind_command_line(bindings: Bindings, macros: dict[str, Binding], bound: dict[str, Binding]):
    """NAME=VALUE after the files, in place. A macro's text is read last: what it fills decides how."""
    if isinstance(bindings, Mapping):
        triples = [(name, value, None) for name, value in bindings.items()]
    else:
        triples = [_split(binding) for binding in ([bindings] if isinstance(bindings, str) else bindings)]
    named = []
    for name, value, raw in triples:
        where = f"{name} = {value!r}" if raw is None else f"--gin.{name}={raw}"
        if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name):
            raise ConfigError(f"{where}: {name!r} is not a name; write --gin.Lora.rank=16 or --gin.RANK=16")
        selector, _, argument = name.rpartition(".")
        key, is_macro = gin_names.key_of("", selector or argument, argument if selector else "", where)
        if is_macro:
            named.append((key, value, raw, where))
        else:
            gin_reader.bind(bound, key, _checked(value, raw, [_hint(key)], where), where)
    for key, value, raw, where in named:
        if not (wanted := _macro_hints(key, macros, bound)):
            raise ConfigError(f"{where}: no setting uses the macro {key}"
                              f"{gin_names.near(key, macros) or gin_names.suggest(key)}")
        gin_reader.bind(macros, key, _checked(value, raw, wanted, where), where)


def _split(binding: str) -> tuple[str, None, str]:
    name, equals, raw = binding.removeprefix("--gin.").partition("=")
    if not equals:
        raise ConfigError(f"--gin.{name}: give a value: --gin.{name}=VALUE")
    return name.strip(), None, raw.strip()


def _checked(value, raw: str | None, wanted: list, where: str):
    value = value if raw is None else _shell_value(raw, wanted, where)
    gin_reader.check_value(value, where)
    return value


def _shell_value(raw: str, wanted: list, where: str):
    """The value typed in a shell, where quotes are easily lost: text stays text where text is meant."""
    textual = any(h is str or typing.get_origin(h) is Literal for hint in wanted for h in _members(hint))
    only_text = textual and all(h in (str, type(None)) or typing.get_origin(h) is Literal
                                for hint in wanted for h in _members(hint))
    only_tuple = all(typing.get_origin(hint) is tuple for hint in wanted)
    quoted = raw[:1] in ("'", '"')
    try:
        value = gin_reader.parse_value(raw)
    except SyntaxError:
        if textual and not quoted:
            return raw
        if only_tuple and raw[:1] not in ("'", '"', "(", "["):
            return tuple(part.strip() for part in raw.split(","))
        expected = " or ".join(sorted({_show(hint) for hint in wanted}))
        raise ConfigError(f"{where}: not a value of type {expected}"
                          + ("; keep the quotes from the shell: \"--gin.NAME='text'\"" if quoted else "")) from None
    if only_text and not isinstance(value, (str, Macro)) and value is not None:
        return raw  # run_dir=2026 names a directory
    if only_tuple and isinstance(value, str):
        return (value,)
    return value


def _macro_hints(name: str, macros: dict[str, Binding], bound: dict[str, Binding]) -> list:
    """The types of the settings that a macro fills, directly or by way of other macros."""
    def fills(value, seen: tuple) -> bool:
        return any(found == name or (found in macros and found not in seen
                                     and fills(macros[found].value, (*seen, found)))
                   for found in gin_reader.macro_names(value))

    found = []
    for key, binding in bound.items():
        if fills(binding.value, ()):
            hint = _hint(key)
            if not isinstance(binding.value, Macro) and typing.get_origin(hint) in (tuple, dict):
                hint = next(arg for arg in reversed(typing.get_args(hint)) if arg is not Ellipsis)  # of an item
            found.append(hint)
    return found


def _fill(key: str, binding: Binding, macros: dict, used: set, missing: dict) -> tuple[Any, str]:
    """The value with all macros filled in, and its origin with the macros that led to it."""
    origins = [binding.origin]

    def fill(value, path: tuple, where: str):
        if isinstance(value, Macro):
            if value.name in path:
                cycle = " -> ".join(f"%{name}" for name in (*path[path.index(value.name):], value.name))
                raise ConfigError(f"{where}: the macros name each other in a circle: {cycle}")
            if value.name not in macros:
                name = value.name if value.name != REQUIRED else path[-1] if path else key
                last = macros[path[-1]] if path else binding
                missing.setdefault(name, (key, where, last.overrides if value.name == REQUIRED else ""))
                return None
            used.add(value.name)
            target = macros[value.name]
            if (note := f"%{value.name} from {target.origin}") not in origins:
                origins.append(note)
            return fill(target.value, (*path, value.name), target.origin)
        if isinstance(value, dict):
            return {fill(k, path, where): fill(v, path, where) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(fill(item, path, where) for item in value)
        return value

    return fill(binding.value, (), binding.origin), ", ".join(origins)


def _build(values: dict[str, Any], origins: dict[str, str],
           missing: dict[str, tuple[str, str, str]]) -> settings.Config:
    """The dataclasses, or one error with every missing value and every wrong one."""
    problems = [f"{where}: {name} has no value" + (f" ({key} needs it)" if key != name else "")
                + (f"; it overrides {before}, because later lines win: include the file before that line" if before
                   else f"; add {name} = ... or --gin.{name}=...") for name, (key, where, before) in missing.items()]
    incomplete = {key.partition(".")[0] for key, *_ in missing.values()}
    parts = {}
    for name, cls in CLASSES.items():
        for field in hints(name):
            if _default(cls, field) is dataclasses.MISSING and (key := f"{name}.{field}") not in values:
                problems.append(f"{key} is not set; add {key} = ... or --gin.{key}=...")
                incomplete.add(name)
        if name not in incomplete:
            try:
                parts[name.lower()] = cls(**{key.partition(".")[2]: value for key, value in values.items()
                                             if key.startswith(f"{name}.")})
            except ConfigError as error:
                origin = origins.get(str(error).partition(" ")[0])
                problems.append(f"{origin}: {error}" if origin else str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return settings.Config(**parts)


def _hint(key: str):
    name, _, field = key.partition(".")
    return hints(name)[field]


def _members(hint) -> tuple:
    """The members of a union, or the type itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _show(hint) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _default(cls, field: str):
    f = cls.__dataclass_fields__[field]
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


def _literal(value, hint, what: str) -> str:
    """A literal that gin reads back to the same value; 16 of a float setting is written 16.0 so that texts agree."""
    gin_reader.check_value(value, what)
    if isinstance(value, dict):
        item = typing.get_args(hint)[1] if typing.get_origin(hint) is dict else Any
        return "{" + ", ".join(f"{_literal(k, Any, what)}: {_literal(v, item, what)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        inner = ", ".join(_literal(item, Any, what) for item in value)
        if isinstance(value, tuple):
            return f"({inner},)" if len(value) == 1 else f"({inner})"
        return f"[{inner}]"
    if isinstance(value, int) and not isinstance(value, bool) and float in _members(hint):
        value = float(value)
    if value is not None and not isinstance(value, (str, bool, int, float)):
        raise ConfigError(f"{what}: {value!r} cannot be written as gin text")
    return repr(value)
