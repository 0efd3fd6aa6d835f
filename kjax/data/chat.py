"""A dialogue through its chat template: ids, and a mask of the tokens that are trained.

A template is an arbitrary program from text to text, so three kinds of marks travel through it inside the text:
noncharacters of Unicode, chosen so that no message holds them. A *guard* behind every character of a message that
could begin a special token breaks what a user types to imitate one. *Span* marks stand around what is trained: put
there by the template's own {% generation %} blocks, or else around the replies before rendering. The rendered text
is cut at special tokens; marks are dropped, and each piece of text is encoded as plain text.
"""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from kjax.data import templates
from kjax.errors import DataError

if TYPE_CHECKING:
    from kjax.data.tokenizer import Tokenizer

Train = Literal["assistant", "last", "all"] | None
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
_THINK = ("<think>", "</think>")  # markers a reply may write itself
_CHUNK = 512  # dialogues whose pieces of text are encoded together, by all cores


class Marks(NamedTuple):
    guard: str
    start: str
    end: str


class Piece(NamedTuple):
    """A special token (id), or text (id None) with a flag per character: trained or not."""

    text: str
    id: int | None
    trained: bytes


def render(tokenizer: "Tokenizer", conversations: Sequence[Sequence[Mapping[str, str]]], where: Sequence[str],
           train: Train, add_generation_prompt: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids int32, trained bool) of each dialogue."""
    if tokenizer.template is None:
        raise DataError(f"{tokenizer.name} has no chat template; set data.template to a .jinja file or one of "
                        + ", ".join(templates.packaged()))
    results = []
    with templates.Renderer(tokenizer.template, tokenizer.variables) as renderer:
        for begin in range(0, len(conversations), _CHUNK):
            chunk = zip(conversations[begin:begin + _CHUNK], where[begin:begin + _CHUNK], strict=True)
            pieces = [_pieces(tokenizer, renderer, conversation, name, train, add_generation_prompt)
                      for conversation, name in chunk]
            results += _encode(tokenizer, pieces)
    return results


def end_tokens(tokenizer: "Tokenizer") -> set[int]:
    """The special tokens with which this template ends a reply, seen on a dialogue of one."""
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ids, trained = render(tokenizer, [probe], ["a test dialogue"], "assistant", False)[0]
    last = np.flatnonzero(trained)[-1:]
    return {int(ids[i]) for i in last if tokenizer.is_special(int(ids[i]))}


def _pieces(tokenizer, renderer: templates.Renderer, conversation, where: str, train: Train, prompt: bool,
            ) -> list[Piece]:
    marks = _marks(conversation, where)
    messages = [dict(m, content=_guarded(m["content"], m["role"], tokenizer, marks.guard)) for m in conversation]
    replies = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    trained = [] if train is None else replies[-1:] if train == "last" else replies

    def run(messages) -> str:
        return renderer.render({"messages": messages, "add_generation_prompt": prompt,
                                "generation_start": marks.start, "generation_end": marks.end}, where)

    text = run(messages)
    if not trained:
        text = text.replace(marks.start, "").replace(marks.end, "")
    elif renderer.marks_generation:
        text = _check_spans(tokenizer, text, messages, replies, trained, marks, where)
    else:
        text = _mark_replies(tokenizer, text, run, messages, trained, marks, where)
    return _cut(tokenizer, text, marks, take_end=not renderer.marks_generation, everything=train == "all")


def _marks(conversation, where: str) -> Marks:
    used = set().union(*(m["content"] for m in conversation))
    free = [c for c in _NONCHARACTERS if c not in used]
    if len(free) < len(Marks._fields):
        raise DataError(f"{where}: the messages use nearly all of the noncharacters U+FDD0 to U+FDEF, which Unicode "
                        "keeps for internal use")
    return Marks(*free[: len(Marks._fields)])


def _guarded(content: str, role: str, tokenizer, guard: str) -> str:
    """A guard behind every character with which a special token begins; a reply may write <think> itself."""
    allowed = [re.escape(t) for t in _THINK if t in tokenizer.specials] if role == "assistant" else []
    first = {re.escape(text[0]) for text in tokenizer.specials}
    if not first:
        return content
    return re.sub("|".join([*allowed, *sorted(first)]), lambda m: m[0] if len(m[0]) > 1 else m[0] + guard, content)


def _check_spans(tokenizer, text: str, messages, replies, trained, marks: Marks, where: str) -> str:
    """The template's own marks: one span per reply, with all of its text; marks of untrained replies are dropped."""
    spans = list(re.finditer(f"{marks.start}([^{marks.start}{marks.end}]*){marks.end}", text))
    if len(spans) != len(replies) or text.count(marks.start) != len(spans) or text.count(marks.end) != len(spans):
        raise DataError(f"{where}: chat template {tokenizer.template.name} marks {len(spans)} generated passages for "
                        f"{len(replies)} replies; a trained reply needs one generation block")
    pieces, position = [], 0
    for reply, span in zip(replies, spans, strict=True):
        content = messages[reply]["content"].strip()
        if reply in trained and content not in span[1]:
            raise _dropped(tokenizer, content, where)
        pieces += [text[position:span.start()], span[0] if reply in trained else span[1]]
        position = span.end()
    return "".join([*pieces, text[position:]])


def _mark_replies(tokenizer, plain: str, run, messages, trained, marks: Marks, where: str) -> str:
    """Marks around the trained replies of a template without its own.

    The marked text must equal the plain one but for the marks, with every reply whole between its two: then the
    template neither drops nor changes what it is given. A template that strips white space gets the marks inside it.
    """
    for strip in (False, True):
        cores = {i: messages[i]["content"].strip() if strip else messages[i]["content"] for i in trained}
        marked = run([dict(m, content=m["content"].replace(cores[i], f"{marks.start}{cores[i]}{marks.end}", 1))
                      if i in trained else m for i, m in enumerate(messages)])
        spans = re.findall(f"{marks.start}([^{marks.start}{marks.end}]*){marks.end}", marked)
        if spans == list(cores.values()) and marked.replace(marks.start, "").replace(marks.end, "") == plain:
            return marked
    lost = next((messages[i]["content"].strip() for i in trained if messages[i]["content"].strip() not in plain),
                messages[trained[0]]["content"])
    raise _dropped(tokenizer, lost.replace(marks.guard, ""), where)


def _dropped(tokenizer, content: str, where: str) -> DataError:
    name = templates.suggestion(tokenizer.specials)
    way = f"data.template = {name!r}, which keeps it" if name else "a template that keeps it in data.template"
    return DataError(f"{where}: chat template {tokenizer.template.name} drops or changes part of the reply "
                     f"{content[:40]!r}..., which would then not be trained; set {way}")


def _cut(tokenizer, text: str, marks: Marks, take_end: bool, everything: bool) -> list[Piece]:
    """Special tokens and the text between them, marks removed.

    take_end: a span ends with its text, and the special token right behind it, which ends the turn, is trained too.
    """
    pieces: list[Piece] = []
    inside, position = False, 0
    for special in [*tokenizer.special_pattern(marks.guard).finditer(text), None]:
        segment = text[position: special.start() if special else len(text)].replace(marks.guard, "")
        flags, behind_end = bytearray(), None
        for part in re.split(f"([{marks.start}{marks.end}])", segment):
            if part in (marks.start, marks.end):
                inside = part == marks.start
                behind_end = None if inside else len(flags)
            else:
                flags += bytes([inside or everything]) * len(part)
                if part.strip():
                    behind_end = None
        ends_turn = take_end and behind_end is not None
        if ends_turn and special:
            flags[behind_end:] = bytes([True]) * (len(flags) - behind_end)  # white space between reply and end token
        if segment := segment.replace(marks.start, "").replace(marks.end, ""):
            pieces.append(Piece(segment, None, bytes(flags)))
        if special:
            token = special[0] if special[0] in tokenizer.specials else special[0].strip()
            pieces.append(Piece(token, tokenizer.specials[token].id, bytes([inside or everything or ends_turn])))
            position = special.end()
    return pieces


def _encode(tokenizer, dialogues: list[list[Piece]]) -> list[tuple[np.ndarray, np.ndarray]]:
    texts = list({piece.text for pieces in dialogues for piece in pieces if piece.id is None})
    encoded = dict(zip(texts, tokenizer.bpe.encode_batch(texts, add_special_tokens=False), strict=True))
    return [_join(tokenizer, pieces, encoded) for pieces in dialogues]


def _join(tokenizer, pieces: list[Piece], encoded: Mapping) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of one dialogue, with the beginning-of-sequence token once where the model wants it."""
    ids: list[int] = []
    trained: list[bool] = []
    for piece in pieces:
        if piece.id is not None:
            ids.append(piece.id)
            trained.append(bool(piece.trained[0]))
            continue
        encoding = encoded[piece.text]
        ids += encoding.ids
        if min(piece.trained) == max(piece.trained):
            trained += [bool(piece.trained[0])] * len(encoding.ids)
        else:  # a token is trained if any of its characters is: " x" of an untrained " " and a trained "x"
            trained += [any(piece.trained[begin:max(end, begin + 1)]) for begin, end in encoding.offsets]
    leading = next((i for i, token in enumerate(ids) if token != tokenizer.bos_id), len(ids))
    if tokenizer.add_bos or leading > 1:
        ids = [tokenizer.bos_id, *ids[leading:]]
        trained = [any(trained[:leading]), *trained[leading:]]
    return np.array(ids, np.int32), np.array(trained, bool)
