"""What a run shows on the screen: the banner before it starts, a bar on a terminal, a line per step elsewhere."""

import contextlib
import html
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median

from rich import get_console
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from kjax import log

RECENT = 20  # steps whose median time gives the estimate: long enough to skip a slow one, short enough to follow


def banner(console: Console, title: str, rows: Sequence[tuple[str, str]], trainable) -> None:
    """One screen: what is trained on what with which settings. trainable: a kjax.lora.Table."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in rows:
        table.add_row(name, escape(value))
    console.rule(escape(title), align="left")
    console.print(table)
    console.print(trainable)


BYTES_FROM = 1 << 30  # what takes less than a second needs no bar


@contextlib.contextmanager
def bytes_bar(title: str, total: int, show: bool = True) -> Iterator[Callable[[int], None]]:
    """GB and GB/s, on a terminal and for large amounts only; yields what is told of each number of bytes done."""
    console = get_console()
    with Progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
                  TimeRemainingColumn(), console=console, transient=True,
                  disable=not (show and console.is_terminal and total >= BYTES_FROM)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.update(task, advance=done)


LINE_SECONDS = 10.0  # between two lines where there is no terminal for a bar


@contextlib.contextmanager
def counted(console: Console, title: str, total: int, unit: str, done: int = 0) -> Iterator[Callable[..., None]]:
    """Progress of a known number of things: a bar on a terminal, a line now and then elsewhere. Yields what is told of
    each number that has been done, and in a note of what is being done (number, note=""); `done` were before."""
    if console.is_terminal and not console.is_jupyter:
        with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit),
                      TimeRemainingColumn(), console=console, transient=True) as bar:
            task = bar.add_task(title, total=total, completed=done)
            yield lambda number, note="": bar.update(task, advance=number, description=f"{title} {note}".rstrip())
        return
    first, started, told = done, time.monotonic(), time.monotonic()

    def advance(number: int, note: str = "") -> None:
        nonlocal done, told
        done += number
        now = time.monotonic()
        if done < total and now - told >= LINE_SECONDS:
            left = (now - started) / (done - first) * (total - done) if done > first else None
            parts = (f"{title} {done:,}/{total:,} {unit}", note, "" if left is None else f"remaining {log.clock(left)}")
            console.print(", ".join(part for part in parts if part), soft_wrap=True)
            told = now

    yield advance


class _Remaining(ProgressColumn):
    def render(self, task) -> Text:
        remaining = task.fields.get("remaining")
        return Text("-:--:--" if remaining is None else log.clock(remaining), style="cyan")


class StepProgress:
    """Progress of the optimiser steps: a bar with its figures on a terminal, one line a step where there is none.

    In a notebook one line is displayed and updated in place. Use it as a context manager.
    """

    def __init__(self, console: Console, total_steps: int, start_step: int):
        self.console, self.total_steps = console, total_steps
        self._seconds: list[float] = []
        self._bar = self._handle = None
        self._started: float | None = None  # when the step in progress began
        if console.is_jupyter:
            self._handle = _notebook_line()
        elif console.is_terminal:
            self._bar = Progress(TextColumn("{task.description}"), BarColumn(bar_width=None),
                                 TextColumn("{task.fields[figures]}"), _Remaining(), console=console)
            self._task = self._bar.add_task(f"step {start_step}/{total_steps}", total=total_steps,
                                            completed=start_step, figures="", remaining=None)

    def __enter__(self) -> "StepProgress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, text: str) -> None:
        """A message of its own, above the bar."""
        self.console.print(Text(text), soft_wrap=True)

    def begin(self, what: str) -> None:
        """Name what is being done now: `compiling`, `evaluating`, `step 7/50`."""
        self._started = time.monotonic()
        if self._bar:
            self._bar.update(self._task, description=what)

    def expected(self) -> float | None:
        """Seconds that the step in progress still takes, by the recent ones; None before one has ended."""
        if not self._seconds or self._started is None:
            return None
        return max(0.0, median(self._seconds) - (time.monotonic() - self._started))

    def step(self, step: int, loss: float, rate: float, times: log.StepTimes) -> None:
        """A step has ended."""
        self._seconds = [*self._seconds, times.seconds][-RECENT:]
        remaining = median(self._seconds) * (self.total_steps - step)
        figures = (f"loss {loss:.4f}  {times.tokens_per_second:,.0f} tok/s  padding {times.padded:.0%}  "
                   f"host {times.host_share:.0%} / device {1 - times.host_share:.0%}")
        if self._bar:
            self._bar.update(self._task, completed=step, figures=figures, remaining=remaining,
                             description=f"step {step}/{self.total_steps}")
            return
        line = (f"step {step}/{self.total_steps}  {figures}  lr {rate:.3g}  {times.seconds:.2f} s  "
                f"remaining {log.clock(remaining)}")
        if self._handle is not None:
            self._handle.update(_preformatted(line))
        else:
            self.say(line)


def _notebook_line():
    from IPython.display import DisplayHandle

    handle = DisplayHandle()
    handle.display(_preformatted("starting"))
    return handle


def _preformatted(line: str):
    from IPython.display import HTML

    return HTML(f"<pre>{html.escape(line)}</pre>")
