"""A plan as it is shown: tables for people, a dictionary for JSON."""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from kjax import lora
from kjax.lora import size
from kjax.planning.machine import Machine


class Row(NamedTuple):
    """One line of a table."""

    name: str
    amount: float
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """What a run needs; `problems` is empty where it fits.

    Attributes:
      parameters: numbers per part.  trainable: lora.Table.
      host: bytes of main memory that belong to the process.  cache: the experts where they are mapped: page cache.
      device, disk: bytes per part.  work: operations and bytes per step.  time: seconds per step, empty where the
        machine's speeds are not known.  stash: what a smaller stash costs.
      problems: what does not fit, with the way out.
    """

    title: str
    machine: Machine
    parameters: tuple[Row, ...]
    trainable: lora.Table
    host: tuple[Row, ...]
    cache: tuple[Row, ...]
    device: tuple[Row, ...]
    disk: tuple[Row, ...]
    work: tuple[Row, ...]
    time: tuple[Row, ...]
    stash: tuple[Row, ...]
    problems: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """For JSON: tables as {name: amount}."""
        tables = {name: {row.name: row.amount for row in getattr(self, name)}
                  for name in ("parameters", "host", "cache", "device", "disk", "work", "time", "stash")}
        return {"model": self.title, "machine": asdict(self.machine), **tables,
                "trainable": {row.group: row.parameters for row in self.trainable}, "fits": self.fits,
                "problems": list(self.problems)}

    def print(self, console=None):
        """The tables, with rich."""
        from rich.console import Console
        console = console or Console()
        console.print(self.title, markup=False, style="bold")
        for heading, rows, show in (
                ("Parameters", self.parameters, lambda row: f"{row.amount:,.0f}"),
                ("Main memory", _summed(self.host), _bytes), ("Page cache", self.cache, _bytes),
                ("Device memory", _summed(self.device), _bytes), ("Disk", self.disk, _bytes),
                ("Work of a step", self.work, _work),
                ("Time of a step", _summed(self.time), lambda row: f"{row.amount:,.3g} s"),
                ("A smaller stash", self.stash, _bytes)):
            if rows:
                console.print(_table(heading, rows, show))
                console.print()
        console.print(self.trainable)
        on = self.machine
        console.print(f"machine: {on.source + ': ' if on.source else ''}{size(on.host)} of main memory, " + (
            f"{size(on.device)} on the device, {size(on.usable)} of it for JAX" if on.device is not None else
            "which also holds the device part: JAX runs on the CPU"), markup=False, highlight=False)
        if not self.time:
            console.print("no time: --machine here measures this machine's speeds, --machine NAME or a JSON file "
                          "describes another", style="dim", markup=False)
        for problem in self.problems:
            console.print(f"does not fit: {problem}", style="bold red", markup=False)
        if self.fits:
            console.print("fits", style="bold green")


def total(rows) -> float:
    return sum(row.amount for row in rows)


def _bytes(row: Row) -> str:
    return size(row.amount)


def _work(row: Row) -> str:
    """Operations in units of 1e12, bytes, or a number."""
    if "operations" in row.name:
        return f"{row.amount / 1e12:,.4g} T"
    if "bytes" in row.name:
        return size(row.amount)
    return f"{row.amount:,.0f}" if row.amount >= 100 else f"{row.amount:.2g}"


def _summed(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    return (*rows, Row("total", total(rows))) if len(rows) > 1 else rows


def _table(heading: str, rows: tuple[Row, ...], show):
    from rich.table import Table
    table = Table(title=heading, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(min_width=28)
    table.add_column(justify="right", min_width=12)
    table.add_column(style="dim")
    for row in rows:
        table.add_row(row.name, show(row), row.note)
    return table
