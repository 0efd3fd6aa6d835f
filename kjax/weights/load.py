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
from kjax.offload.formats import BAND, Quantised
from kjax.offload.storage import choose
from kjax.offload.store import ExpertStore, size
from kjax.weights import lowbit, stored
from kjax.weights.account import account, expert_sources
from kjax.weights.files import quote
from kjax.weights.names import Place
from kjax.weights.safetensors import DTYPES, ITEMSIZE, Checkpoint
from kjax.weights.stored import Source

# Bytes read at a time, of quantised weights and of those that will be counted as fp32. Each of WORKERS readers has a
# block as stored, as fp32 and as a mask, and six bands of rows while it quantises; as many finished blocks again wait:
# 4 * (3 * 32 MiB + 6 * 9.4 MB) + 8 * 32 MiB = 0.9 GB beside the result, for the 18,432 columns of DeepSeek-V3.
BLOCK = 32 << 20
WORKERS = 4
TABLE = "embed_tokens/weight"
ALIGNMENT = 64  # bytes; a CPU array at such an address becomes a jax.Array without a copy


class _Block(NamedTuple):
    """Rows start to stop of a weight on their way to a leaf; form: the low-bit format they will be held in."""

    source: Source
    place: Place
    start: int
    stop: int
    form: str | None


def load_params(checkpoint: Checkpoint, config, abstract: Mapping, weights: str = "full", *,
                progress: bool = True) -> dict:
    """The parameter tree that `abstract` (jax.ShapeDtypeStruct leaves) describes, filled from the checkpoint.

    config gives num_hidden_layers, num_moe_layers, n_routed_experts, hidden_size, moe_intermediate_size,
    tie_word_embeddings, model_type and quantization. bf16, f16 and f32 tensors are converted to the dtype of their
    leaf; quantised ones mean bf16 numbers, which are converted likewise. Raises CheckpointError naming all tensors
    that are missing, extra or do not fit before anything is read, and the first that holds NaN or Inf.

    Args:
      abstract: the whole tree, without low-bit weights.
      weights: how linear layers are held, see kjax.weights.lowbit. Those that the checkpoint holds in that format keep
        their bytes; the others are quantised block by block, and the embedding table stays in host memory, as a
        numpy array.
    """
    wanted = account(checkpoint, config, abstract)
    order = {tensor: number for number, tensor in enumerate(checkpoint.names())}
    wanted.sort(key=lambda item: order[stored.main(item[0]).name])
    blocks = [block for source, place in wanted
              for block in _blocks(source, place, lowbit.of(place.leaf, weights, config.quantization))]
    shapes = flatten_dict(lowbit.held(abstract, weights, config.quantization), sep="/")
    host = {TABLE} if lowbit.hosts_table(config, weights) else set()
    total = sum(stored.main(source).end - stored.main(source).begin for source, _ in wanted)
    fill = _fill_host if jax.default_backend() == "cpu" else _fill_device
    with bars.bytes_bar("Loading weights", total, progress) as advance:
        leaves = fill(checkpoint, blocks, shapes, host, advance)
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


def _blocks(source: Source, place: Place, form: str | None) -> Iterator[_Block]:
    count = math.prod(source.shape)
    if not count:
        return
    rows = source.shape[0] if source.shape else 1
    itemsize = 4 if form or isinstance(source, Quantised) else ITEMSIZE[source.dtype]
    step = max(1, BLOCK * rows // (count * itemsize))
    if form:
        step = max(BAND, step // BAND * BAND)
    for start in range(0, rows, step):
        yield _Block(source, place, start, min(start + step, rows), form)


def _read_low_bit(checkpoint: Checkpoint, block: _Block) -> tuple[np.ndarray, np.ndarray]:
    """(codes, scales) of a block: the checkpoint's own where it has them in this format."""
    source = block.source
    if not isinstance(source, Quantised) or source.format != block.form:
        weight = np.empty((block.stop - block.start, *source.shape[1:]), np.float32)
        stored.read(checkpoint, source, block.start, weight)
        return lowbit.quantise(block.form, weight)
    codes = stored.rows(checkpoint, source.codes, block.start, block.stop)
    scales = stored.scales(checkpoint, source, block.start, block.stop)
    scales = scales.astype(DTYPES[lowbit.FORMATS[block.form].scale_dtype], copy=False)
    # Only the FP8 formats are both of checkpoints and of the device. 0x7F and 0xFF are their NaN; no code exceeds 448.
    stored.refuse(source, block.start, (codes.view(np.uint8) & 0x7F) == 0x7F, source.format)
    with np.errstate(over="ignore"):
        wrong = ~np.isfinite((scales * np.float32(lowbit.FP8_MAX)).astype(DTYPES["BF16"]).astype(np.float32))
    if wrong.any():
        raise CheckpointError(f"{source.scales.path}: tensor {quote(source.scales.name)} holds NaN or Inf, or numbers "
                              "too large for a scale; the checkpoint is damaged, download this shard again")
    return codes, scales


def _parts(checkpoint: Checkpoint, block: _Block) -> Iterator[tuple[str, int, np.ndarray]]:
    """(leaf, first row, rows) of the codes and of the scales of a block that will be held in few bits."""
    place = lowbit.name(block.place.leaf, block.form)
    codes, scales = _read_low_bit(checkpoint, block)
    yield f"{place}/codes", block.start, codes
    yield f"{place}/scales", block.start // lowbit.FORMATS[block.form].block[0], scales


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


def _fill_host(checkpoint, blocks, shapes, host, advance) -> dict:
    """On the CPU backend: blocks are read straight into the arrays that JAX then takes over without a copy."""
    arrays = {path: _aligned(leaf.shape, leaf.dtype) for path, leaf in shapes.items()}

    def work(block):
        if block.form is None:
            out = arrays[block.place.leaf][block.place.index][block.start : block.stop]
            stored.read(checkpoint, block.source, block.start, out)
        else:
            for path, first, rows in _parts(checkpoint, block):
                arrays[path][block.place.index][first : first + len(rows)] = rows
        return block

    for block in _in_order(work, blocks):
        advance(_size(block))
    return {path: arrays.pop(path) if path in host else jax.device_put(arrays.pop(path)) for path in list(arrays)}


def _fill_device(checkpoint, blocks, shapes, host, advance) -> dict:
    """On an accelerator: blocks are written into donated device buffers."""
    arrays = {path: np.empty(leaf.shape, leaf.dtype) if path in host else jnp.zeros(leaf.shape, leaf.dtype)
              for path, leaf in shapes.items()}

    def work(block):
        path, index = block.place.leaf, block.place.index
        if path in host:
            stored.read(checkpoint, block.source, block.start, arrays[path][index][block.start : block.stop])
            return block, []
        if block.form is not None:
            return block, list(_parts(checkpoint, block))
        out = np.empty((block.stop - block.start, *block.source.shape[1:]), shapes[path].dtype)
        stored.read(checkpoint, block.source, block.start, out)
        return block, [(path, block.start, out)]

    for block, parts in _in_order(work, blocks):
        for path, first, rows in parts:
            begin = (*block.place.index, first) + (0,) * (rows.ndim - 1)
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
    entry = stored.main(block.source)
    return (block.stop - block.start) * math.prod(entry.shape[1:]) * ITEMSIZE[entry.dtype]
