"""Replies of a model, with an adapter or without, to rows it was not trained on, and how near they come to the rows'
own."""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from kjax import adapters, data, judged, log, metrics
from kjax.config import Config
from kjax.errors import CheckpointError, ConfigError, DataError, RunError
from kjax.generate import check_sampling
from kjax.identity import base_hash
from kjax.load import Model
from kjax.models import ModelConfig
from kjax.progress import counted
from kjax.weights.safetensors import Checkpoint

# LLaMA-Factory's names for the same files, and the keys in them.
REPLIES, RESULTS = "generated_predictions.jsonl", "predict_results.json"
SETTINGS, PARTIAL = "predict.json", "partial.jsonl"
BATCH = 16


@dataclass(frozen=True)
class Task:
    """One row: its number in the dataset, the tokens before its last reply, and that reply."""

    row: int
    prompt: np.ndarray
    label: str


@dataclass(frozen=True)
class Predictions:
    """Replies and their scores; printed as a table.

    Attributes:
      directory: holds generated_predictions.jsonl (prompt, predict, label of each row) and predict_results.json.
      results: the scores in per cent, and rows, tokens and seconds.
      replies: the lines of generated_predictions.jsonl.
    """

    directory: Path
    results: dict[str, float]
    replies: list[dict]

    def __rich__(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for name, value in self.results.items():
            table.add_row(name.removeprefix("predict_"), f"{value:,}" if isinstance(value, int) else f"{value:,.2f}")
        return table


def predict(which: judged.Which, out: str | os.PathLike, *, base: bool = False,
            adapter: str | os.PathLike | None = None, dataset: str | os.PathLike | None = None,
            max_new_tokens: int = 512, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0,
            thinking: bool | None = None, batch: int = BATCH, score: Literal["auto", "text", "choice"] = "auto",
            overwrite: bool = False, console: Console | None = None) -> Predictions:
    """Replies to the last user message of every evaluation row, scored against the rows' own replies.

        kjax.predict("runs/first", "predictions/first")             # BLEU, ROUGE, exact matches
        kjax.predict("runs/first", "predictions/base", base=True)   # without any adapter

    The same call goes on after an interruption, to the same replies.

    Args:
      which, base, adapter, dataset: what is judged on which rows, as kjax.judged.settings.
      out: a directory for the replies and scores.
      max_new_tokens, temperature, top_p, seed, thinking: as Model.generate; a row draws by its number in the dataset.
      batch: rows that are continued together. More are faster and need more memory; in other company a reply may
        differ where two tokens are almost equally probable.
      score: "text" for BLEU and ROUGE, "choice" for the letter of an option; "auto": by what the rows' replies are.
      overwrite: replace the predictions in `out`.
      console: where to show progress; standard output unless given.
    """
    console, out = console or Console(), Path(out)
    config = judged.settings(which, base=base, adapter=adapter, dataset=dataset)
    check_sampling(max_new_tokens, temperature, top_p, seed)
    if not isinstance(batch, int) or batch < 1:
        raise ConfigError(f"batch = {batch!r}: expected a whole number, at least 1")
    if score not in ("auto", "text", "choice"):
        raise ConfigError(f"score = {score!r}: expected 'auto', 'text' or 'choice'")
    rows = data.held_out(config.data, config.train.seed)
    prompts = data.Tokenizer.of_run(config).prompts([row.as_dicts()[:-1] for row in rows], [row.where for row in rows],
                                                    thinking)
    tasks = [Task(number, prompt, row.messages[-1].content)
             for number, (row, prompt) in enumerate(zip(rows, prompts, strict=True))]
    kind = metrics.kind_of([task.label for task in tasks]) if score == "auto" else score
    lacking = metrics.missing() if kind == "text" else []
    if lacking and score == "text":
        raise ConfigError(f"score = 'text' needs {', '.join(lacking)}: pip install {' '.join(lacking)}")
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    with Checkpoint(config.model.directory) as files:
        _check(tasks, rows, ModelConfig.from_json(files.config_json, str(files.config_path)))
        place = Place(out, _identity(config, files, tasks, sampling), overwrite)
    if not place.finished:
        with judged.opened(config) as model:
            try:
                place.begin()
                _reply(model, tasks, place, sampling, batch, console)
            except OSError as error:
                raise RunError(f"{out}: cannot be written ({error.strerror or error}); finished replies are kept: mend "
                               "it and give the same command") from error
    replies, figures = place.read(tasks)
    results = {}
    if lacking:
        console.print(f"BLEU and ROUGE are left out: they need {', '.join(lacking)} (pip install {' '.join(lacking)}); "
                      "the same command then adds them", soft_wrap=True)
    else:
        # Where the prompt has opened the reasoning, a reply that never ends it is all reasoning.
        opened = ["<think>" if kind == "choice" and reply["prompt"].rstrip().endswith("<think>") else ""
                  for reply in replies]
        texts = [before + reply["predict"] for before, reply in zip(opened, replies, strict=True)]
        with counted(console, "scoring", len(tasks), "rows") as done:
            results = metrics.scores(kind, texts, [task.label for task in tasks], done)
    results = {f"predict_{name}": round(value, 4) for name, value in results.items()} | figures
    log.write_whole(out / RESULTS, (json.dumps(results, indent=1) + "\n").encode())
    return Predictions(out, results, replies)


def _check(tasks: Sequence[Task], rows: Sequence[data.Conversation], model: ModelConfig) -> None:
    """Refuses what no model reads before any is loaded."""
    longest, limit = model.longest_row
    for task, row in zip(tasks, rows, strict=True):
        if not len(task.prompt):
            raise DataError(f"{row.where}: the chat template gives a prompt without any token")
        if len(task.prompt) >= longest:
            raise DataError(f"{row.where}: a prompt of {len(task.prompt)} tokens, the model reads {limit} = {longest}; "
                            "shorten or leave out the row")
        if max(task.prompt) >= model.vocab_size:
            raise DataError(f"{row.where}: token id {max(task.prompt)} is outside the model's vocabulary of "
                            f"{model.vocab_size}; the tokenizer belongs to another model")


def _identity(config: Config, files: Checkpoint, tasks: Sequence[Task], sampling: dict) -> dict:
    """What replies depend on: equal ones may go on from each other."""
    asked = hashlib.sha256()
    for task in tasks:
        asked.update(json.dumps([list(map(int, task.prompt)), task.label]).encode())
    chosen = config.model
    return {"model": base_hash(files.directory, [files.entry(name) for name in files.names()]),
            "adapter": None if chosen.adapter is None else _adapter_hash(Path(chosen.adapter)),
            "rows": asked.hexdigest(), "dtype": chosen.dtype, "weights": chosen.weights,
            "experts": chosen.experts, **sampling}


def _adapter_hash(directory: Path) -> str:
    found = hashlib.sha256()
    for name in (adapters.CONFIG, adapters.WEIGHTS):
        try:
            with open(directory / name, "rb") as file:
                found.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise CheckpointError(f"{directory / name}: {error.strerror}; give a PEFT adapter") from error
    return found.hexdigest()


class Place:
    """The directory of predictions: what it holds, and whether that belongs to this call.

    Attributes: finished: all replies are there.  lines: the replies of an interrupted call, by row.
    """

    def __init__(self, path: Path, identity: dict, overwrite: bool):
        """Looks; changes nothing but that the directory is made. RunError where it holds something else."""
        self.path, self.identity = path, identity
        try:
            path.mkdir(parents=True, exist_ok=True)
            held = {entry.name for entry in path.iterdir()}
        except OSError as error:
            raise RunError(f"{path}: {error.strerror}; give another directory") from error
        if held and SETTINGS not in held:
            raise RunError(f"{path}: exists and holds no predictions; give a new directory")
        before = self._settings().get("identity") if held else None
        before = before if isinstance(before, dict) else {}
        differing = [name for name in identity | before if identity.get(name) != before.get(name)]
        self.finished = not differing and not overwrite and REPLIES in held
        # Of an interrupted call of the same, also of one that was to overwrite: its begin has removed the old replies.
        saved = {} if REPLIES in held else _saved(path / PARTIAL)
        self.lines = {} if differing else saved
        if differing and not overwrite and (REPLIES in held or saved):
            raise RunError(f"{path}: holds predictions of something else (other: {', '.join(differing)}); give another "
                           "directory, or --overwrite")

    def _settings(self) -> dict:
        try:
            found = json.loads((self.path / SETTINGS).read_text(encoding="utf-8"))
            return found if isinstance(found, dict) else {}
        except (OSError, ValueError):
            return {}

    def begin(self) -> None:
        """From here on the directory belongs to this call."""
        for name in (REPLIES, RESULTS):
            (self.path / name).unlink(missing_ok=True)
        log.write_whole(self.path / SETTINGS, json.dumps({"identity": self.identity}).encode())
        log.write_whole(self.path / PARTIAL, "".join(json.dumps(line) + "\n" for line in self.lines.values()).encode())

    def add(self, lines: Sequence[dict]) -> None:
        """Keeps the replies of a group."""
        with open(self.path / PARTIAL, "a", encoding="utf-8") as partial:
            partial.write("".join(json.dumps(line) + "\n" for line in lines))
        self.lines |= {line["row"]: line for line in lines}

    def finish(self, replies: Sequence[dict], figures: dict) -> None:
        settings = {"identity": self.identity, "figures": figures}
        log.write_whole(self.path / SETTINGS, json.dumps(settings).encode())
        text = "".join(json.dumps(reply, ensure_ascii=False) + "\n" for reply in replies)
        log.write_whole(self.path / REPLIES, text.encode())
        (self.path / PARTIAL).unlink()

    def read(self, tasks: Sequence[Task]) -> tuple[list[dict], dict]:
        """The replies of all rows, and the figures of their making."""
        file = self.path / REPLIES
        try:  # texts may hold other line breaks than "\n"
            replies = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
            texts = all(isinstance(reply[name], str) for reply in replies for name in ("prompt", "predict"))
            if texts and [reply["label"] for reply in replies] == [task.label for task in tasks]:
                return replies, dict(self._settings()["figures"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{file}: cannot be read ({error!r}); --overwrite makes it anew") from error
        raise RunError(f"{file}: does not hold the rows of the dataset any more; --overwrite makes it anew")


def _reply(model: Model, tasks: Sequence[Task], place: Place, sampling: dict, batch: int, console: Console) -> None:
    """Makes the replies: groups of rows of like length, the longest first, each kept when it is complete."""
    order = sorted(tasks, key=lambda task: -len(task.prompt))
    groups = [order[begin:begin + batch] for begin in range(0, len(order), batch)]
    groups = [group for group in groups if not all(task.row in place.lines for task in group)]
    had = len(tasks) - sum(map(len, groups))
    with counted(console, "replying", len(tasks), "rows", had) as done:
        for group in groups:
            started = time.monotonic()
            try:
                found = model.tokens_of_all(
                    [task.prompt for task in group], rows=[task.row for task in group], **sampling,
                    told=lambda number: done(0, f"token {number:,} of up to {sampling['max_new_tokens']:,}"))
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                raise RunError(f"memory ran out for {len(group)} rows with prompts of up to {len(group[0].prompt)} "
                               f"tokens and replies of {sampling['max_new_tokens']}; give a smaller batch (--batch), "
                               "finished replies are kept") from error
            seconds = (time.monotonic() - started) / len(group)
            place.add([{"row": task.row, "predict": model.tokenizer.decode(tokens), "tokens": len(tokens),
                        "seconds": seconds} for task, tokens in zip(group, found, strict=True)])
            done(len(group))
    lines = [place.lines[task.row] for task in tasks]
    tokens, seconds = (sum(line[name] for line in lines) for name in ("tokens", "seconds"))
    room = [min(sampling["max_new_tokens"], model.config.longest_row[0] - len(task.prompt)) for task in tasks]
    figures = {"predict_samples": len(tasks), "predict_tokens": tokens, "predict_runtime": round(seconds, 4),
               "predict_cut": sum(line["tokens"] >= most for line, most in zip(lines, room, strict=True)),
               "predict_samples_per_second": round(len(tasks) / seconds, 4),
               "predict_tokens_per_second": round(tokens / seconds, 4)}
    place.finish([{"prompt": model.tokenizer.decode(task.prompt), "predict": line["predict"], "label": task.label,
                   "tokens": line["tokens"]} for task, line in zip(tasks, lines, strict=True)], figures)


def _saved(path: Path) -> dict[int, dict]:
    """The replies of an interrupted call by row, without a line that was cut short."""
    lines = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            found = json.loads(line)
            lines[found["row"]] = {"predict": str(found["predict"]), "tokens": int(found["tokens"]),
                                   "seconds": float(found["seconds"]), "row": found["row"]}
        except (ValueError, KeyError, TypeError):
            continue
    return lines
