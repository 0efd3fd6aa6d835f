"""From settings to token rows: what is trained, what was cut, and a hash that names it."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from kjax import config
from kjax.data import formats
from kjax.data.formats import Conversation
from kjax.data.tokenizer import Tokenizer
from kjax.errors import ConfigError, DataError


@dataclass(frozen=True)
class Example:
    """One dialogue as ids [n] int32 and trained [n] bool, into which it unpacks; `length` is what it was uncut."""

    ids: np.ndarray
    trained: np.ndarray
    where: str
    length: int

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter((self.ids, self.trained))

    @property
    def targets(self) -> int:
        """Tokens the loss sees; the first of a row is never predicted."""
        return int(self.trained[1:].sum())


@dataclass(frozen=True)
class Report:
    """Counts over the rows that are kept, and of those that are not.

    histogram maps an upper bound to the number of rows of at most that many tokens, before cutting; shared_prompts
    counts the rows of an evaluation set whose prompt the training set has too.
    """

    rows: int
    tokens: int
    trained_tokens: int
    truncated: int
    dropped: int
    dropped_where: tuple[str, ...]
    max_length: int
    histogram: Mapping[int, int] = field(hash=False)
    shared_prompts: int = 0

    @property
    def truncated_share(self) -> float:
        return self.truncated / (self.rows + self.dropped)

    @property
    def trained_share(self) -> float:
        return self.trained_tokens / self.tokens


@dataclass(frozen=True)
class Dataset:
    """Examples in file order, their report, and a SHA-256 over ids, masks, tokenizer and template."""

    examples: tuple[Example, ...]
    report: Report
    hash: str

    def __len__(self) -> int:
        return len(self.examples)


def load(settings: config.Data, tokenizer: Tokenizer, seed: int = 0) -> tuple[Dataset, Dataset | None]:
    """(train, eval) datasets; eval is None unless eval_dataset, eval_select or val_size asks for one."""
    if _separate(settings):
        train = formats.load_conversations(settings.dataset, settings, settings.select)
        held = held_out(settings, seed)
    else:
        train, held = _split(settings, seed)
    dataset = tokenize(train, tokenizer, settings)
    if not held:
        return dataset, None
    seen = {conversation.prompt for conversation in train}
    evaluation = tokenize(held, tokenizer, settings)
    shared = sum(conversation.prompt in seen for conversation in held)
    return dataset, replace(evaluation, report=replace(evaluation.report, shared_prompts=shared))


def held_out(settings: config.Data, seed: int = 0) -> list[Conversation]:
    """The rows to evaluate on, without reading those to train on where the two are apart; DataError where none are
    asked for."""
    if _separate(settings):
        return formats.load_conversations(settings.eval_dataset or settings.dataset, settings, settings.eval_select)
    if not settings.val_size:
        raise DataError("there are no rows to evaluate on: name a dataset (--dataset FILE), or set Data.eval_dataset, "
                        "Data.eval_select or Data.val_size")
    return _split(settings, seed)[1]


def _separate(settings: config.Data) -> bool:
    """Whether the rows to evaluate on are named, rather than split off."""
    separate = settings.eval_dataset is not None or bool(settings.eval_select)
    if separate and settings.val_size:
        raise ConfigError("data.val_size splits the training rows, but an evaluation set is given too: choose one")
    return separate


def _split(settings: config.Data, seed: int) -> tuple[list[Conversation], list[Conversation]]:
    return split(formats.load_conversations(settings.dataset, settings, settings.select), settings.val_size, seed)


def split(conversations: Sequence[Conversation], size: float, seed: int,
          ) -> tuple[list[Conversation], list[Conversation]]:
    """Holds out a share (below 1) or a number of rows; all rows that share a prompt stay on one side.

    Which prompts are held out depends on their text and the seed alone, not on the order of the rows.
    """
    if size >= 1 and size != int(size):
        raise ConfigError(f"data.val_size = {size}: a share below 1, or a whole number of rows")
    wanted = int(size) if size >= 1 else round(size * len(conversations))
    if not wanted:
        if size:
            raise DataError(f"data.val_size = {size} of {len(conversations)} rows is not even one; ask for a number")
        return list(conversations), []
    if wanted >= len(conversations):
        raise DataError(f"data.val_size = {size} leaves nothing to train on: there are {len(conversations)} rows")
    groups: dict[str, int] = {}
    for conversation in conversations:
        groups[conversation.prompt] = groups.get(conversation.prompt, 0) + 1
    held: set[str] = set()
    for prompt in sorted(groups, key=lambda text: hashlib.sha256(f"{seed}\0{text}".encode()).digest()):
        if groups[prompt] <= wanted:  # a prompt with too many rows is passed over
            held.add(prompt)
            wanted -= groups[prompt]
        if not wanted:
            break
    if not held:
        raise DataError(f"data.val_size = {size}: every prompt has more rows than that, and a prompt is not split")
    sides: tuple[list[Conversation], list[Conversation]] = ([], [])
    for conversation in conversations:
        sides[conversation.prompt in held].append(conversation)
    return sides


def tokenize(conversations: Sequence[Conversation], tokenizer: Tokenizer, settings: config.Data) -> Dataset:
    """Renders, encodes, cuts to max_length from the end; rows with nothing left to train are dropped and counted."""
    if settings.mask_history and settings.train_on_prompt:
        raise ConfigError("data.mask_history trains the last reply only, data.train_on_prompt everything: choose one")
    train = "last" if settings.mask_history else "all" if settings.train_on_prompt else "assistant"
    rendered = tokenizer.render_all([c.as_dicts() for c in conversations], [c.where for c in conversations], train)
    examples = [Example(ids[: settings.max_length], trained[: settings.max_length], conversation.where, len(ids))
                for conversation, (ids, trained) in zip(conversations, rendered, strict=True)]
    kept = tuple(e for e in examples if e.targets)
    if not kept:
        raise DataError(f"no token is left to train on: data.max_length = {settings.max_length} cuts every row before "
                        f"its reply; the shortest row has {min(e.length for e in examples)} tokens")
    report = _report(examples, kept, settings.max_length)
    digest = hashlib.sha256(tokenizer.hash.encode())
    for example in kept:
        digest.update(np.int64(len(example.ids)).tobytes() + example.ids.tobytes() + example.trained.tobytes())
    return Dataset(kept, report, digest.hexdigest())


def _report(examples: Sequence[Example], kept: Sequence[Example], max_length: int) -> Report:
    lengths = np.array([e.length for e in examples])
    bounds = [1 << power for power in range(4, int(lengths.max() - 1).bit_length() + 1)] or [16]
    counts = np.histogram(lengths, [0, *(bound + 1 for bound in bounds)])[0]
    return Report(
        rows=len(kept), tokens=sum(len(e.ids) for e in kept), trained_tokens=sum(e.targets for e in kept),
        truncated=int((lengths > max_length).sum()), dropped=len(examples) - len(kept),
        dropped_where=tuple(e.where for e in examples if not e.targets), max_length=max_length,
        histogram=dict(zip(bounds, counts.tolist(), strict=True)))
