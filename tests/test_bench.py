"""The bench of the experts: its oracle against finite differences, its judge against wrong results, and a run of it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCH = Path(__file__).parents[1] / "experiments" / "bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import cases
    import oracle

    yield cases, oracle
    for name in ("cases", "oracle"):
        sys.modules.pop(name)


def expert(rng, d=7, f=5, rank=2):
    """Weights and adapters of one expert in float64."""
    sides = [(f, d), (f, d), (d, f)]
    weights = [rng.standard_normal(side) for side in sides]
    return weights, [(rng.standard_normal((rank, i)), rng.standard_normal((o, rank)), 0.7) for o, i in sides]


def test_the_oracle_agrees_with_finite_differences(bench):
    _, oracle = bench
    rng = np.random.default_rng(0)
    weights, adapters = expert(rng)
    x, dy, gate = rng.standard_normal((3, 7)), rng.standard_normal((3, 7)), rng.random((3, 1))
    loss = lambda: (oracle.one_expert(weights, adapters, x, dy, gate)[0] * dy).sum()  # noqa: E731
    _, dx, dgate, factors = oracle.one_expert(weights, adapters, x, dy, gate)
    inputs = [x, gate, *(factor for a, b, _ in adapters for factor in (a, b))]
    for array, gradient in zip(inputs, [dx, dgate[:, None], *factors], strict=True):
        found, step = np.zeros_like(array), 1e-6
        for i in np.ndindex(*array.shape):
            kept = array[i]
            array[i] = kept + step
            more = loss()
            array[i] = kept - step
            found[i], array[i] = (more - loss()) / (2 * step), kept
        np.testing.assert_allclose(gradient, found, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("wrong", [None, "y", "dgate", "dB of up"])
def test_the_judge_tells_wrong_results(bench, wrong):
    cases, oracle = bench
    rng = np.random.default_rng(1)
    shape = cases.Shape(7, 5, 3, 2)
    made = [expert(rng) for _ in range(shape.experts)]
    batch = cases.checked_batch(shape, 12)
    judge = oracle.Judge(lambda e: made[e][0], lambda e: made[e][1])
    y, dx, dgate = np.zeros((12, 7)), np.zeros((12, 7)), np.zeros((12, 2))
    gradients = [np.zeros((3, *factor.shape)) for a, b, _ in made[0][1] for factor in (a, b)]
    for n, k in np.ndindex(12, 2):
        e = batch.idx[n, k]
        rows = (cases.wide(a[n : n + 1]) for a in (batch.x, batch.dy))
        one = oracle.one_expert(*made[e], *rows, batch.gate[n : n + 1, k : k + 1])
        y[n], dx[n], dgate[n, k] = y[n] + one[0][0], dx[n] + one[1][0], one[2][0]
        for total, gradient in zip(gradients, one[3], strict=True):
            total[e] += gradient
    named = {"y": y, "dgate": dgate, "dB of up": gradients[3]}
    if wrong is None:
        errors = judge.errors(batch, (y, dx, dgate, gradients))
        assert {"y", "dx", "dgate", "dA of down"} <= errors.keys() and max(errors.values()) < 1e-6
        return
    named[wrong] *= 1.1
    with pytest.raises(SystemExit, match=f"wrong result: .* of {wrong}"):
        judge.errors(batch, (y, dx, dgate, gradients))


@pytest.mark.parametrize("fmt", ["bf16", "fp32", "fp8_block", "fp8_channel", "int4_group32", "int8_group128"])
def test_the_bench_decodes_as_the_store_does(bench, fmt):
    cases, _ = bench
    store, _, weights = cases.make_store(cases.Shape(160, 96, 2, 1), fmt)
    for projection, exact in enumerate(weights(1)):
        mine = exact if fmt == "fp32" else cases.wide(cases.bf16(exact))
        np.testing.assert_array_equal(mine, store.decode(0, 1, projection))


@pytest.mark.parametrize("either", [False, True])
def test_the_judge_takes_the_nearer_meaning_of_weights(bench, either):
    cases, oracle = bench
    shape = cases.Shape(96, 64, 2, 1)
    _, _, weights = cases.make_store(shape, "int4_group32")
    batch = cases.checked_batch(shape, 3)
    rows, gate = cases.wide(batch.x), batch.gate.astype(np.float64)
    rounded = [cases.wide(cases.bf16(w)) for w in weights(int(batch.idx[0, 0]))]
    y = oracle.one_expert(rounded, None, rows, rows, gate)[0]
    ratio = oracle.Judge(weights, either=either).errors(batch, (y,))["y / rounding"]
    assert ratio < 1e-6 if either else ratio > 0.5


def test_a_run_with_adapters(tmp_path):
    if not shutil.which("c++") or os.uname().machine != "x86_64":
        pytest.skip("the bench compiles a probe for x86-64")
    settings = "--shapes small --tokens 9 --seconds 0.1 --lora 8 --bar --out".split()
    command = [sys.executable, BENCH / "experts.py", *settings, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "experts.json").read_text())["rows"]
    assert {(row["lora"], row["pass"]) for row in rows} == {
        (f"8, {home}", passed) for home in ("operands", "host") for passed in ("forward", "forward+backward")}
    for row in rows:
        ratios = [value for name, value in row["errors"].items() if name.endswith("rounding")]
        assert len(ratios) == (1 if row["pass"] == "forward" else 9) and max(ratios) <= 2 and "cost" in row
    assert "LoRA 8, host" in (tmp_path / "experts.md").read_text()
