"""Every instruction set here against float64: shapes, routings, formats; bits that no thread or other call changes."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from ext_oracle import FORMATS, bits, make_layer, oracle, relative_l2, round_bf16, route, values

from kjax import _ext

EXT = Path(__file__).parents[1] / "ext"
ISAS = [name for name, why_not in _ext.isa()["available"].items() if not why_not]


@pytest.fixture(params=ISAS)
def isa(request):
    _ext.force_isa(request.param)
    yield request.param
    _ext.force_isa(None)


def run(layer, x, idx, gate, dy, keep=True):
    """(y, dx, dgate) as the kernels return them."""
    y, slip = _ext.forward(layer.store.id, 0, x, idx, gate, keep)
    return y, *_ext.backward(layer.store.id, 0, slip, x, idx, gate, dy)[:2]


def check(layer, fmt, x, idx, gate, dy, keep=True):
    """
    Kernels sum in fp32: n terms may lose n eps of the sum of magnitudes, in random order about sqrt(n); 40 eps covers
    the sizes here and their two chained sums. In bf16 the rounding of operands dominates: the same roundings in float64
    tell how much, and twice that is allowed; one value that falls on the other side of a rounding boundary (2^-8 of
    itself) matters only where few are summed. Weights may be left unrounded (kernels.h), which float64 can do as well.
    """
    got = [values(a) for a in run(layer, x, idx, gate, dy, keep)]
    narrow = fmt != "fp32"
    rounding = round_bf16 if narrow else lambda a: a
    exact, rounded = both(layer, x, idx, gate, dy, rounding)
    scaled, scaled_rounded = both(layer.unrounded(), x, idx, gate, dy, rounding) if layer.exact else (exact, rounded)
    for name, a, b, r, s, t in zip(["y", "dx", "dgate"], got, exact, rounded, scaled, scaled_rounded, strict=True):
        allowed = 40 * 2.0**-24
        if narrow:
            allowed += 2.0**-8 / max(1, np.sqrt(layer.gate.shape[1] / 8)) + relative_l2(s, b)
            allowed += 2 * max(relative_l2(r, b), relative_l2(t, s))
        if x.dtype == np.uint16 and name != "dgate":
            allowed += 2.0**-8  # the output itself is rounded to bf16
        assert relative_l2(a, b) <= allowed, name


def both(layer, x, idx, gate, dy, rounding):
    """(exact, rounded) results of float64."""
    return [oracle(layer, values(x), idx, gate, values(dy), f) for f in (lambda a: a, rounding)]


def problem(rng, tokens, width, idx, gate, dtype):
    x, dy = (bits(rng.standard_normal((tokens, width)), dtype) for _ in range(2))
    return x, idx, gate, dy


# tokens, D, F, E, K: one of everything, odd everywhere, one past a vector, a tile, a panel, a block of the reduction
SHAPES = [
    (1, 1, 3, 1, 1), (1, 64, 64, 2, 1), (3, 5, 7, 4, 2), (7, 33, 65, 3, 3), (17, 129, 31, 5, 2), (40, 100, 257, 4, 3),
    (130, 70, 67, 2, 2), (9, 300, 1030, 3, 2), (110, 2051, 40, 2, 2), (5, 40, 2060, 2, 1),
]  # fmt: skip


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("fmt", ["bf16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_against_float64(isa, fmt, dtype, shape):
    tokens, width, hidden, experts, per_token = shape
    rng = np.random.default_rng(sum(shape))
    layer = make_layer(rng, experts, width, hidden, fmt)
    idx, gate = route(rng, tokens, experts, per_token)
    check(layer, fmt, *problem(rng, tokens, width, idx, gate, dtype))


@pytest.mark.parametrize("tokens", [8, 32, 64])  # about 3, 13 and 26 rows for an expert: kernels of their own
@pytest.mark.parametrize("fmt", FORMATS)
def test_accuracy_is_that_of_the_operands(isa, fmt, tokens):
    """At a size where luck averages out: y, dx and dgate within twice the error of rounding the operands alone."""
    rng = np.random.default_rng(0)
    layer = make_layer(rng, 4, 256, 192, fmt)
    idx, gate = route(rng, tokens, 4, 2)
    x, idx, gate, dy = problem(rng, tokens, 256, idx, gate, "fp32")
    exact, rounded = both(layer, x, idx, gate, dy, round_bf16)
    for a, b, r in zip(run(layer, x, idx, gate, dy), exact, rounded, strict=True):
        assert relative_l2(a, b) <= (16 * 2.0**-24 if fmt == "fp32" else 2 * relative_l2(r, b))


@pytest.mark.parametrize("fmt", FORMATS[2:])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 3, 1, 1),
        (7, 33, 129, 3, 3),
        (17, 260, 31, 5, 2),
        (100, 135, 257, 2, 2),
        (5, 40, 2060, 2, 1),
        (40, 2300, 130, 1, 1),
    ],
    ids=lambda s: "x".join(map(str, s)),
)
def test_quantised_against_float64(isa, fmt, shape):
    """Partial blocks and groups at every end."""
    tokens, width, hidden, experts, per_token = shape
    rng = np.random.default_rng(sum(shape))
    layer = make_layer(rng, experts, width, hidden, fmt)
    idx, gate = route(rng, tokens, experts, per_token)
    check(layer, fmt, *problem(rng, tokens, width, idx, gate, "bf16"))


@pytest.mark.parametrize("fmt", ["bf16", "fp32"])
def test_all_tokens_to_one_expert(isa, fmt):
    """More rows than one product takes: the expert is multiplied in several segments."""
    rng = np.random.default_rng(1)
    layer = make_layer(rng, 3, 24, 40, fmt)
    idx = np.full((1100, 1), 1, np.int32)
    check(layer, fmt, *problem(rng, 1100, 24, idx, rng.random((1100, 1)).astype(np.float32), "fp32"))


@pytest.mark.parametrize("fmt", ["bf16", "int4_group32"])
@pytest.mark.parametrize("rows", [1, 2, 6, 7, 8, 9, 12, 13, 16, 17, 20, 21, 31, 32, 40, 41, 64, 95, 96, 97, 98])
def test_every_remainder_of_rows(isa, rows, fmt):
    rng = np.random.default_rng(rows)
    layer = make_layer(rng, 1, 70, 72, fmt)
    check(layer, fmt, *problem(rng, rows, 70, np.zeros((rows, 1), np.int32), np.ones((rows, 1), np.float32), "fp32"))


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("per_token", [0, 2])
def test_nothing_routed_is_zero(isa, tokens, per_token):
    rng = np.random.default_rng(2)
    layer = make_layer(rng, 2, 12, 8)
    idx = np.full((tokens, per_token), -1, np.int32)
    for out in run(layer, *problem(rng, tokens, 12, idx, np.ones(idx.shape, np.float32), "bf16")):
        assert not out.any() and out.shape[0] == tokens


def test_one_token_twice_to_one_expert(isa):
    rng = np.random.default_rng(3)
    layer = make_layer(rng, 2, 16, 16, "fp32")
    idx = np.array([[1, 1]], np.int32)
    check(layer, "fp32", *problem(rng, 1, 16, idx, np.array([[0.25, 0.5]], np.float32), "fp32"))


def test_nan_stays_in_its_row(isa):
    """A NaN in one token or one weight reaches no output that does not depend on it."""
    rng = np.random.default_rng(4)
    layer = make_layer(rng, 3, 70, 50)
    idx, gate = route(rng, 20, 3, 2, holes=0)
    x, idx, gate, dy = problem(rng, 20, 70, idx, gate, "fp32")
    x[4, 69] = np.nan
    for out in run(layer, x, idx, gate, dy):
        assert np.isnan(out[4]).any()
        assert np.isfinite(np.delete(out, 4, axis=0)).all()


def test_bf16_rounds_to_nearest_even_and_keeps_nan(isa):
    """x W with W the identity in gate and up and down: the output shows how numbers were rounded."""
    rng = np.random.default_rng(5)
    layer = make_layer(rng, 1, 32, 32, "fp32")
    x = bits(rng.standard_normal((8, 32)), "bf16")
    y, _ = _ext.forward(layer.store.id, 0, x, np.zeros((8, 1), np.int32), np.ones((8, 1), np.float32), False)
    wide, _ = _ext.forward(
        layer.store.id, 0, values(x).astype(np.float32), np.zeros((8, 1), np.int32), np.ones((8, 1), np.float32), False
    )
    np.testing.assert_array_equal(y, bits(wide, "bf16"))
    x[2, 3] = 0x7FC1
    y, _ = _ext.forward(layer.store.id, 0, x, np.zeros((8, 1), np.int32), np.ones((8, 1), np.float32), False)
    assert np.isnan(values(y)[2]).all()


def test_tile_model_has_the_bits_of_the_instructions():
    if "amx" not in ISAS:
        pytest.skip("this CPU has no AMX, or the system does not grant it")
    rng = np.random.default_rng(9)
    layer = make_layer(rng, 2, 300, 130)
    idx, gate = route(rng, 90, 2, 1)
    args = problem(rng, 90, 300, idx, gate, "bf16")
    args[0][3] = bits(np.float32(1e-39) * np.arange(300), "bf16")  # denormals count as zero
    args[0][4] = bits(np.float32(2e-38) * np.arange(300), "bf16")  # and so do denormal sums
    results = []
    for name in ("amx", "amx_soft"):
        _ext.force_isa(name)
        results.append(run(layer, *args))
    _ext.force_isa(None)
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


def fingerprint():
    """Bits of results over shapes with several strips, segments and experts, for all ISAs."""
    rng = np.random.default_rng(6)
    out = []
    for fmt, dtype in [("bf16", "bf16"), ("fp32", "fp32"), ("int4_group32", "bf16")]:
        layer = make_layer(rng, 6, 300, 530, fmt)
        idx, gate = route(rng, 90, 6, 3)
        idx[:60, 0] = 2
        args = problem(rng, 90, 300, idx, gate, dtype)
        for name in ISAS:
            _ext.force_isa(name)
            out += [a.tobytes() for a in run(layer, *args)]
        _ext.force_isa(None)
    return hashlib.sha256(b"".join(out)).hexdigest()


def test_bits_do_not_depend_on_threads():
    code = "import test_ext_kernels as t; print(t.fingerprint())"
    prints = {
        threads: subprocess.run(
            [sys.executable, "-c", code], cwd=Path(__file__).parent, env={**os.environ, "KJAX_THREADS": str(threads)},
            capture_output=True, text=True, check=True,
        ).stdout
        for threads in (1, 2, 3, 5)
    }  # fmt: skip
    assert len(set(prints.values())) == 1 and len(prints[1].strip()) == 64


def test_bits_do_not_depend_on_concurrent_calls():
    rng = np.random.default_rng(7)
    layer = make_layer(rng, 5, 150, 90)
    problems = []
    for tokens in (1, 30, 75, 200):
        idx, gate = route(rng, tokens, 5, 2)
        problems.append(problem(rng, tokens, 150, idx, gate, "bf16"))
    alone = [run(layer, *p) for p in problems]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda i: run(layer, *problems[i % 4]), range(48)))
    for i, results in enumerate(together):
        for a, b in zip(results, alone[i % 4], strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_miss_gives_the_bits_of_a_hit(isa):
    rng = np.random.default_rng(8)
    layer = make_layer(rng, 4, 90, 200)
    idx, gate = route(rng, 150, 4, 2)
    args = problem(rng, 150, 90, idx, gate, "bf16")
    before = _ext.stash_stats()
    for kept, recomputed in zip(run(layer, *args), run(layer, *args, keep=False), strict=True):
        np.testing.assert_array_equal(kept, recomputed)
    after = _ext.stash_stats()
    assert after["hits"] - before["hits"] == 1 and after["misses"] - before["misses"] == 1
    assert layer.store.stats()["recomputed"] == 1


def test_kernel_files_share_no_code(tmp_path):
    """At -O0 nothing is inlined, so a function that one ISA could take from another file would be exported."""
    compiler = shutil.which("c++")
    if not compiler or not shutil.which("nm") or os.uname().machine != "x86_64":
        pytest.skip("needs a compiler and nm on x86-64")
    flags = dict(re.findall(r'kjax_kernel\((\w+\.cpp) "([^"]*)"\)', (EXT / "CMakeLists.txt").read_text()))
    assert set(flags) | {"gemm_scalar.cpp"} == {p.name for p in EXT.glob("gemm_*.cpp")}
    for source in EXT.glob("gemm_*.cpp"):
        target = tmp_path / (source.stem + ".o")
        own = flags[source.name].split(";") if source.name in flags else []
        always = ["-std=c++20", "-O0", "-w", "-fno-exceptions"]
        subprocess.run([compiler, *always, *own, "-c", source, "-o", target], check=True)
        listed = subprocess.run(
            ["nm", "-C", "--defined-only", target], capture_output=True, text=True, check=True
        ).stdout
        exported = [line.split(maxsplit=2)[1:] for line in listed.splitlines() if line.split()[1] not in "trdb"]
        assert exported and all(re.fullmatch(r"kjax::k\w+(Kernels|Gemm)", name) for _, name in exported), (
            source.name,
            exported,
        )


@pytest.mark.parametrize("fmt", ["fp8_block", "fp8_channel", "int8_group128", "int4_group32"])
def test_every_code_is_exact(isa, fmt):
    """Column 0 of W_down holds every code, subnormals included; h and dy are powers of two, so nothing else rounds."""
    rows, cols = 256, 128
    codes = np.zeros((rows, cols), np.uint8)
    codes[:, 0] = np.arange(rows) & (15 if fmt == "int4_group32" else 255)
    if fmt.startswith("fp8"):
        codes[codes[:, 0] & 127 == 127, 0] = 0
        one, numbers = 0x38, codes[:, 0].view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    elif fmt == "int8_group128":
        one, numbers = 1, codes[:, 0].view(np.int8).astype(np.float64)
    else:
        one, numbers = 9, codes[:, 0].astype(np.float64) - 8
    zero = 8 if fmt == "int4_group32" else 0
    codes[:, 1:] = zero
    gate = np.full((cols, rows), zero, np.uint8)
    gate[0, 0] = one  # g[0] = u[0] = x[0] = 32, and silu(32) is 32
    store = _ext.Store(1, 1, rows, cols, fmt)
    for projection, stored in enumerate([gate, gate, codes]):
        if fmt == "int4_group32":
            stored = stored[:, ::2] | stored[:, 1::2] << 4
        scales = np.ones(rows * cols, np.float32 if fmt.startswith("fp8") else ml_dtypes.bfloat16)
        buffers = [store.add_buffer(np.frombuffer(a.tobytes(), np.uint8)) for a in (stored, scales)]
        store.place(0, projection, np.full(1, buffers[0], np.int32), np.zeros(1, np.int64),
                    np.full(1, buffers[1], np.int32), np.zeros(1, np.int64))  # fmt: skip
    for tokens in (1, 20, rows):
        x, dy = np.zeros((tokens, rows), np.float32), np.eye(tokens, rows, dtype=np.float32)
        x[:, 0] = 32
        idx, ones = np.zeros((tokens, 1), np.int32), np.ones((tokens, 1), np.float32)
        y, slip = _ext.forward(store.id, 0, x, idx, ones, True)
        _, dgate, _ = _ext.backward(store.id, 0, slip, x, idx, ones, dy)
        np.testing.assert_array_equal(y, np.tile(1024 * numbers, (tokens, 1)))
        np.testing.assert_array_equal(dgate[:, 0], 1024 * numbers[:tokens])
