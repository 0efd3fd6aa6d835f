"""Rows in the alpaca, sharegpt and OpenAI `messages` formats become conversations of alternating turns."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kjax import config
from kjax.data import rows as files
from kjax.data.rows import Row, Source
from kjax.errors import ConfigError, DataError

# The defaults of LLaMA-Factory's dataset_info.json, so that its entries read the same here.
_ALPACA_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output"}
_TURN_COLUMNS = {"sharegpt": {"messages": "conversations"}, "messages": {"messages": "messages"}}
_TAGS = {
    "sharegpt": {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt",
                 "system_tag": "system", "observation_tag": "observation", "function_tag": "function_call"},
    "messages": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
                 "system_tag": "system", "observation_tag": "tool", "function_tag": "function"},
}
_KNOWN_COLUMNS = {"alpaca": ("prompt", "query", "response", "history", "system"),
                  "sharegpt": ("messages", "system"), "messages": ("messages", "system")}
_REFUSED_COLUMNS = ("tools", "images", "videos", "audios", "chosen", "rejected", "kto_tag")
_REASONING = ("reasoning_content", "reasoning", "thinking")  # beside a message's text, by who wrote it


@dataclass(frozen=True)
class Message:
    """One turn; role is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """An optional system message, then user and assistant in turn, the assistant last."""

    messages: tuple[Message, ...]
    where: str

    @property
    def prompt(self) -> str:
        """The first user turn: rows that share it belong on one side of a split."""
        return next(m.content for m in self.messages if m.role == "user").strip()

    def as_dicts(self) -> list[dict[str, str]]:
        return [{"role": m.role, "content": m.content} for m in self.messages]


def load_conversations(dataset: str, settings: config.Data, select: Mapping[str, Any] | None = None,
                       ) -> list[Conversation]:
    """Reads a path or dataset_info.json entry; `select` filters rows, settings.limit keeps the first of them."""
    source = files.resolve(dataset, settings.dataset_dir)
    rows = files.read(source.path)
    name, columns, tags = _layout(rows, source, settings.format)
    rows = files.select(rows, select or {}, source.path)
    if source.num_samples is not None:
        if source.num_samples > len(rows):
            raise DataError(f"{source.path}: num_samples = {source.num_samples}, but there are {len(rows)} rows; "
                            "rows are not repeated")
        rows = rows[: source.num_samples]
    rows = rows[: settings.limit]
    if source.format is None:
        # An alpaca row that is trained has its reply in a column of its own, whatever it is preferred to.
        passed = {*(select or {}), *(("chosen", "rejected") if name == "alpaca" else ())}
        _check_columns(rows, [c for c in (*_REFUSED_COLUMNS, "label") if c not in passed])
    convert: Callable = _alpaca if name == "alpaca" else _turns
    return [convert(row, columns, tags) for row in rows]


def _layout(rows: list[Row], source: Source, wanted: str) -> tuple[str, dict[str, str], dict[str, str]]:
    """Format, columns and tags of a file, checked against what is there."""
    if source.format is None:
        name, columns = _detect(rows, source.path) if wanted == "auto" else (wanted, _default_columns(wanted, rows))
        tags = _TAGS.get(name, {})
    else:
        if wanted not in ("auto", source.format):
            raise ConfigError(f"data.format = {wanted!r}, but the entry of dataset_info.json says {source.format!r}")
        name, tags = source.format, {**_TAGS.get(source.format, {}), **source.tags}
        default = _ALPACA_COLUMNS if name == "alpaca" else _TURN_COLUMNS[name]
        columns = {**default, **source.columns}
        _check_names(source, name, tags)
    there = files.columns_of(rows)
    if name == "alpaca":  # either of prompt and query will do, unless the entry names it
        prompts = [columns[key] for key in ("prompt", "query") if key in columns]
        needed = [columns["response"], *(prompts[:1] if not set(prompts) & set(there) else [])]
    else:
        needed = [columns["messages"]]
    missing = [column for column in dict.fromkeys([*needed, *source.columns.values()]) if column not in there]
    if missing:
        raise DataError(f"{source.path}: no column {', '.join(map(repr, missing))} for format {name}; "
                        f"the file has: {', '.join(there)}")
    return name, columns, tags


def _check_names(source: Source, name: str, tags: Mapping[str, str]):
    for key, known, what in [(k, _KNOWN_COLUMNS[name], "columns") for k in source.columns] + [
            (k, tuple(_TAGS.get(name, ())), "tags") for k in source.tags]:
        if key in _REFUSED_COLUMNS:
            column = {**source.tags, **source.columns}[key]
            raise DataError(f"{source.path}: {what} entry {key!r} is not supported; {_reason(key, column)}. An entry "
                            f"of dataset_info.json that does not name {column!r} passes over it")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise DataError(f"{source.path}: unknown {what} entry {key!r} for format {name}"
                            + (f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known) or 'none'}"))


def _check_columns(rows: list[Row], refused: list[str]):
    """Of a file without an entry, no column is passed over that changes what its messages mean."""
    for row in rows:
        for column in refused:
            if _changes_meaning(column, row.values.get(column)):
                raise DataError(f"{row.where}: column {column!r} is not supported; {_reason(column, column)}. An entry "
                                "of a dataset_info.json (data.dataset_dir) reads the columns that it names and passes "
                                "over others")


def _changes_meaning(column: str, value) -> bool:
    if column == "label":  # of KTO's rows where it is true or false; of classifications otherwise
        return isinstance(value, bool)
    return value not in (None, "", [], {}, "[]")  # tools are often JSON within text


def _reason(key: str, column: str) -> str:
    if key in ("kto_tag", "label"):
        return f"unwanted replies would be trained too; data.select = {{{column!r}: True}} keeps the wanted ones"
    return "only text dialogues are trained"


def _default_columns(name: str, rows: list[Row]) -> dict[str, str]:
    there = files.columns_of(rows)
    columns = dict(_ALPACA_COLUMNS if name == "alpaca" else _TURN_COLUMNS[name])
    if name == "alpaca":
        columns |= {c: c for c in ("history", "system") if c in there}
    elif columns["messages"] not in there:
        columns["messages"] = next((c for c in ("messages", "conversations") if c in there), columns["messages"])
    return columns | {c: c for c in ("system",) if c in there}


def _detect(rows: list[Row], path: Path) -> tuple[str, dict[str, str]]:
    first, there = rows[0].values, files.columns_of(rows)
    for column in ("messages", "conversations"):
        turns = first.get(column)
        if isinstance(turns, list) and turns and isinstance(turns[0], dict):
            for name in ("messages", "sharegpt"):
                if _TAGS[name]["role_tag"] in turns[0] and _TAGS[name]["content_tag"] in turns[0]:
                    return name, _default_columns(name, rows) | {"messages": column}
    if "output" in there and ("instruction" in there or "input" in there):
        return "alpaca", _default_columns("alpaca", rows)
    raise DataError(
        f"{path}: cannot tell the format from its columns: {', '.join(there)}. Known are alpaca (instruction, input, "
        "output), sharegpt (conversations of from/value) and messages (role/content); columns with other names are "
        "given by an entry of a dataset_info.json (data.dataset_dir)")


def _string(value, what: str, row: Row) -> str:
    if not isinstance(value, str):
        raise DataError(f"{row.where}: {what} must be text, not {'null' if value is None else type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{row.where}: {what} holds half of a surrogate pair (character {error.start})") from error
    return value


def _optional(row: Row, column: str | None) -> str:
    """Text of a column that may be unmapped, absent or null."""
    value = row.values.get(column) if column else None
    return "" if value is None else _string(value, f"column {column!r}", row)


def _alpaca(row: Row, columns: Mapping[str, str], tags: Mapping[str, str]) -> Conversation:
    """Prompt and query joined by a newline; the answers of `history` are turns like any other."""
    messages = []
    if system := _optional(row, columns.get("system")):
        messages.append(Message("system", system))
    history = row.values.get(columns.get("history")) or []
    if not isinstance(history, list):
        raise DataError(f"{row.where}: history must be a list of [user, assistant] pairs")
    for number, pair in enumerate(history, 1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f"{row.where}: history pair {number} must be [user, assistant]")
        messages += [Message(role, _string(text, f"history pair {number}", row))
                     for role, text in zip(("user", "assistant"), pair, strict=True)]
    prompt = "\n".join(filter(None, (_optional(row, columns.get(key)) for key in ("prompt", "query"))))
    if not prompt:
        named = " and ".join(repr(columns[key]) for key in ("prompt", "query") if key in columns)
        raise DataError(f"{row.where}: no prompt: {named} empty or missing; the row has: {', '.join(row.values)}")
    response = columns["response"]
    if response not in row.values:
        raise DataError(f"{row.where}: no column {response!r}; the row has: {', '.join(row.values)}")
    answer = _string(row.values[response], f"column {response!r}", row)
    return Conversation((*messages, Message("user", prompt), Message("assistant", answer)), row.where)


def _turns(row: Row, columns: Mapping[str, str], tags: Mapping[str, str]) -> Conversation:
    """A list of turns under one column, whose keys and role names the tags give."""
    column = columns["messages"]
    turns = row.values.get(column)
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{row.where}: column {column!r} must be a list of messages")
    messages = []
    if system := _optional(row, columns.get("system")):
        messages.append(Message("system", system))
    for number, turn in enumerate(turns, 1):
        role = _role(turn, number, tags, row)
        expected = "user" if not messages or messages[-1].role in ("system", "assistant") else "assistant"
        if role == "system":
            if messages:
                raise DataError(f"{row.where}: message {number} is from system: there is one system text, and first")
        elif role != expected:
            raise DataError(f"{row.where}: message {number} is from {turn[tags['role_tag']]!r}, expected "
                            f"{tags[expected + '_tag']!r}: user and assistant take turns, user first")
        messages.append(Message(role, _content(turn, role, number, tags, row)))
    if messages[-1].role != "assistant":
        raise DataError(f"{row.where}: the last message is from {messages[-1].role}: there is no reply to train on")
    return Conversation(tuple(messages), row.where)


def _content(turn: Mapping[str, Any], role: str, number: int, tags: Mapping[str, str], row: Row) -> str:
    """Text of a turn; reasoning that stands beside it goes before it, with the line breaks that DeepSeek-R1 writes."""
    content = _string(turn[tags["content_tag"]], f"message {number}", row)
    held = {key: text for key in _REASONING if turn.get(key) is not None
            and (text := _string(turn[key], f"message {number}: {key}", row).strip())}
    if not held:
        return content
    key, reasoning = next(iter(held.items()))
    if role != "assistant":
        raise DataError(f"{row.where}: message {number} is from {turn[tags['role_tag']]!r} and holds {key}: only the "
                        "assistant reasons")
    if len(set(held.values())) > 1:
        raise DataError(f"{row.where}: message {number} holds {' and '.join(held)}, which differ; keep one of them")
    if content.lstrip().startswith("<think>") or "</think>" in content + reasoning:
        raise DataError(f"{row.where}: message {number} holds {key}, but also <think> or </think> in its text; keep "
                        "its reasoning in one of the two")
    return f"<think>\n{reasoning}\n</think>\n\n{content.lstrip()}"


def _role(turn, number: int, tags: Mapping[str, str], row: Row) -> str:
    if not isinstance(turn, dict):
        raise DataError(f"{row.where}: message {number} must be an object, not {type(turn).__name__}")
    for key in (tags["role_tag"], tags["content_tag"]):
        if key not in turn:
            raise DataError(f"{row.where}: message {number} has no {key!r}; it has: {', '.join(turn)}")
    for key in ("tool_calls", "function_call"):
        if turn.get(key):
            raise DataError(f"{row.where}: message {number} holds {key}: tool calls are not supported")
    if turn.get("weight", 1) != 1:
        raise DataError(f"{row.where}: message {number} has weight {turn['weight']!r}: turns are not weighted; "
                        "data.mask_history trains the last reply only")
    name = turn[tags["role_tag"]]
    for role in ("user", "assistant", "system"):
        if name == tags[role + "_tag"]:
            return role
    if name in (tags["observation_tag"], tags["function_tag"]):
        raise DataError(f"{row.where}: message {number} is from {name!r}: tool calls are not supported")
    known = ", ".join(repr(tags[role + "_tag"]) for role in ("system", "user", "assistant"))
    raise DataError(f"{row.where}: message {number} is from {name!r}; known roles: {known}")
