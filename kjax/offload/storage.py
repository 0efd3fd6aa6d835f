"""Where the routed experts lie: mapped in the page cache of their files, or resident in memory of their own.

Mapped experts cost no memory that the system cannot take back, and a checkpoint may be larger than the memory. Resident
ones are copied once, to huge pages on the memory node of the threads that will read them.

Everything read from the system goes through `root`, so that other machines can be made up.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kjax import _ext
from kjax.errors import ConfigError

Mode = Literal["mapped", "resident"]

# Optimiser steps after which a copy is repaid. A copy reads every weight and writes it, and the system clears the page
# before: three times the experts' bytes through memory. A step reads them at least three times (forward once, backward
# once, and dx of gate and up once more); 4 KB pages cost it 5 % or more there (measured on the strided backward
# reads), hence 3 / (3 * 0.05) = 20 steps and some more, since prefetching hides a part. On several nodes half of the
# reads and more go to another node's memory, at about two thirds of the speed: a fifth of that.
REPAID_ONE_NODE, REPAID_NODES = 30, 6
FREE_SHARE = 0.8  # of what is free: `auto` leaves the rest to activations, the stash and the page cache


@dataclass(frozen=True)
class Storage:
    """mode: what is done.  reason: why, for people."""

    mode: Mode
    reason: str

    def __str__(self):
        return f"{self.mode}: {self.reason}"


def choose(setting: Literal["auto", "mapped", "resident"], size: int, steps: int = 0, *, nodes: int | None = None,
           root: str | Path = "/") -> Storage:
    """How to hold experts of `size` bytes in a run of `steps` optimiser steps (0: no training).

    Raises ConfigError where "resident" is asked for and the memory is not there.
    """
    if setting == "mapped":
        return Storage("mapped", "as set")
    free, limit = available(root)
    if setting == "resident":
        if size > free:
            raise ConfigError(f"Model.storage = 'resident': {size / 1e9:.1f} GB of routed experts, and {free / 1e9:.1f}"
                              f" GB {limit}: set 'mapped' or 'auto', or make room")
        return Storage("resident", "as set")
    nodes = len(_ext.nodes()) if nodes is None else nodes
    repaid = REPAID_ONE_NODE if nodes == 1 else REPAID_NODES
    if steps < repaid:
        return Storage("mapped", f"a copy is repaid by {repaid} training steps" + (f", not {steps}" if steps else ""))
    if nodes == 1 and huge_pages(root) == "never":
        return Storage("mapped", "with one memory node and huge pages switched off a copy gains nothing")
    if size > FREE_SHARE * free:
        return Storage("mapped", f"{size / 1e9:.1f} GB are too much for the {free / 1e9:.1f} GB {limit}")
    return Storage("resident", f"{steps} steps repay the copy")


def huge_pages(root: str | Path = "/") -> str:
    """Whether memory may lie on transparent huge pages: "always", "madvise" (kjax asks) or "never"."""
    chosen = re.search(r"\[(\w+)\]", _read(Path(root) / "sys/kernel/mm/transparent_hugepage/enabled"))
    return chosen[1] if chosen else "never"


def available(root: str | Path = "/") -> tuple[int, str]:
    """Bytes that anonymous memory may still take, and what limits them, as an end to "3.2 GB ..."."""
    root = Path(root)
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", _read(root / "proc/meminfo"), re.MULTILINE)
    free, limit = (int(found[1]) * 1024 if found else 1 << 62), "are free"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / ("sys/fs/cgroup" if not controllers else "sys/fs/cgroup/memory")
        parts = Path(group.lstrip("/")).parts
        for depth in range(len(parts), -1, -1):  # a limit of any group above counts too
            left = _left(base.joinpath(*parts[:depth]), version=1 if controllers else 2)
            if left is not None and left < free:
                free, limit = left, f"are left of the control group's limit (/{'/'.join(parts[:depth])})"
    return free, limit


def _left(group: Path, version: int) -> int | None:
    """What a control group may still take; its page cache counts as free, because the system drops it first."""
    maximum, current = (("memory.max", "memory.current") if version == 2 else
                        ("memory.limit_in_bytes", "memory.usage_in_bytes"))
    limit, used = _read(group / maximum).strip(), _read(group / current).strip()
    if not limit.isdigit() or not used.isdigit():
        return None
    stat = dict(line.split(" ", 1) for line in _read(group / "memory.stat").splitlines() if " " in line)
    prefix = "" if version == 2 else "total_"
    cache = sum(int(stat.get(f"{prefix}{name}_file", 0)) for name in ("active", "inactive"))
    return max(0, int(limit) - int(used) + cache)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
