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

from kjax import progress as bars
from kjax.errors import CheckpointError
from kjax.offload.formats import FORMATS, Quantised, decode
from kjax.offload.storage import choose
from kjax.offload.store import ExpertStore, size
from kjax.weights.account import Source, account, expert_sources
from kjax.weights.names import Place
from kjax.weights.safetensors import DTYPES, ITEMSIZE, Checkpoint, TensorEntry, quote

# Bytes read at a time, of quantised weights counted as fp32. WORKERS readers with one finished block each in hand,
# every block once as stored and once as wanted (at most twice as large): 2 * 4 * 3 * 32 MiB = 0.75 GiB beside the
# result.
BLOCK = 32 << 20
WORKERS = 4
ALIGNMENT = 64  # bytes; a CPU array at such an address becomes a jax.Array without a copy

# The bits of the exponent; all set means NaN or Inf.
_EXPONENT = {"bfloat16": (np.uint16, 0x7F80), "float16": (np.uint16, 0x7C00), "float32": (np.uint32, 0x7F800000)}


class _Block(NamedTuple):
    """Rows start to stop of a weight on their way to a leaf."""

    source: Source
    place: Place
    start: int
    stop: int


def load_params(checkpoint: Checkpoint, config, abstract: Mapping, *, progress: bool = True) -> dict:
    """The parameter tree that `abstract` (jax.ShapeDtypeStruct leaves) describes, filled from the checkpoint.

    config gives num_hidden_layers, num_moe_layers, n_routed_experts, hidden_size, moe_intermediate_size,
    tie_word_embeddings, model_type and quantization. bf16, f16 and f32 tensors are converted to the dtype of their
    leaf; quantised ones mean bf16 numbers, which are converted likewise. Raises CheckpointError naming all tensors
    that are missing, extra or do not fit before anything is read, and the first that holds NaN or Inf.
    """
    wanted = account(checkpoint, config, abstract)
    wanted.sort(key=lambda item: (str(_main(item[0]).path), _main(item[0]).begin))
    blocks = [block for source, place in wanted for block in _blocks(source, place)]
    shapes = flatten_dict(abstract, sep="/")
    total = sum(_main(source).end - _main(source).begin for source, _ in wanted)
    fill = _fill_host if jax.default_backend() == "cpu" else _fill_device
    with bars.bytes_bar("Loading weights", total, progress) as advance:
        leaves = fill(checkpoint, blocks, shapes, advance)
    return unflatten_dict(leaves, sep="/")


def open_experts(checkpoint: Checkpoint, config, *, transport: str = "auto", storage: str = "auto",
                 check: bool = True, progress: bool = True) -> ExpertStore | None:
    """The routed experts as a store over the checkpoint's own bytes; None for a model without any.

    storage is "mapped", "resident" or "auto", which maps: see kjax.offload.storage. check reads every expert once and
    refuses NaN and Inf. Raises CheckpointError naming all expert tensors that are missing or of another shape or dtype.
    """
    if not config.num_moe_layers:
        return None
    sources = expert_sources(checkpoint, config)
    return ExpertStore(sources, transport=transport, storage=choose(storage, size(sources)).mode, check=check,
                       progress=progress)


def _main(source: Source) -> TensorEntry:
    """The tensor that holds most of a weight, in whose place it is read."""
    return source.codes if isinstance(source, Quantised) else source


def _blocks(source: Source, place: Place) -> Iterator[_Block]:
    count = math.prod(source.shape)
    if not count:
        return
    rows = source.shape[0] if source.shape else 1
    itemsize = 4 if isinstance(source, Quantised) else ITEMSIZE[source.dtype]
    step = max(1, BLOCK * rows // (count * itemsize))
    for start in range(0, rows, step):
        yield _Block(source, place, start, min(start + step, rows))


def _rows(checkpoint: Checkpoint, entry: TensorEntry, start: int, stop: int, out: np.ndarray | None = None):
    """Rows of a tensor as stored, in `out` or a new array."""
    if out is None:
        out = np.empty((stop - start, *entry.shape[1:]), DTYPES[entry.dtype])
    checkpoint.read_bytes(entry, out, start * math.prod(entry.shape[1:]) * ITEMSIZE[entry.dtype])
    return out


def _read(checkpoint: Checkpoint, block: _Block, out: np.ndarray):
    """Fills `out` [rows, ...] with a block, converted; refuses NaN and Inf."""
    source, start, stop = block.source, block.start, block.stop
    entry = _main(source)
    if isinstance(source, Quantised):
        height = FORMATS[source.format].block[0]
        scales = _rows(checkpoint, source.scales, start // height, (stop - 1) // height + 1)
        decode(source.format, _rows(checkpoint, entry, start, stop), scales, out, start)
    elif out.dtype == np.dtype(DTYPES[entry.dtype]):
        _rows(checkpoint, entry, start, stop, out)
    else:
        with np.errstate(over="ignore", invalid="ignore"):  # what becomes Inf is reported by name below
            out[...] = _rows(checkpoint, entry, start, stop).reshape(out.shape).astype(out.dtype)
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
        out = np.empty((block.stop - block.start, *block.source.shape[1:]), shapes[block.place.leaf].dtype)
        _read(checkpoint, block, out)
        return block, out

    for block, rows in _in_order(work, blocks):
        path, index = block.place.leaf, block.place.index
        begin = (*index, block.start) + (0,) * (len(block.source.shape) - 1)
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
    entry = _main(block.source)
    return (block.stop - block.start) * math.prod(entry.shape[1:]) * ITEMSIZE[entry.dtype]
