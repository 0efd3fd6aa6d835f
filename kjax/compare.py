"""Runs side by side, as ablations need them: one table, one picture of their curves, and both as files."""

import base64
import html
import io
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
from rich import box
from rich.table import Table

from kjax import adapters, log
from kjax.errors import RunError
from kjax.run import Run

TABLE, FIGURES, PLOT = "comparison.md", "comparison.json", "comparison.png"


def compare(runs: Mapping[str, Run | str | Path | Sequence[Run | str | Path]]) -> "Comparison":
    """Puts runs side by side.

        kjax.compare({"rank 2": first, "rank 8": "runs/rank8", "rank 32": [seed_0, seed_1]})

    Args:
      runs: a name for each row of the table, and its run or run directory; several are repeats of one setting.

    Raises RunError where a directory holds no run.
    """
    def read(run) -> Run:
        return run if isinstance(run, Run) else Run.read(run)

    rows = [(name, tuple(map(read, [given] if isinstance(given, (Run, str, Path)) else given)))
            for name, given in runs.items()]
    if not rows or not all(repeats for _, repeats in rows):
        raise RunError("there is no run to compare")
    return Comparison(tuple(Row(name, repeats) for name, repeats in rows))


@dataclass(frozen=True)
class Row:
    """One setting and the runs that were made with it."""

    name: str
    runs: tuple[Run, ...]

    def figures(self) -> dict[str, list[float]]:
        """What is compared, a number for each run that has it.

        trained: the numbers of the adapter.  loss: the mean of the last tenth of the training losses.
        eval_before, eval_lowest, eval_loss: the evaluation losses before the first step, the lowest, the last.
        """
        found: dict[str, Callable[[Run], float | None]] = {
            "trained": _trained, "steps": lambda run: run.step, "loss": _last_tenth,
            "eval_before": lambda run: run.eval_losses[0] if run.eval_at[:1] == [0] else None,
            "eval_lowest": lambda run: min(run.eval_losses, default=None),
            "eval_loss": lambda run: run.eval_losses[-1] if run.eval_at and run.eval_at[-1] > 0 else None,
            "tokens_per_second": lambda run: run.tokens_per_second}
        return {key: [value for run in self.runs if (value := of(run)) is not None] for key, of in found.items()}


# The columns: what Row.figures calls it, its heading, the format of a number.
COLUMNS = (("trained", "trained", ",.0f"), ("steps", "steps", ".0f"), ("loss", "loss", ".3f"),
           ("eval_before", "eval before", ".3f"), ("eval_lowest", "lowest", ".3f"), ("eval_loss", "eval after", ".3f"),
           ("tokens_per_second", "tok/s", ".0f"))


@dataclass(frozen=True)
class Comparison:
    """Rows of runs; a table in a terminal, a table and curves in a notebook. Repeats: mean ± standard deviation."""

    rows: tuple[Row, ...]

    @property
    def _repeated(self) -> bool:
        return any(len(row.runs) > 1 for row in self.rows)

    def cells(self) -> list[list[str]]:
        """The table, its headings first; columns that no run has, or that say nothing new, are left out."""
        figures = [row.figures() for row in self.rows]
        shown = [column for column in COLUMNS if any(row[column[0]] for row in figures)]
        if all(row["eval_lowest"] == row["eval_loss"] for row in figures):
            shown = [column for column in shown if column[0] != "eval_lowest"]
        table = [["", *(["runs"] if self._repeated else []), *(heading for _, heading, _ in shown)]]
        for row, values in zip(self.rows, figures, strict=True):
            table.append([row.name, *([str(len(row.runs))] if self._repeated else []),
                          *(_text(values[key], form) for key, _, form in shown)])
        return table

    def markdown(self) -> str:
        head, *body = self.cells()
        lines = [head, [":--", *["--:"] * (len(head) - 1)], *body]
        return "".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n" for line in lines)

    def __str__(self) -> str:
        return self.markdown()

    def __rich__(self) -> Table:
        head, *body = self.cells()
        table = Table(box=box.SIMPLE_HEAD)
        for number, heading in enumerate(head):
            table.add_column(heading, justify="right" if number else "left", overflow="fold", no_wrap=number > 0)
        for line in body:
            table.add_row(*(cell.replace("[", r"\[") for cell in line))
        return table

    def _repr_html_(self) -> str:
        head, *body = ([html.escape(cell) for cell in line] for line in self.cells())
        rows = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in body)
        data = base64.b64encode(self.picture()).decode()
        return (f"<table><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>{rows}</table>"
                f"<img alt='loss curves' style='max-width:900px' src='data:image/png;base64,{data}'>")

    def picture(self) -> bytes:
        """A PNG of the curves: training losses, smoothed, and evaluation losses; of repeats the mean and the range."""
        from matplotlib.figure import Figure  # here: it takes half a second that a table alone need not wait

        kinds: list[tuple[str, Callable[[Run], Iterable[tuple[int, float]]]]] = [
            ("loss, smoothed", lambda run: enumerate(log.smoothed(run.losses), start=1)),
            ("evaluation loss", lambda run: zip(run.eval_at, run.eval_losses, strict=True))]
        kinds = [kind for kind in kinds if any(len(dict(kind[1](run))) > 1 for row in self.rows for run in row.runs)]
        figure = Figure(figsize=(5.2 * max(1, len(kinds)), 4.2), dpi=110, layout="constrained")
        for axes, (label, points) in zip(figure.subplots(1, max(1, len(kinds)), squeeze=False)[0], kinds, strict=False):
            for number, row in enumerate(self.rows):
                curves = [dict(points(run)) for run in row.runs]
                steps = sorted(set(curves[0]).intersection(*curves))  # those that all repeats have
                values = [[curve[step] for curve in curves] for step in steps]
                colour, mark = f"C{number % 10}", "o" if len(steps) < 30 else ""
                axes.plot(steps, list(map(statistics.fmean, values)), color=colour, label=row.name, marker=mark,
                          markersize=3, linestyle=("-", "--", ":", "-.")[number // 10 % 4])
                if len(curves) > 1:
                    axes.fill_between(steps, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.2)
            axes.set(xlabel="step", ylabel=label)
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png")
        return drawn.getvalue()

    def write(self, directory: str | Path) -> list[Path]:
        """Writes the table, the figures and the picture, each replaced as a whole; returns their paths."""
        figures = [{"name": row.name, "runs": [str(run.directory) for run in row.runs], **row.figures()}
                   for row in self.rows]
        files = {TABLE: self.markdown().encode(), FIGURES: json.dumps(figures, indent=1).encode() + b"\n",
                 PLOT: self.picture()}
        for name, content in files.items():
            log.write_whole(Path(directory) / name, content)
        return [Path(directory) / name for name in files]


def _text(values: list[float], form: str) -> str:
    """The mean, with the sample standard deviation where values differ."""
    if not values:
        return ""
    mean = format(statistics.fmean(values), form)
    return mean if len(set(values)) == 1 else f"{mean} ± {format(statistics.stdev(values), form)}"


def _last_tenth(run: Run) -> float | None:
    return statistics.fmean(run.losses[-math.ceil(len(run.losses) / 10):]) if run.losses else None


def _trained(run: Run) -> int | None:
    """How many numbers the run's adapter has."""
    if not (weights := run.adapter / adapters.WEIGHTS).is_file():
        return None
    with safetensors.safe_open(weights, "np") as tensors:
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())
