"""How much host memory the activations kept between a forward and its backward may take, and what became of them.

The stash itself lives beside the kernels (ext/stash.cpp): a forward that will be differentiated leaves the gate and up
activations there, 2*F numbers per route and the products with the adapters' A, under a slip that only its own backward
holds. An entry is taken once; the oldest leave when the budget is full, and a backward that misses recomputes them from
x with equal bits.
"""

from kjax import _ext
from kjax.offload import storage

FREE_SHARE = 0.25  # of free memory, unless Model.stash_gb says otherwise


def budget(gigabytes: float | None, free: float) -> int:
    """The bytes that Model.stash_gb stands for where `free` bytes are; None: a quarter of them."""
    return int(free * FREE_SHARE if gigabytes is None else gigabytes * 1e9)


def set_budget(gigabytes: float | None = None) -> int:
    """Set the budget (None: a quarter of what is free now) and return it in bytes; 0 keeps nothing."""
    return _ext.stash_budget(budget(gigabytes, storage.available()[0]))


def stats() -> dict[str, int]:
    """`entries` and `bytes` now held, `spare` bytes for later ones; `hits`, `misses` and `evicted` since the start."""
    return _ext.stash_stats()


def clear():
    """Drop every entry; a backward still to come recomputes."""
    _ext.stash_clear()
