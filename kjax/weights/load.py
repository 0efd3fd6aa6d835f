"""A checkpoint's tensors into the stacked parameter tree, in the order of the files, with little memory beside it."""

import collections
import concurrent.futures
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from rich import progress as bars

from kjax.errors import CheckpointError
from kjax.offload.store import ExpertStore
from kjax.weights import names
from kjax.weights.safetensors import DTYPES, ITEMSIZE, Checkpoint, TensorEntry, quote

# Bytes read at a time. WORKERS readers with one finished block each in hand, every block once as stored and once as
# wanted (at most twice as large): 2 * 4 * 3 * 32 MiB = 0.75 GiB beside the result.
BLOCK = 32 << 20
WORKERS = 4
PROGRESS_FROM = 1 << 30  # bytes; what takes less than a second needs no bar
ALIGNMENT = 64  # bytes; a CPU array at such an address becomes a jax.Array without a copy

# The bits of the exponent; all set means NaN or Inf.
_EXPONENT = {"bfloat16": (np.uint16, 0x7F80), "float16": (np.uint16, 0x7C00), "float32": (np.uint32, 0x7F800000)}


class _Block(NamedTuple):
    """Rows start to stop of a tensor on their way to a leaf."""

    entry: TensorEntry
    place: names.Place
    start: int
    stop: int


def load_params(checkpoint: Checkpoint, config, abstract: Mapping, *, progress: bool = True) -> dict:
    """The parameter tree that `abstract` (jax.ShapeDtypeStruct leaves) describes, filled from the checkpoint.

    config gives num_hidden_layers, num_moe_layers, n_routed_experts, hidden_size, moe_intermediate_size,
    tie_word_embeddings and model_type. bf16, f16 and f32 tensors are converted to the dtype of their leaf. Raises
    CheckpointError naming all tensors that are missing, extra or do not fit before anything is read, and the first
    that holds NaN or Inf.
    """
    wanted = names.account(checkpoint, config, abstract)
    entries = sorted((checkpoint.entry(name) for name in wanted), key=lambda entry: (str(entry.path), entry.begin))
    blocks = [block for entry in entries for block in _blocks(entry, wanted[entry.name])]
    shapes = flatten_dict(abstract, sep="/")
    total = sum(entry.end - entry.begin for entry in entries)
    fill = _fill_host if jax.default_backend() == "cpu" else _fill_device
    with _progress_bar(total, progress) as bar:
        task = bar.add_task("Loading weights", total=total)
        leaves = fill(checkpoint, blocks, shapes, lambda count: bar.update(task, advance=count))
    return unflatten_dict(leaves, sep="/")


def open_experts(checkpoint: Checkpoint, config, *, transport: str = "auto", check: bool = True) -> ExpertStore | None:
    """The routed experts as a store over the checkpoint's own bytes; None for a model without any.

    check reads every expert once and refuses NaN and Inf. Raises CheckpointError naming all expert tensors that are
    missing or of another shape or dtype.
    """
    if not config.num_moe_layers:
        return None
    return ExpertStore(names.expert_entries(checkpoint, config), transport=transport, check=check)


def _blocks(entry: TensorEntry, place: names.Place) -> Iterator[_Block]:
    if not math.prod(entry.shape):
        return
    rows = entry.shape[0] if entry.shape else 1
    step = max(1, BLOCK * rows // (entry.end - entry.begin))
    for start in range(0, rows, step):
        yield _Block(entry, place, start, min(start + step, rows))


def _read(checkpoint: Checkpoint, block: _Block, out: np.ndarray):
    """Fills `out` [rows, ...] with a block, converted; refuses NaN and Inf."""
    entry, stored = block.entry, np.dtype(DTYPES[block.entry.dtype])
    row = math.prod(entry.shape[1:]) * ITEMSIZE[entry.dtype]
    if out.dtype == stored:
        checkpoint.read_bytes(entry, out, block.start * row)
    else:
        raw = np.empty(out.shape, stored)
        checkpoint.read_bytes(entry, raw, block.start * row)
        with np.errstate(over="ignore", invalid="ignore"):  # what becomes Inf is reported by name below
            out[...] = raw.astype(out.dtype)
    unsigned, exponent = _EXPONENT[out.dtype.name]
    bad = (out.view(unsigned) & unsigned(exponent)) == exponent
    if bad.any():
        first = np.unravel_index(int(bad.argmax()), bad.shape)
        place = [block.start + int(first[0]), *map(int, first[1:])]
        raise CheckpointError(
            f"{entry.path}: tensor {quote(entry.name)} holds NaN or Inf (first at {place}, as {out.dtype.name}); "
            "the checkpoint is damaged, download this shard again"
        )


def _in_order(work: Callable, items: Iterable) -> Iterator:
    """work(item) for each, on WORKERS threads and in order, never more than 2 * WORKERS results ahead."""
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        items, pending = iter(items), collections.deque()
        try:
            for item in itertools.islice(items, 2 * WORKERS):
                pending.append(pool.submit(work, item))
            while pending:
                yield pending.popleft().result()
                pending.extend(pool.submit(work, item) for item in itertools.islice(items, 1))
        finally:
            for future in pending:
                future.cancel()


def _fill_host(checkpoint, blocks, shapes, advance) -> dict[str, jax.Array]:
    """On the CPU backend: blocks are read straight into the arrays that JAX then takes over without a copy."""
    arrays = {path: _aligned(leaf.shape, leaf.dtype) for path, leaf in shapes.items()}

    def work(block):
        _read(checkpoint, block, arrays[block.place.leaf][block.place.index][block.start : block.stop])
        return block

    for block in _in_order(work, blocks):
        advance(_size(block))
    return {path: jax.device_put(arrays.pop(path)) for path in list(arrays)}


def _fill_device(checkpoint, blocks, shapes, advance) -> dict[str, jax.Array]:
    """On an accelerator: blocks are written into donated device buffers."""
    arrays = {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in shapes.items()}

    def work(block):
        out = np.empty((block.stop - block.start, *block.entry.shape[1:]), shapes[block.place.leaf].dtype)
        _read(checkpoint, block, out)
        return block, out

    for block, rows in _in_order(work, blocks):
        path, index = block.place.leaf, block.place.index
        begin = (*index, block.start) + (0,) * (len(block.entry.shape) - 1)
        arrays[path] = _write(arrays[path], rows, np.asarray(begin, np.int32))
        # Waiting bounds the host copies in flight; the readers go on meanwhile.
        arrays[path].block_until_ready()
        advance(_size(block))
    return arrays


@functools.partial(jax.jit, donate_argnums=0)
def _write(leaf: jax.Array, rows: jax.Array, begin: jax.Array) -> jax.Array:
    """leaf with `rows` written at `begin`, whose leading numbers are the layer (and expert)."""
    rows = rows.reshape((1,) * (leaf.ndim - rows.ndim) + rows.shape)
    return jax.lax.dynamic_update_slice(leaf, rows, [begin[axis] for axis in range(leaf.ndim)])


def _aligned(shape: tuple[int, ...], dtype) -> np.ndarray:
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    begin = -raw.ctypes.data % ALIGNMENT
    return raw[begin : begin + size].view(dtype).reshape(shape)


def _size(block: _Block) -> int:
    return (block.stop - block.start) * math.prod(block.entry.shape[1:]) * ITEMSIZE[block.entry.dtype]


def _progress_bar(total: int, wanted: bool) -> bars.Progress:
    """GB and GB/s, on a terminal and for large loads only."""
    console = bars.get_console()
    return bars.Progress(
        bars.TextColumn("{task.description}"), bars.BarColumn(), bars.DownloadColumn(), bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(), console=console, transient=True,
        disable=not (wanted and console.is_terminal and total >= PROGRESS_FROM),
    )
