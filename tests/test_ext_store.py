"""The store's checks and life, and the stash between forward and backward."""

import gc
import threading
import time
import weakref

import ml_dtypes
import numpy as np
import pytest
from ext_oracle import FORMATS, QUANTISED, bits, make_layer, oracle, relative_l2, route, values

from kjax import _ext

WIDTH, HIDDEN, EXPERTS = 12, 8, 3


@pytest.fixture
def store():
    store = _ext.Store(2, EXPERTS, WIDTH, HIDDEN, "bf16")
    yield store
    store.close()


@pytest.fixture(autouse=True)
def empty_stash():
    budget = _ext.stash_budget()
    _ext.stash_clear()
    yield
    _ext.stash_clear()
    _ext.stash_budget(budget)


def buffer(store, size):
    return store.add_buffer(np.zeros(size, np.uint8))


def where(number, *offsets):
    return np.full(EXPERTS, number, np.int32), np.array(offsets, np.int64)


def call(tokens=5, seed=0, dtype="fp32"):
    rng = np.random.default_rng(seed)
    x = bits(rng.standard_normal((tokens, WIDTH)), dtype)
    return x, *route(rng, tokens, EXPERTS, 2, holes=0)


MATRIX = WIDTH * HIDDEN * 2  # bytes of one projection


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, EXPERTS, WIDTH, HIDDEN, "bf16"), "layers = 0 is not between"),
        ((1, EXPERTS, -1, HIDDEN, "bf16"), "width = -1 is not between"),
        ((1, EXPERTS, WIDTH, 2**40, "bf16"), "hidden = 1099511627776 is not between"),
        (
            (1, EXPERTS, WIDTH, HIDDEN, "fp64"),
            'unknown expert format "fp64"; known: bf16, fp32, fp8_block, fp8_channel, int4_group32, int8_group128$',
        ),
    ],
)
def test_store_refuses_sizes_and_formats(arguments, message):
    with pytest.raises(ValueError, match=message):
        _ext.Store(*arguments)


@pytest.mark.parametrize(
    "layer, projection, number, offsets, message",
    [
        (2, 0, 0, (0, 0, 0), r"layer 2 is not in 0\.\.1"),
        (0, 3, 0, (0, 0, 0), "projection 3 is not"),
        (0, 0, 1, (0, 0, 0), "gate_proj of layer 0, expert 0: buffer 1 is not one of the 1 added"),
        (0, 0, -1, (0, 0, 0), "buffer -1 is not"),
        (
            0,
            1,
            0,
            (0, 2, -2),
            rf"up_proj of layer 0, expert 2: bytes -2 to -2 \+ {MATRIX} are not within the buffer's {MATRIX + 8}",
        ),
        (0, 1, 0, (0, 2, 10), rf"expert 2: bytes 10 to 10 \+ {MATRIX}"),
        (0, 1, 0, (0, 2, 2**63 - 1), "expert 2: bytes 9223372036854775807"),
        (1, 2, 0, (0, 1, 2), "down_proj of layer 1, expert 1: offset 1 is not aligned to 2 bytes"),
    ],
)
def test_place_checks_every_range(store, layer, projection, number, offsets, message):
    buffer(store, MATRIX + 8)
    with pytest.raises(ValueError, match=message):
        store.place(layer, projection, *where(number, *offsets))


def test_place_refuses_what_does_not_fit_the_format(store):
    number = buffer(store, MATRIX)
    store.place(0, 0, *where(number, 0, 0, 0))
    with pytest.raises(ValueError, match="gate_proj of layer 0 is already placed"):
        store.place(0, 0, *where(number, 0, 0, 0))
    with pytest.raises(ValueError, match="format bf16 has no scales"):
        store.place(0, 1, *where(number, 0, 0, 0), *where(number, 0, 0, 0))
    with pytest.raises(ValueError, match="scale_buffer and scale_offset go together"):
        store.place(0, 1, *where(number, 0, 0, 0), where(number, 0, 0, 0)[0])
    with pytest.raises(ValueError, match=r"offset has shape \[2\], expected \[3\]"):
        store.place(0, 1, np.zeros(3, np.int32), np.zeros(2, np.int64))
    with pytest.raises(ValueError, match="buffer must be int32"):
        store.place(0, 1, np.zeros(3, np.int64), np.zeros(3, np.int64))
    with pytest.raises(ValueError, match="buffer must be uint8"):
        store.add_buffer(np.zeros(3, np.int8))


def test_a_layer_must_be_complete(store):
    x, idx, gate = call()
    number = buffer(store, MATRIX)
    store.place(0, 0, *where(number, 0, 0, 0))
    with pytest.raises(ValueError, match="up_proj of layer 0 is not placed yet"):
        _ext.forward(store.id, 0, x, idx, gate, False)
    with pytest.raises(ValueError, match="up_proj of layer 0 is not placed yet"):
        store.decode(0, 0, 0)


def test_calls_check_their_arguments():
    layer = make_layer(np.random.default_rng(0), EXPERTS, WIDTH, HIDDEN)
    number = layer.store.id
    x, idx, gate = call()

    def refused(message, store=number, index=0, x=x, idx=idx, gate=gate):
        with pytest.raises(ValueError, match=message):
            _ext.forward(store, index, x, idx, gate, True)
        with pytest.raises(ValueError, match=message):
            _ext.backward(store, index, 1, x, idx, gate, x)

    refused("there is no expert store 99999", store=99999)
    refused("there is no expert store -1", store=-1)
    refused(r"layer 1 is not in 0\.\.0", index=1)
    refused(r"layer -1 is not in 0\.\.0", index=-1)
    refused("rows have 11 numbers, its experts take 12", x=np.zeros((5, 11), np.float32))
    refused(r"x has shape \[5\]", x=np.zeros(5, np.float32))
    refused("x must be uint16 .* or float32", x=np.zeros((5, WIDTH)))
    refused("x must be C-contiguous", x=np.zeros((WIDTH, 5), np.float32).T)
    refused("idx must be int32", idx=idx.astype(np.int64))
    refused(r"idx has shape \[4, 2\], expected \[5, any\]", idx=idx[:4])
    refused(r"gate has shape \[5, 1\], expected \[5, 2\]", gate=np.ascontiguousarray(gate[:, :1]))
    refused("gate must be float32", gate=gate.astype(np.float64))
    for bad in (EXPERTS, -2, 2**31 - 1):
        wrong = idx.copy()
        wrong[3, 1] = bad
        refused(rf"idx\[3, 1\] = {bad} is neither -1 \(no expert\) nor an expert in 0\.\.2", idx=wrong)
    with pytest.raises(ValueError, match=r"dy has shape \[4, 12\], expected \[5, 12\]"):
        _ext.backward(number, 0, 1, x, idx, gate, x[:4])
    with pytest.raises(ValueError, match="dy must be float32"):
        _ext.backward(number, 0, 1, x, idx, gate, bits(x, "bf16"))
    _ext.forward(number, 0, x, idx, gate, False)  # none of it left anything behind


def test_decode_gives_the_weights():
    for fmt in FORMATS:
        layer = make_layer(np.random.default_rng(1), EXPERTS, 131, 70, fmt, layers=2)
        for projection, w in enumerate([layer.gate, layer.up, layer.down]):
            np.testing.assert_array_equal(layer.store.decode(1, 2, projection), w[2])
        with pytest.raises(ValueError, match=r"expert 3 is not in 0\.\.2"):
            layer.store.decode(0, 3, 0)


@pytest.mark.parametrize("fmt, value", [("bf16", np.nan), ("bf16", -np.inf), ("fp32", np.inf), ("fp32", np.nan)])
def test_nonfinite_weights_are_found(fmt, value):
    store = _ext.Store(1, EXPERTS, WIDTH, HIDDEN, fmt)
    weights = np.random.default_rng(2).standard_normal((EXPERTS, WIDTH * HIDDEN)) * 1e30
    clean = store.add_buffer(np.frombuffer(bits(weights, fmt).tobytes(), np.uint8))
    weights[1, 0] = weights[2, -1] = value
    dirty = store.add_buffer(np.frombuffer(bits(weights, fmt).tobytes(), np.uint8))
    step = WIDTH * HIDDEN * (2 if fmt == "bf16" else 4)
    for projection, number in enumerate([clean, dirty, clean]):
        store.place(0, projection, *where(number, 0, step, 2 * step))
    assert store.nonfinite(0) == [(1, 1), (2, 1)]


def all_codes(fmt):
    """A store of one row per code, scale 1, and what it decodes to."""
    codes = np.arange(256, dtype=np.uint8).repeat(32 if fmt == "int4_group32" else 128)
    store = _ext.Store(1, 1, 64 if fmt == "int4_group32" else 128, 256, fmt)
    scale = np.ones(256, QUANTISED[fmt][3]).view(np.uint8)
    where = np.zeros(1, np.int32), np.zeros(1, np.int64)
    store.add_buffer(codes)
    number = np.full(1, store.add_buffer(np.resize(scale, 1 << 12)), np.int32)
    for projection in range(3):
        store.place(0, projection, *where, number, where[1])
    return codes, store


@pytest.mark.parametrize("fmt", QUANTISED)
def test_decode_of_every_code(fmt):
    codes, store = all_codes(fmt)
    decoded = store.decode(0, 0, 0)
    if fmt == "int4_group32":
        nibbles = np.stack([codes & 15, codes >> 4], -1).reshape(256, 64)
        np.testing.assert_array_equal(decoded, nibbles.astype(np.float32) - 8)
    else:
        kind = np.int8 if fmt == "int8_group128" else ml_dtypes.float8_e4m3fn
        np.testing.assert_array_equal(decoded, codes.view(kind).astype(np.float32).reshape(256, 128))
    assert (store.nonfinite(0) != []) == fmt.startswith("fp8")


@pytest.mark.parametrize("fmt", QUANTISED)
def test_scales_are_checked_like_weights(fmt):
    bits_, rows, cols, kind = QUANTISED[fmt]
    store = _ext.Store(1, 1, 130, 140, fmt)  # gate_proj has 140 rows and 130 columns
    weights = 140 * (68 if bits_ == 4 else 130)  # 130 nibbles end at a whole int32
    scales = -(-140 // rows) * (-(-130 // cols) if cols else 1) * np.dtype(kind).itemsize
    store.add_buffer(np.zeros(weights, np.uint8))
    store.add_buffer(np.zeros(scales, np.uint8))
    store.add_buffer(np.zeros(scales + 1, np.uint8))
    store.add_buffer(np.zeros(weights - 1, np.uint8))

    def place(buffer, scale_buffer, scale_offset):
        one = [
            np.array([n], t)
            for n, t in ((buffer, np.int32), (0, np.int64), (scale_buffer, np.int32), (scale_offset, np.int64))
        ]
        store.place(0, 0, *one)

    with pytest.raises(ValueError, match=f"format {fmt} needs scales"):
        store.place(0, 0, np.zeros(1, np.int32), np.zeros(1, np.int64))
    with pytest.raises(ValueError, match=rf"scales: bytes 2 to 2 \+ {scales} are not within"):
        place(0, 1, 2)
    with pytest.raises(ValueError, match="scales: buffer 4 is not one of the 4 added"):
        place(0, 4, 0)
    with pytest.raises(ValueError, match=r"scales: offset 1 is not aligned to [24] bytes"):
        place(0, 2, 1)
    with pytest.raises(
        ValueError, match=rf"expert 0: bytes 0 to 0 \+ {weights} are not within the buffer's {weights - 1}"
    ):
        place(3, 1, 0)
    place(0, 1, 0)


def test_closed_store_is_refused_by_its_number():
    layer = make_layer(np.random.default_rng(3), EXPERTS, WIDTH, HIDDEN)
    number, (x, idx, gate) = layer.store.id, call()
    layer.store.close()
    layer.store.close()
    assert layer.store.id == -1
    for use in (
        lambda: _ext.forward(number, 0, x, idx, gate, True),
        lambda: _ext.backward(number, 0, 1, x, idx, gate, x),
        lambda: layer.store.decode(0, 0, 0),
        lambda: layer.store.stats(),
        lambda: layer.store.add_buffer(np.zeros(1, np.uint8)),
    ):
        with pytest.raises(ValueError, match=f"expert store {number} is closed"):
            use()


class Bytes(np.ndarray):
    """An array whose end can be watched."""


def test_buffers_live_as_long_as_the_store():
    store = _ext.Store(1, 1, 4, 4, "bf16")
    array = np.zeros(32, np.uint8).view(Bytes)
    seen = weakref.ref(array)
    number = store.add_buffer(array)
    for projection in range(3):
        store.place(0, projection, np.array([number], np.int32), np.zeros(1, np.int64))
    del array
    gc.collect()
    assert seen() is not None
    store.close()
    gc.collect()
    assert seen() is None


def test_close_under_calls_in_flight():
    """Calls hold the store: closing it while they run neither crashes nor blocks."""
    rng = np.random.default_rng(4)
    layer = make_layer(rng, EXPERTS, 96, 128)
    number = layer.store.id
    x = bits(rng.standard_normal((300, 96)), "bf16")
    idx, gate = route(rng, 300, EXPERTS, 2)
    errors = []

    def use():
        try:
            while True:
                _ext.forward(number, 0, x, idx, gate, True)
        except ValueError as error:
            errors.append(str(error))

    workers = [threading.Thread(target=use) for _ in range(3)]
    for worker in workers:
        worker.start()
    while not layer.store.stats()["forward"]:
        time.sleep(0.001)
    layer.store.close()
    for worker in workers:
        worker.join(60)
    assert errors == [f"expert store {number} is closed"] * 3
    assert _ext.stash_stats()["entries"] == 0


def test_stats_count_calls_tokens_and_time():
    layer = make_layer(np.random.default_rng(5), EXPERTS, WIDTH, HIDDEN)
    x, idx, gate = call()
    idx[2] = -1
    _, slip = _ext.forward(layer.store.id, 0, x, idx, gate, True)
    _ext.backward(layer.store.id, 0, slip, x, idx, gate, x)
    _ext.backward(layer.store.id, 0, slip, x, idx, gate, x)
    stats = layer.store.stats()
    assert (stats["forward"], stats["backward"], stats["recomputed"], stats["tokens"], stats["routes"]) == (
        1,
        2,
        1,
        4,
        8,
    )
    assert stats["forward_seconds"] > 0 and stats["backward_seconds"] > 0
    layer.store.reset_stats()
    assert not any(layer.store.stats().values())


def test_slips_are_new_and_never_zero():
    layer = make_layer(np.random.default_rng(6), EXPERTS, WIDTH, HIDDEN)
    slips = [_ext.forward(layer.store.id, 0, *call(), True)[1] for _ in range(50)]
    assert len(set(slips)) == 50 and 0 not in slips
    assert _ext.forward(layer.store.id, 0, *call(), False)[1] == 0


def test_entry_is_taken_once_and_only_by_its_own_call():
    rng = np.random.default_rng(7)
    layer, other = (make_layer(rng, EXPERTS, WIDTH, HIDDEN, layers=2) for _ in range(2))
    x, idx, gate = call()
    _, slip = _ext.forward(layer.store.id, 1, x, idx, gate, True)
    swapped = np.ascontiguousarray(idx[:, ::-1])

    def backward(layer, index=1, slip=slip, x=x, idx=idx, gate=gate):
        before = _ext.stash_stats()["hits"]
        dx, dgate, _ = _ext.backward(layer.store.id, index, slip, x, idx, gate, x)
        _, exact, exact_gate = oracle(layer, values(x), idx, gate, values(x))
        assert (
            relative_l2(dx, exact) < 0.03 and relative_l2(dgate, exact_gate) < 0.03
        )  # bf16 of a few terms: 2^-8 times a few
        return _ext.stash_stats()["hits"] - before

    assert _ext.stash_stats()["entries"] == 1 and _ext.stash_stats()["bytes"] >= 2 * 2 * 10 * HIDDEN
    assert not backward(other)
    assert not backward(layer, index=0)
    assert not backward(layer, slip=slip + 1)
    assert not backward(layer, slip=0)
    assert not backward(layer, idx=swapped)
    assert not backward(layer, x=x[:4], idx=idx[:4], gate=gate[:4])
    assert backward(layer)
    assert _ext.stash_stats()["entries"] == 0 and _ext.stash_stats()["bytes"] == 0
    assert not backward(layer)


def test_backward_reads_the_stash_not_x():
    """A hit needs only idx, gate and dy; were g and u computed again, this other x would show."""
    layer = make_layer(np.random.default_rng(8), EXPERTS, WIDTH, HIDDEN)
    x, idx, gate = call()
    dy = call(seed=1)[0]
    slips = [_ext.forward(layer.store.id, 0, x, idx, gate, True)[1] for _ in range(2)]
    kept = _ext.backward(layer.store.id, 0, slips[0], x, idx, gate, dy)
    other = _ext.backward(layer.store.id, 0, slips[1], x * 3, idx, gate, dy)
    for a, b in zip(kept, other, strict=True):
        np.testing.assert_array_equal(a, b)


def test_budget_evicts_the_oldest():
    layer = make_layer(np.random.default_rng(9), EXPERTS, WIDTH, HIDDEN)
    number, args = layer.store.id, call()
    before = _ext.stash_stats()
    _ext.forward(number, 0, *args, True)
    one = _ext.stash_stats()["bytes"]
    _ext.stash_clear(number)
    _ext.stash_budget(3 * one + 1)
    slips = [_ext.forward(number, 0, *args, True)[1] for _ in range(5)]
    stats = _ext.stash_stats()
    assert stats["entries"] == 3 and stats["bytes"] <= 3 * one + 1 and stats["evicted"] - before["evicted"] == 2
    for slip, hit in zip(slips, [0, 0, 1, 1, 1], strict=True):
        hits = _ext.stash_stats()["hits"]
        _ext.backward(number, 0, slip, *args, args[0])
        assert _ext.stash_stats()["hits"] - hits == hit
    _ext.forward(number, 0, *args, True)
    assert _ext.stash_budget(0) == 0 and _ext.stash_stats()["entries"] == 0
    assert _ext.forward(number, 0, *args, True)[1] != 0 and _ext.stash_stats()["entries"] == 0
    with pytest.raises(ValueError, match="stash budget -1 is negative"):
        _ext.stash_budget(-1)


def test_closing_a_store_empties_its_part_of_the_stash():
    rng = np.random.default_rng(10)
    one, two = (make_layer(rng, EXPERTS, WIDTH, HIDDEN) for _ in range(2))
    for layer in (one, two, one):
        _ext.forward(layer.store.id, 0, *call(), True)
    assert _ext.stash_stats()["entries"] == 3
    one.store.close()
    assert _ext.stash_stats()["entries"] == 1
    _ext.stash_clear(two.store.id)
    assert _ext.stash_stats()["entries"] == 0 and _ext.stash_stats()["bytes"] == 0
