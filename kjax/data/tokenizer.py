"""The tokenizer of a model directory: ordinary text and special tokens are kept apart from the first byte."""

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers

from kjax import config
from kjax.data import chat, templates, tiktoken_file
from kjax.errors import ConfigError, DataError

# Scripts, digits, white space, emoji with joiners, a contraction: what a lossy or wrongly read vocabulary would break.
ROUND_TRIP = ("Hello! 毕老师!1 + 1 = 2\n\n\tpeut-être 中文，かな カナ 한국어 العربية हिन्दी "
              "👩‍🚀 I've 12345  \r\n<tag> x²=¼ ａｂ \u200b...  ")


@dataclass(frozen=True)
class Special:
    """A token that text never produces; strip tells which neighbouring white space belongs to it."""

    id: int
    lstrip: bool = False
    rstrip: bool = False


class Tokenizer:
    """Byte-level BPE for text, a table for special tokens, a chat template that alone may place them.

    `encode` never yields a special id whatever the text says. `render` turns messages into ids and a mask of what is
    trained.
    """

    def __init__(self, bpe: tokenizers.Tokenizer, specials: Mapping[str, Special], *, name: str,
                 template: templates.Template | None = None, variables: Mapping[str, str] | None = None,
                 bos: str | None = None, add_bos: bool = False, stops: Iterable[int] = ()):
        self.name = name
        self.bpe = bpe
        self.specials = dict(specials)
        self.template = template
        self.variables = dict(variables or {})
        self.bos_id = self.specials[bos].id if bos in self.specials else None
        self.add_bos = add_bos and self.bos_id is not None
        self.eos_ids = frozenset(stops)
        self.openers = "".join(sorted({text[0] for text in self.specials}))  # characters that begin a special token
        self._patterns: dict[str, re.Pattern] = {}
        self._text_of = {special.id: text for text, special in self.specials.items()}
        self._check()
        self.vocab_size = 1 + max([*self.bpe.get_vocab().values(), *self._text_of])
        if template is not None:
            self.eos_ids |= chat.end_tokens(self)

    @classmethod
    def load(cls, directory: str | Path, template: str | None = None) -> "Tokenizer":
        """Reads tokenizer.json or tiktoken.model; `template`: a packaged name or .jinja file; None: the model's own."""
        directory = Path(directory)
        settings = _json(directory / "tokenizer_config.json", {})
        if (directory / "tokenizer.json").is_file():
            bpe, specials = _from_json(directory / "tokenizer.json")
        elif (directory / "tiktoken.model").is_file():
            bpe, specials = _from_tiktoken(directory, settings)
        else:
            raise DataError(f"{directory}: no tokenizer.json and no tiktoken.model")
        names = _json(directory / "special_tokens_map.json", {}) | settings
        variables = {key: text for key in ("bos_token", "eos_token", "unk_token", "pad_token")
                     if (text := _token_text(names.get(key))) is not None}
        ids = {text: special.id for text, special in specials.items()}
        stops = [ids[text] for text in [variables.get("eos_token")] if text in ids]
        stops += _stop_ids(directory / "generation_config.json")
        return cls(bpe, specials, name=str(directory), variables=variables, bos=variables.get("bos_token"),
                   add_bos=settings.get("add_bos_token") is True, stops=stops,
                   template=templates.find(template, directory, settings, ids))

    @classmethod
    def of_run(cls, settings: config.Config) -> "Tokenizer":
        """The tokenizer of a run, with the template that Data names, or else that of Model.adapter, or the model's."""
        return cls.load(settings.model.directory,
                        settings.data.template or templates.of_adapter(settings.model.adapter))

    def _check(self):
        """Text comes back exactly, and its ids are those of text alone."""
        ids = self.encode(ROUND_TRIP)
        if (back := self.decode(ids)) != ROUND_TRIP:
            at = next((i for i, (a, b) in enumerate(zip(ROUND_TRIP, back, strict=False)) if a != b), len(back))
            raise DataError(f"tokenizer {self.name} does not give a text back: {ROUND_TRIP[at:at + 8]!r} became "
                            f"{back[at:at + 8]!r}")
        if len(self._text_of) != len(self.specials):
            raise DataError(f"tokenizer {self.name}: two special tokens share an id")

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; what looks like a special token is text too."""
        return self.bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of ids, special tokens by name; bytes that are no UTF-8 become U+FFFD."""
        pieces: list[str] = []
        run: list[int] = []
        for token in [*map(int, ids), None]:
            if token is not None and token not in self._text_of:
                run.append(token)
                continue
            if run:
                pieces.append(self.bpe.decode(run, skip_special_tokens=False))
                run = []
            if token is not None and not skip_special:
                pieces.append(self._text_of[token])
        return "".join(pieces)

    def special_pattern(self, guard: str) -> re.Pattern:
        """Finds special tokens in rendered text, longest first, except where the guard character breaks them."""
        if guard not in self._patterns:
            texts = sorted(self.specials, key=len, reverse=True)
            self._patterns[guard] = re.compile("|".join(f"{re.escape(text)}(?!{guard})" for text in texts) or r"(?!)")
        return self._patterns[guard]

    def is_special(self, token: int) -> bool:
        return token in self._text_of

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = False,
               train: chat.Train = "assistant", thinking: bool | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Ids [n] int32 and trained mask [n] bool of one dialogue; a prompt for a new reply trains nothing.

        thinking: whether the new reply may reason, where the template asks; None: as it does unasked.
        """
        if add_generation_prompt:
            train = None
        return chat.render(self, [messages], ["the messages"], train, add_generation_prompt, thinking)[0]

    def prompts(self, conversations: Sequence[Sequence[Mapping[str, str]]], where: Sequence[str],
                thinking: bool | None = None) -> list[np.ndarray]:
        """Ids [n] int32 of dialogues up to where a new reply begins; ConfigError where the template does not ask
        whether that may reason, but `thinking` says."""
        found = [ids for ids, _ in chat.render(self, conversations, where, None, True, thinking)]
        if thinking is not None and conversations:
            (other, _), = chat.render(self, conversations[:1], where[:1], None, True, not thinking)
            if np.array_equal(found[0], other):
                raise ConfigError(f"thinking = {thinking}: the chat template {self.template.name} does not ask whether "
                                  "a reply may reason; leave it out, or give a template that does")
        return found

    def render_all(self, conversations: Sequence[Sequence[Mapping[str, str]]], where: Sequence[str],
                   train: chat.Train = "assistant") -> list[tuple[np.ndarray, np.ndarray]]:
        """As render, for many dialogues; where[i] names dialogue i in errors."""
        return chat.render(self, conversations, where, train, False)

    @property
    def chat_template(self) -> str | None:
        """Jinja source, to be kept with an adapter: it belongs to what was trained."""
        return self.template.source if self.template else None

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 over vocabulary, special tokens and template: equal hashes give equal ids."""
        digest = hashlib.sha256(self.bpe.to_str().encode())
        digest.update(json.dumps([sorted((t, s.id, s.lstrip, s.rstrip) for t, s in self.specials.items()),
                                  self.chat_template, self.variables, self.add_bos], sort_keys=True).encode())
        return digest.hexdigest()


def check_ids(examples: Iterable, vocab_size: int):
    """Refuses ids that the embedding table does not have: XLA would clamp them silently to its last row."""
    for example in examples:
        if len(example.ids) and (example.ids.max() >= vocab_size or example.ids.min() < 0):
            wrong = next(int(t) for t in example.ids if not 0 <= t < vocab_size)
            raise DataError(f"{example.where}: token id {wrong} is outside the model's vocabulary of {vocab_size}; "
                            "the tokenizer belongs to another model")


def _json(path: Path, default=None):
    if default is not None and not path.is_file():
        return default
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: must be a JSON object")
    return value


def _token_text(value) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _stop_ids(path: Path) -> list[int]:
    value = _json(path, {}).get("eos_token_id")
    ids = value if isinstance(value, list) else [value]
    return [token for token in ids if isinstance(token, int) and not isinstance(token, bool)]


def _from_json(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, Special]]:
    """The vocabulary of a tokenizer.json with its added tokens taken out: text can no longer produce them."""
    content = _json(path)
    model, added = content.get("model"), content.get("added_tokens") or []
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise DataError(f"{path}: not a BPE tokenizer; byte-level BPE is what the supported models use")
    try:
        specials = {token["content"]: Special(token["id"], bool(token.get("lstrip")), bool(token.get("rstrip")))
                    for token in added}
        merged = {pair.replace(" ", "", 1) if isinstance(pair, str) else "".join(pair) for pair in model["merges"]}
    except (TypeError, KeyError) as error:
        raise DataError(f"{path}: malformed added_tokens or merges: {error!r}") from error
    if not all(isinstance(text, str) and text and isinstance(s.id, int) and s.id >= 0 for text, s in specials.items()):
        raise DataError(f"{path}: an added token needs a text and an id")
    for text in specials:
        if text in merged:
            raise DataError(f"{path}: merges produce the special token {text!r}: text could inject it")
        model["vocab"].pop(text, None)
    content |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(content)), specials
    except Exception as error:  # the library raises a bare Exception for whatever it cannot read
        raise DataError(f"{path}: {error}") from error


def _from_tiktoken(directory: Path, settings: Mapping) -> tuple[tokenizers.Tokenizer, dict[str, Special]]:
    ranks = tiktoken_file.read_ranks(directory / "tiktoken.model")
    named, where = {}, directory / "tokenizer_config.json"
    for key, token in (settings.get("added_tokens_decoder") or {}).items():
        text = _token_text(token)
        if not key.isdecimal() or not text or not 0 <= int(key) - len(ranks) < tiktoken_file.RESERVED:
            raise DataError(f"{where}: added token {key!r} is not one of the {tiktoken_file.RESERVED} ids from "
                            f"{len(ranks)} on: it belongs to another tiktoken.model")
        named[int(key)] = text
    table = tiktoken_file.specials(len(ranks), named)
    return tiktoken_file.convert(ranks), {text: Special(token) for text, token in table.items()}
