"""A look at the data before training: rendered samples with the trained tokens coloured, and what was counted."""

import html
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from kjax import config
from kjax.data.batches import Batches
from kjax.data.dataset import Dataset, Example, Report, load
from kjax.data.tokenizer import Tokenizer

_STYLES = {  # (special, trained) -> terminal style, CSS
    (False, False): ("dim", "color:#888"),
    (False, True): ("green", "background:#d3f0d3;color:#111"),
    (True, False): ("cyan", "color:#06c;font-weight:bold"),
    (True, True): ("bold reverse green", "background:#2a8a2a;color:#fff;font-weight:bold"),
}
# C0 and C1 controls and DEL: a row must not steer the terminal.
_CONTROLS = {code: f"\\x{code:02x}" for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}


class Span(NamedTuple):
    """Neighbouring tokens of one kind as text."""

    text: str
    special: bool
    trained: bool

    @property
    def styles(self) -> tuple[str, str]:
        return _STYLES[self.special, self.trained]


def spans(example: Example, tokenizer: Tokenizer) -> Iterator[Span]:
    """Text of an example; special tokens one by one, other tokens joined while they are trained or not."""
    run: list[int] = []
    for position, token in enumerate(example.ids.tolist()):
        special, trained = tokenizer.is_special(token), bool(example.trained[position])
        if run and (special or trained != bool(example.trained[position - 1])):
            yield Span(tokenizer.decode(run).translate(_CONTROLS), False, bool(example.trained[position - 1]))
            run = []
        if special:
            yield Span(tokenizer.decode([token]).translate(_CONTROLS), True, trained)
        else:
            run.append(token)
    if run:
        yield Span(tokenizer.decode(run).translate(_CONTROLS), False, bool(example.trained[-1]))


def facts(report: Report) -> list[tuple[str, str]]:
    """The lines of a report."""
    total = report.rows + report.dropped
    lines = [
        ("rows", f"{report.rows:,}"),
        ("tokens", f"{report.tokens:,} ({report.tokens / report.rows:.1f} per row)"),
        ("trained tokens", f"{report.trained_tokens:,} ({report.trained_share:.1%})"),
        ("cut to max_length", f"{report.truncated:,} of {total:,} rows ({report.truncated_share:.2%}) "
                              f"to {report.max_length} tokens"),
    ]
    if report.dropped:
        lines.append(("dropped", f"{report.dropped:,} rows with no trained token left, first: "
                                 f"{report.dropped_where[0]}"))
    if report.shared_prompts:
        lines.append(("prompts seen in training", f"{report.shared_prompts:,} rows"))
    return lines


@dataclass(frozen=True)
class Preview:
    """Samples and report of one dataset; prints with rich, and shows itself in a notebook."""

    title: str
    dataset: Dataset
    tokenizer: Tokenizer
    examples: tuple[Example, ...]
    extra: tuple[tuple[str, str], ...] = ()

    def _caption(self, example: Example) -> str:
        cut = f", cut from {example.length}" if example.length > len(example.ids) else ""
        return f"{example.where}: {len(example.ids)} tokens{cut}, {example.targets} trained"

    def _facts(self) -> list[tuple[str, str]]:
        return [*facts(self.dataset.report), *self.extra]

    def _histogram(self) -> list[tuple[str, int]]:
        return [(f"<= {bound:,}", count) for bound, count in self.dataset.report.histogram.items() if count]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for example in self.examples:
            yield Text(self._caption(example), style="bold")
            body = Text()
            for trained, group in itertools.groupby(spans(example, self.tokenizer), key=lambda span: span.trained):
                brackets = trained and console.color_system is None  # a file or pipe shows no colours
                body.append("⟦" if brackets else "")
                for span in group:
                    body.append(span.text, style=span.styles[0])
                body.append("⟧" if brackets else "")
            yield body
            yield Text()
        table = Table(title=self.title, show_header=False, title_justify="left")
        for name, value in self._facts():
            table.add_row(name, Text(value))
        lengths = Table(title="tokens per row", show_header=False, title_justify="left")
        rows = self._histogram()
        most = max(count for _, count in rows)
        for bound, count in rows:
            lengths.add_row(bound, f"{count:,}", "█" * max(1, round(24 * count / most)))
        yield Group(table, lengths)

    def _repr_html_(self) -> str:
        parts = []
        for example in self.examples:
            body = "".join(f'<span style="{span.styles[1]}">{html.escape(span.text)}</span>'
                           for span in spans(example, self.tokenizer))
            parts.append(f"<p><b>{html.escape(self._caption(example))}</b></p>"
                         f'<pre style="white-space:pre-wrap">{body}</pre>')
        for title, rows in ((self.title, self._facts()), ("tokens per row", self._histogram())):
            cells = "".join(f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>"
                            for name, value in rows)
            parts.append(f"<table><caption>{html.escape(title)}</caption>{cells}</table>")
        return "\n".join(parts)


def preview(dataset: Dataset, tokenizer: Tokenizer, rows: int | Iterable[int] = 3, title: str = "dataset",
            extra: Iterable[tuple[str, str]] = ()) -> Preview:
    """The first `rows` examples, or those with the given numbers, with the report."""
    numbers = range(min(rows, len(dataset))) if isinstance(rows, int) else rows
    return Preview(title, dataset, tokenizer, tuple(dataset.examples[i] for i in numbers), tuple(extra))


def show(settings: config.Config, rows: int = 3, console: Console | None = None) -> None:
    """Prints samples and reports of the training and evaluation data of a run."""
    tokenizer = Tokenizer.of_run(settings)
    console = console or Console(highlight=False)
    train, evaluation = load(settings.data, tokenizer, settings.train.seed)
    batches = Batches.of_run(settings, train)
    wanted = settings.train.rows_per_step
    steps = f"{len(batches):,} of {batches.rows_per_step} {settings.data.rows} rows"
    if batches.rows_per_step < wanted:
        steps += f" (the data do not fill {wanted})"
    extra = [("steps per epoch", f"{steps}, {batches.padded_share():.1%} padding")]
    console.print(preview(train, tokenizer, rows, "training data", extra))
    if evaluation is not None:
        console.print(preview(evaluation, tokenizer, rows, "evaluation data"))
    if console.color_system is None:
        console.print("⟦ ⟧ trained")
        return
    legend = Text("trained", style=_STYLES[False, True][0])
    console.print(legend.append("  trained special token", style=_STYLES[True, True][0])
                  .append("  prompt", style=_STYLES[False, False][0])
                  .append("  special token", style=_STYLES[True, False][0]))
