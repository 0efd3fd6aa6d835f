"""A dialogue through its chat template: ids, and a mask of the tokens that are trained.

A template is an arbitrary program from text to text, so three kinds of marks travel through it inside the text:
noncharacters of Unicode, chosen so that no message holds them. A *guard* behind every character of a message that
could begin a special token breaks what a user types to imitate one. *Span* marks stand around what is trained: put
there by the template's own {% generation %} blocks, or else around the replies before rendering. The rendered text
is cut at special tokens; marks are dropped, and each piece of text is encoded as plain text.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from kjax.data import templates
from kjax.errors import DataError

if TYPE_CHECKING:
    from kjax.data.tokenizer import Tokenizer

Train = Literal["assistant", "last", "all"] | None
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
_THINK = ("<think>", "</think>")  # markers a reply may write itself
# What is rendered and encoded together: enough for all cores, small beside the memory a template may use.
_CHUNK_ROWS = 512
_CHUNK_CHARACTERS = 1 << 21


class Marks(NamedTuple):
    guard: str
    start: str
    end: str


class Dialogue(NamedTuple):
    """A conversation on its way: guarded messages, and which of them are replies, and trained."""

    messages: list[dict[str, str]]
    where: str
    marks: Marks
    replies: list[int]
    trained: list[int]

    def variables(self, prompt: bool, strip: bool | None = None) -> dict:
        """What the template is given; strip False or True puts marks around trained replies, or within their white
        space."""
        messages = self.messages
        if strip is not None:
            messages = [dict(m, content=self._marked(m["content"], strip)) if i in self.trained else m
                        for i, m in enumerate(messages)]
        return {"messages": messages, "add_generation_prompt": prompt,
                "generation_start": self.marks.start, "generation_end": self.marks.end}

    def cores(self, strip: bool) -> list[str]:
        return [self.messages[i]["content"].strip() if strip else self.messages[i]["content"] for i in self.trained]

    def _marked(self, content: str, strip: bool) -> str:
        core = content.strip() if strip else content
        return content.replace(core, f"{self.marks.start}{core}{self.marks.end}", 1)

    def unmarked(self, text: str) -> str:
        return text.replace(self.marks.start, "").replace(self.marks.end, "")

    def spans(self, text: str) -> list[re.Match]:
        start, end = self.marks.start, self.marks.end
        return list(re.finditer(f"{start}([^{start}{end}]*){end}", text))


class Piece(NamedTuple):
    """A special token (id), or text (id None) with a flag per character: trained or not."""

    text: str
    id: int | None
    trained: bytes


def render(tokenizer: "Tokenizer", conversations: Sequence[Sequence[Mapping[str, str]]], where: Sequence[str],
           train: Train, add_generation_prompt: bool, thinking: bool | None = None,
           ) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids int32, trained bool) of each dialogue.  thinking: whether a new reply may reason; None: as the template
    does unasked."""
    if tokenizer.template is None:
        raise DataError(f"{tokenizer.name} has no chat template; set data.template to a .jinja file or one of "
                        + ", ".join(templates.packaged()))
    sizes = [_check_messages(c, name) for c, name in zip(conversations, where, strict=True)]
    results = []
    # Published templates ask for either.
    asked = {} if thinking is None else {"thinking": thinking, "enable_thinking": thinking}
    with templates.Renderer(tokenizer.template, tokenizer.variables | asked) as renderer:
        for begin, end in _chunks(sizes):
            chunk = zip(conversations[begin:end], where[begin:end], strict=True)
            dialogues = [_dialogue(tokenizer, conversation, name, train) for conversation, name in chunk]
            texts = _texts(tokenizer, renderer, dialogues, add_generation_prompt)
            results += _encode(tokenizer, [
                _cut(tokenizer, text, dialogue.marks, not renderer.marks_generation, train == "all")
                for dialogue, text in zip(dialogues, texts, strict=True)])
    return results


def _check_messages(conversation: Sequence[Mapping[str, str]], where: str) -> int:
    """Refuses what no template should be asked to render; the number of characters."""
    for number, message in enumerate(conversation, 1):
        known = isinstance(message, Mapping) and set(message) == {"role", "content"}
        if not known or message["role"] not in ("system", "user", "assistant"):
            raise DataError(f"{where}: message {number} must have a role (system, user or assistant) and content, "
                            f"nothing else; it is {message!r:.120}")
        if not isinstance(message["content"], str):
            raise DataError(f"{where}: message {number}: content must be text, not {message['content']!r:.40}")
        try:
            message["content"].encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: message {number} holds half of a surrogate pair") from error
    return sum(len(message["content"]) for message in conversation)


def _chunks(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges of at most _CHUNK_ROWS dialogues and, beyond the first of each, _CHUNK_CHARACTERS."""
    begin = total = 0
    for number, size in enumerate(sizes):
        if number > begin and (number - begin == _CHUNK_ROWS or total + size > _CHUNK_CHARACTERS):
            yield begin, number
            begin, total = number, 0
        total += size
    if sizes:
        yield begin, len(sizes)


def end_tokens(tokenizer: "Tokenizer") -> set[int]:
    """The special tokens with which this template ends a reply, seen on a dialogue of one."""
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ids, trained = render(tokenizer, [probe], ["a test dialogue"], "assistant", False)[0]
    last = np.flatnonzero(trained)[-1:]
    return {int(ids[i]) for i in last if tokenizer.is_special(int(ids[i]))}


def _dialogue(tokenizer, conversation, where: str, train: Train) -> Dialogue:
    used = set().union(*(m["content"] for m in conversation))
    free = [c for c in _NONCHARACTERS if c not in used]
    if len(free) < len(Marks._fields):
        raise DataError(f"{where}: the messages use nearly all of the noncharacters U+FDD0 to U+FDEF, which Unicode "
                        "keeps for internal use")
    marks = Marks(*free[: len(Marks._fields)])
    messages = [dict(m, content=_guarded(tokenizer, m["content"], m["role"], marks.guard)) for m in conversation]
    replies = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    trained = [] if train is None else replies[-1:] if train == "last" else replies
    return Dialogue(messages, where, marks, replies, trained)


def _guarded(tokenizer, content: str, role: str, guard: str) -> str:
    """A guard behind every character with which a special token begins; a reply may write <think> itself."""
    if not tokenizer.openers:
        return content
    allowed = [text for text in _THINK if text in tokenizer.specials] if role == "assistant" else []
    pattern = "|".join([*allowed, f"[{re.escape(tokenizer.openers)}]"])
    return re.sub(pattern, lambda m: m[0] if len(m[0]) > 1 else m[0] + guard, content)


def _texts(tokenizer, renderer: templates.Renderer, dialogues: list[Dialogue], prompt: bool) -> list[str]:
    """Rendered text of each dialogue with marks around what is trained."""
    where = [d.where for d in dialogues]
    plain = renderer.render([d.variables(prompt) for d in dialogues], where)
    if renderer.marks_generation:
        return [_check_spans(tokenizer, d, text) if d.trained else d.unmarked(text)
                for d, text in zip(dialogues, plain, strict=True)]
    marked = renderer.render([d.variables(prompt, strip=False) for d in dialogues], where)
    return [text if _faithful(d, text, bare, strip=False) else _mark_inside(tokenizer, renderer, d, bare, prompt)
            for d, text, bare in zip(dialogues, marked, plain, strict=True)]


def _check_spans(tokenizer, dialogue: Dialogue, text: str) -> str:
    """The template's own marks: one span per reply, with all of its text; marks of untrained replies are dropped."""
    spans, marks = dialogue.spans(text), dialogue.marks
    if {text.count(marks.start), text.count(marks.end), len(spans)} != {len(dialogue.replies)}:
        raise DataError(f"{dialogue.where}: chat template {tokenizer.template.name} marks {len(spans)} generated "
                        f"passages for {len(dialogue.replies)} replies; a trained reply needs one generation block")
    pieces, position = [], 0
    for reply, span in zip(dialogue.replies, spans, strict=True):
        content = dialogue.messages[reply]["content"].strip()
        # White space around reasoning is the template's affair, and so is a <think> that it writes as prompt.
        whole = "".join(content.split()).removeprefix(_THINK[0])
        if reply in dialogue.trained and whole not in "".join(span[1].split()):
            raise _dropped(tokenizer, dialogue, content)
        pieces += [text[position:span.start()], span[0] if reply in dialogue.trained else span[1]]
        position = span.end()
    return "".join([*pieces, text[position:]])


def _faithful(dialogue: Dialogue, marked: str, plain: str, strip: bool) -> bool:
    """Marks around the replies of a template without its own: but for them the text is the plain one, and every reply
    stands whole between its two. Then the template neither drops nor changes what it is given."""
    return ([span[1] for span in dialogue.spans(marked)] == dialogue.cores(strip)
            and dialogue.unmarked(marked) == plain)


def _mark_inside(tokenizer, renderer: templates.Renderer, dialogue: Dialogue, plain: str, prompt: bool) -> str:
    """A template that strips white space from replies gets the marks within it; any other loses text."""
    marked = renderer.render([dialogue.variables(prompt, strip=True)], [dialogue.where])[0]
    if _faithful(dialogue, marked, plain, strip=True):
        return marked
    cores = dialogue.cores(strip=True)
    raise _dropped(tokenizer, dialogue, next((core for core in cores if core not in plain), cores[0]))


def _dropped(tokenizer, dialogue: Dialogue, content: str) -> DataError:
    names = " or ".join(map(repr, templates.suggestions(tokenizer.specials)))
    way = f"data.template = {names}, which keeps it" if names else "data.template to a template that keeps it"
    content = content.replace(dialogue.marks.guard, "")
    return DataError(f"{dialogue.where}: chat template {tokenizer.template.name} drops or changes part of the reply "
                     f"{content[:40]!r}..., which would then not be trained; set {way}")


def _cut(tokenizer, text: str, marks: Marks, take_end: bool, everything: bool) -> list[Piece]:
    """Special tokens and the text between them, marks removed.

    take_end: a span ends with its text, and the special token right behind it, which ends the turn, is trained too.
    """
    pieces: list[Piece] = []
    inside, position, strip_next = False, 0, False
    for match in [*tokenizer.special_pattern(marks.guard).finditer(text), None]:
        special = tokenizer.specials[match[0]] if match else None
        segment = text[position: match.start() if match else len(text)].replace(marks.guard, "")
        flags, behind_end = bytearray(), None
        for part in re.split(f"([{marks.start}{marks.end}])", segment):
            if part in (marks.start, marks.end):
                inside = part == marks.start
                behind_end = None if inside else len(flags)
            else:
                flags += bytes([inside or everything]) * len(part)
                if part.strip():
                    behind_end = None
        segment = segment.replace(marks.start, "").replace(marks.end, "")
        ends_turn = take_end and behind_end is not None
        if ends_turn and special:
            flags[behind_end:] = bytes([True]) * (len(flags) - behind_end)  # white space between reply and end token
        begin = len(segment) - len(segment.lstrip()) if strip_next else 0
        end = len(segment.rstrip()) if special and special.lstrip else len(segment)
        if begin < end:
            pieces.append(Piece(segment[begin:end], None, bytes(flags[begin:end])))
        if special:
            pieces.append(Piece(match[0], special.id, bytes([inside or everything or ends_turn])))
            position, strip_next = match.end(), special.rstrip
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
            trained += [any(piece.trained[begin:end]) for begin, end in encoding.offsets]
    leading = next((i for i, token in enumerate(ids) if token != tokenizer.bos_id), len(ids))
    if tokenizer.add_bos or leading > 1:
        ids = [tokenizer.bos_id, *ids[leading:]]
        trained = [any(trained[:leading]), *trained[leading:]]
    return np.array(ids, np.int32), np.array(trained, bool)
