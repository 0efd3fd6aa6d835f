"""The loss of a model, with an adapter or without, on rows it was not trained on."""

import math
import os
from dataclasses import dataclass

import jax
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kjax import data, judged, step
from kjax.config import Config
from kjax.errors import RunError
from kjax.load import Model
from kjax.models import ModelConfig, unembed
from kjax.progress import counted
from kjax.weights.safetensors import Checkpoint


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation has found; printed as a table.

    Attributes:
      model: the checkpoint, and the adapter on it.
      loss: mean cross-entropy in nats over `targets` tokens of `rows` rows.  accuracy: the share of these tokens that
        is the most probable one (given those before it).
      truncated, dropped: rows cut to Data.max_length, and left out because nothing to predict lies within it.
    """

    model: str
    loss: float
    accuracy: float
    targets: int
    rows: int
    truncated: int
    dropped: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))  # beyond that a float has no exponential

    def as_dict(self) -> dict:
        return {**vars(self), "perplexity": self.perplexity}

    def table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        cut = f", {self.truncated:,} of them cut" if self.truncated else ""
        left = f", {self.dropped:,} left out" if self.dropped else ""
        for name, value in (("model", escape(self.model)), ("rows", f"{self.rows:,}{cut}{left}"),
                            ("loss", f"{self.loss:.4f}"), ("perplexity", f"{self.perplexity:.4g}"),
                            ("tokens right", f"{self.accuracy:.1%} of {self.targets:,}")):
            table.add_row(name, value)
        return table

    def __rich__(self) -> Table:
        return self.table()


def evaluate(which: judged.Which, *, base: bool = False, adapter: str | os.PathLike | None = None,
             dataset: str | os.PathLike | None = None, console: Console | None = None) -> Evaluation:
    """The loss on evaluation rows, over the same batches as in training.

        kjax.evaluate("runs/first")             # its newest adapter on the rows it held out
        kjax.evaluate("runs/first", base=True)  # without any adapter

    Args:
      which, base, adapter, dataset: what is judged on which rows, as kjax.judged.settings.
      console: where to show progress; standard output unless given.
    """
    config = judged.settings(which, base=base, adapter=adapter, dataset=dataset)
    with Checkpoint(config.model.directory) as files:
        described = ModelConfig.from_json(files.config_json, str(files.config_path))
    described.check_row(config.data.max_length, "Data.max_length")
    tokenizer = data.Tokenizer.of_run(config)
    found = data.tokenize(data.held_out(config.data, config.train.seed), tokenizer, config.data)
    data.check_ids(found.examples, described.vocab_size)
    batches = data.Batches.of_run(config, found, evaluation=True)
    with judged.opened(config) as model:
        score = _score(config, model, batches, console or Console())
    name = judged.title(config)
    if not math.isfinite(score.mean_loss):
        raise RunError(f"{name}: a loss of {score.mean_loss}; try Model.dtype = 'float32', or check the adapter and "
                       "the weights")
    report = found.report
    return Evaluation(name, score.mean_loss, score.accuracy, int(score.targets), report.rows, report.truncated,
                      report.dropped)


def _score(config: Config, model: Model, batches: data.Batches, console: Console) -> step.Score:
    transformer = model.transformer.clone(micro_rows=config.train.micro_rows)
    run = jax.jit(step.eval_step(transformer, unembed, chunk=config.train.loss_chunk),
                  compiler_options=step.compiler_options())
    variables, score = model.variables, step.Score(0.0, 0.0, 0.0)
    with counted(console, "evaluating", len(batches), "batches") as done:
        for batch in batches:
            batch = batch if model.table is None else model.table.batch(batch)
            score += run(variables.get("lora", {}), variables["params"], batch)
            done(1)
    return score
