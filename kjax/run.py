"""What a run has come to, from training itself or read from its directory."""

import base64
import html
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from kjax import config, gin_config, log
from kjax.checkpoint import ADAPTER
from kjax.errors import RunError


def settings(directory: str | Path, files: Sequence[str | Path] = (), bindings: Sequence[str] = (),
             ) -> tuple[config.Config, Path]:
    """The settings of a training run, with gin files and bindings on top, and its newest adapter."""
    directory = Path(directory)
    for name in ("operative_config.gin", "config.gin"):
        if (directory / name).is_file():
            adapter = directory / ADAPTER
            if not adapter.is_dir():
                raise RunError(f"{directory}: the run has not saved an adapter yet")
            return gin_config.load([directory / name, *files], bindings), adapter
    raise RunError(f"{directory}: not a run directory (no operative_config.gin); give --model and --adapter instead")


@dataclass(frozen=True)
class Run:
    """What a run has come to; shown as a table and its curve in a notebook.

    Attributes:
      losses: the training loss of step 1, 2, ...  eval_losses: the evaluation losses, after eval_at[i] steps.
      adapter: the newest PEFT adapter.  plot: the loss curve.
      status: "finished"; "interrupted", stopped by a signal after saving; "cancelled", by a second signal, without.
      exit_code: what a program that only trains should exit with: 0, or 128 and the signal's number.
    """

    directory: Path
    status: Literal["finished", "interrupted", "cancelled"]
    step: int
    total_steps: int
    losses: list[float] = field(repr=False)
    eval_losses: list[float] = field(repr=False)
    eval_at: list[int] = field(repr=False)
    exit_code: int = 0

    @classmethod
    def read(cls, directory: str | Path) -> "Run":
        """The run of a directory as its log tells it; what was not finished counts as interrupted.

        Raises RunError where there is none.
        """
        entries = log.read(Path(directory) / log.LOG)
        if not entries:
            raise RunError(f"{directory}: holds no run (no entry of a step in {log.LOG})")
        step = entries[-1]["current_steps"]
        total = entries[-1].get("total_steps", step)
        evaluations = [entry for entry in entries if "eval_loss" in entry]
        return cls(Path(directory), "finished" if step == total else "interrupted", step, total,
                   [entry["loss"] for entry in entries if "loss" in entry],
                   [entry["eval_loss"] for entry in evaluations], [entry["current_steps"] for entry in evaluations])

    @property
    def adapter(self) -> Path:
        return self.directory / ADAPTER

    @property
    def tokens_per_second(self) -> float | None:
        """The median speed of its steps in real tokens, without compiling and evaluating; None before the first."""
        steps = [entry for entry in log.read(self.directory / log.LOG) if "step_seconds" in entry]
        totals = [0, *(entry["total_tokens"] for entry in steps)]
        return statistics.median((after - before) / max(entry["step_seconds"], 1e-9) for before, after, entry in
                                 zip(totals, totals[1:], steps, strict=False)) if steps else None

    @property
    def plot(self) -> Path:
        return self.directory / log.TRAIN_PLOT

    def _rows(self) -> list[tuple[str, str]]:
        rows = [("status", f"{self.status}, {self.step} of {self.total_steps} steps")]
        for name, values in (("loss", self.losses), ("evaluation loss", self.eval_losses)):
            if values:
                rows.append((name, f"{values[0]:.4f} -> {values[-1]:.4f}"))
        for name, path in (("adapter", self.adapter), ("plot", self.plot), ("log", self.directory / log.LOG)):
            if path.exists():
                rows.append((name, str(path)))
        return rows

    def __str__(self) -> str:
        return "\n".join(f"{name:16} {value}" for name, value in self._rows())

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
                       f"<td style='text-align:left'>{html.escape(value)}</td></tr>" for name, value in self._rows())
        image = ""
        if self.plot.is_file():
            data = base64.b64encode(self.plot.read_bytes()).decode()
            image = f"<img alt='loss' style='max-width:640px' src='data:image/png;base64,{data}'>"
        return f"<table>{rows}</table>{image}"

    def show(self) -> None:
        """Display it: the table and the curve in a notebook, the text elsewhere."""
        try:
            from IPython import get_ipython
            from IPython.display import display
        except ImportError:
            print(self)
            return
        if get_ipython() is None:
            print(self)
        else:
            display(self)
