"""
How close the host experts come to the machine's limit, beside peers, in one run.

    python experiments/bench/experts.py                           # both shapes, bf16
    python experiments/bench/experts.py --formats bf16,fp8_block,int4_group32,int8_group128 --isa avx512bf16
    python experiments/bench/experts.py --shapes v2-lite --tokens 16,512 --peers transformers

limit = max(operations / arithmetic peak, bytes of the touched experts / read bandwidth); share = limit / time. Both
peaks are measured with the same threads right before and after every sample; of the samples, the quietest decide.
Every case is compared with float64 on the decoded weights before it is timed. Writes experts.json, experts.md and a
roofline, experts.png.
"""

import argparse
import json
import mmap
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import peers
from peaks import Probe, Sample, machine, sample

from kjax import _ext

QUIET = 0.08  # share of noise below which a sample counts as quiet


@dataclass(frozen=True)
class Shape:
    width: int
    hidden: int
    experts: int
    per_token: int


SHAPES = {"v2-lite": Shape(2048, 1408, 64, 6), "v3": Shape(7168, 2048, 32, 8), "small": Shape(512, 384, 16, 4)}
# bits of a weight; weights that share a scale, as rows and columns (0: the whole row); bytes of a scale
FORMATS = {
    "bf16": (16, None, 0),
    "fp32": (32, None, 0),
    "fp8_block": (8, (128, 128), 4),
    "fp8_channel": (8, (1, 0), 4),
    "int4_group32": (4, (1, 32), 2),
    "int8_group128": (8, (1, 128), 2),
}


def huge(size):
    """Zeroed bytes that may lie on huge pages."""
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def make_store(shape: Shape, fmt: str, rng):
    """A store of one layer of random weights, and the bytes of one expert."""
    bits, block, scale_bytes = FORMATS[fmt]
    store = _ext.Store(1, shape.experts, shape.width, shape.hidden, fmt)
    one_expert = 0
    for projection, (rows, cols) in enumerate(
        [(shape.hidden, shape.width), (shape.hidden, shape.width), (shape.width, shape.hidden)]
    ):
        size = rows * cols * bits // 8
        memory = huge(size * shape.experts)
        pattern = rng.integers(0, 256, 1 << 22, dtype=np.uint8)
        if fmt == "bf16":
            pattern = (rng.standard_normal(1 << 21, dtype=np.float32) / np.float32(np.sqrt(cols))).view(np.uint32) >> 16
            pattern = pattern.astype(np.uint16).view(np.uint8)
        elif fmt == "fp32":
            pattern = (rng.standard_normal(1 << 20, dtype=np.float32) / np.float32(np.sqrt(cols))).view(np.uint8)
        elif fmt.startswith("fp8"):
            pattern[pattern & 127 == 127] ^= 1
        for begin in range(0, memory.size, pattern.size):
            memory[begin : begin + pattern.size] = pattern[: memory.size - begin]
        at = np.arange(shape.experts, dtype=np.int64)
        where = [np.full(shape.experts, store.add_buffer(memory), np.int32), at * size]
        one_expert += size
        if block:
            count = -(-rows // block[0]) * (-(-cols // block[1]) if block[1] else 1)
            spread = {"fp8": 200, "int4": 5, "int8": 70}[fmt.split("_")[0]] * np.sqrt(cols)
            scales = ((0.5 + rng.random(count * shape.experts, dtype=np.float32)) / np.float32(spread)).astype(
                np.float32
            )
            raw = (
                scales.view(np.uint8)
                if scale_bytes == 4
                else (scales.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
            )
            where += [np.full(shape.experts, store.add_buffer(raw), np.int32), at * count * scale_bytes]
            one_expert += count * scale_bytes
        store.place(0, projection, *where)
    return store, one_expert


@dataclass
class Batch:
    x: np.ndarray  # bf16 bits [N, D]
    dy: np.ndarray
    idx: np.ndarray
    gate: np.ndarray


def bf16(a):
    return ((a.astype(np.float32).view(np.uint32) + 0x8000) >> 16).astype(np.uint16)


def wide(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def make_batch(shape: Shape, tokens: int, rng) -> Batch:
    idx = rng.random((tokens, shape.experts)).argsort(1)[:, : shape.per_token].astype(np.int32)
    gate = rng.random((tokens, shape.per_token), dtype=np.float32)
    x, dy = (bf16(rng.standard_normal((tokens, shape.width))) for _ in range(2))
    return Batch(x, dy, idx, gate / gate.sum(1, keepdims=True))


def forward(store, b: Batch):
    return _ext.forward(store.id, 0, b.x, b.idx, b.gate, False)[0]


def forward_backward(store, b: Batch):
    y, slip = _ext.forward(store.id, 0, b.x, b.idx, b.gate, True)
    return y, *_ext.backward(store.id, 0, slip, b.x, b.idx, b.gate, b.dy)


def check(store, b: Batch) -> float:
    """Largest relative L2 error of y, dx and dgate of two tokens against float64; more than 2 % is a wrong kernel."""
    errors = []
    got = forward_backward(store, b)
    for t in range(min(2, len(b.x))):
        x, dy = wide(b.x[t]), wide(b.dy[t])
        y, dx, dgate = np.zeros_like(x), np.zeros_like(x), np.zeros(b.gate.shape[1])
        for k, e in enumerate(b.idx[t]):
            gate_w, up_w, down_w = (store.decode(0, int(e), p).astype(np.float64) for p in range(3))
            g, u, a = gate_w @ x, up_w @ x, down_w.T @ dy
            s = 1 / (1 + np.exp(-g))
            y += b.gate[t, k] * (down_w @ (g * s * u))
            dgate[k] = a @ (g * s * u)
            dx += b.gate[t, k] * ((a * u * (s + g * s * (1 - s))) @ gate_w + (a * g * s) @ up_w)
        for a, exact in zip((wide(got[0][t]), wide(got[1][t]), got[2][t]), (y, dx, dgate), strict=True):
            errors.append(float(np.linalg.norm(a - exact) / np.linalg.norm(exact)))
    if not max(errors) < 0.02:
        sys.exit(f"wrong result: relative error {max(errors):.3g}")
    return max(errors)


def measure(probe: Probe, isa: str, call, flops: float, size: float, seconds: float) -> dict:
    """Median of the quiet samples (at least three, the quietest if there are fewer)."""
    samples: list[Sample] = []
    begin = time.perf_counter()
    while len(samples) < 3 or (sum(s.noise < QUIET for s in samples) < 5 and time.perf_counter() - begin < seconds):
        samples.append(sample(probe, isa, call))
    samples.sort(key=lambda s: s.noise)
    kept = samples[: max(3, sum(s.noise < QUIET for s in samples))]
    limits = [max(flops / s.arithmetic, size / s.bandwidth) for s in kept]
    return {
        "milliseconds": 1e3 * statistics.median(s.seconds for s in kept),
        "share": statistics.median(limit / s.seconds for limit, s in zip(limits, kept, strict=True)),
        "bound": "memory" if size / kept[0].bandwidth > flops / kept[0].arithmetic else "arithmetic",
        "gflops": statistics.median(flops / s.seconds for s in kept) * 1e-9,
        "peak_gflops": statistics.median(s.arithmetic for s in kept) * 1e-9,
        "bandwidth_gbs": statistics.median(s.bandwidth for s in kept) * 1e-9,
        "quiet": sum(s.noise < QUIET for s in samples),
        "samples": len(samples),
    }


def table(rows: list[dict]) -> str:
    columns = {
        "who": "{who}", "shape": "{shape}", "format": "{format}", "tokens": "{tokens}", "pass": "{pass}",
        "ms": "{milliseconds:.2f}", "share of limit": "{share:.2f}", "bound": "{bound}", "GFLOP/s": "{gflops:.0f}",
        "quiet": "{quiet}/{samples}",
    }  # fmt: skip
    lines = [columns, ["---"] * len(columns), *([cell.format(**row) for cell in columns.values()] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def roofline(rows: list[dict], path: Path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    peak = statistics.median(r["peak_gflops"] for r in rows)
    bandwidth = statistics.median(r["bandwidth_gbs"] for r in rows)
    intensity = np.geomspace(
        min(r["flops"] / r["bytes"] for r in rows) / 2, max(r["flops"] / r["bytes"] for r in rows) * 2, 200
    )
    figure, axes = plt.subplots(figsize=(7, 5))
    axes.loglog(
        intensity,
        np.minimum(peak, intensity * bandwidth),
        color="black",
        label=f"{peak:.0f} GFLOP/s, {bandwidth:.0f} GB/s",
    )
    for who in dict.fromkeys((r["who"], r["format"], r["pass"]) for r in rows):
        mine = [r for r in rows if (r["who"], r["format"], r["pass"]) == who]
        axes.plot(
            [r["flops"] / r["bytes"] for r in mine],
            [r["gflops"] for r in mine],
            "o-",
            markersize=4,
            linewidth=0.7,
            label=" ".join(who),
        )
    axes.set(xlabel="operations per byte of weights", ylabel="GFLOP/s")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="v2-lite,v3")
    parser.add_argument("--formats", default="bf16")
    parser.add_argument("--tokens", default="1,16,128,512,2048")
    parser.add_argument("--isa", default=None, help="kernels and arithmetic peak to use; default: what kjax chooses")
    parser.add_argument("--peers", default="", help="comma-separated: transformers")
    parser.add_argument("--seconds", type=float, default=6, help="time to wait for quiet samples of one case")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    options = parser.parse_args()

    _ext.force_isa(options.isa)
    isa = _ext.isa()["name"]
    probe = Probe(_ext.threads())
    rows = []
    print(f"{machine()['cpu']}, {probe.threads} threads, {isa}")

    def report(who, shape_name, fmt, tokens, what, call, flops, size):
        row = {
            "who": who,
            "shape": shape_name,
            "format": fmt,
            "tokens": tokens,
            "pass": what,
            "flops": flops,
            "bytes": size,
        }
        rows.append(row | measure(probe, isa, call, flops, size, options.seconds))
        print(table(rows[-1:]).splitlines()[-1], flush=True)

    for shape_name in options.shapes.split(","):
        shape = SHAPES[shape_name]
        rng = np.random.default_rng(0)
        batches = {n: make_batch(shape, n, rng) for n in map(int, options.tokens.split(","))}
        per_route = 6 * shape.width * shape.hidden

        for fmt in options.formats.split(","):
            store, one_expert = make_store(shape, fmt, rng)
            for tokens, batch in batches.items():
                error = check(store, batch)
                touched = len(np.unique(batch.idx)) * one_expert
                flops = per_route * batch.idx.size
                report(
                    "kjax", shape_name, fmt, tokens, "forward", lambda s=store, b=batch: forward(s, b), flops, touched
                )
                report(
                    "kjax",
                    shape_name,
                    fmt,
                    tokens,
                    "forward+backward",
                    lambda s=store, b=batch: forward_backward(s, b),
                    2 * flops,
                    2 * touched,
                )
                rows[-1]["error"] = rows[-2]["error"] = error
            store.close()

        for peer in filter(None, options.peers.split(",")):
            for name, calls in peers.PEERS[peer](shape, probe.threads):
                for tokens, batch in batches.items():
                    size = len(np.unique(batch.idx)) * 6 * shape.width * shape.hidden
                    for times, (what, call) in enumerate(calls(batch).items(), 1):
                        report(
                            name,
                            shape_name,
                            "bf16",
                            tokens,
                            what,
                            call,
                            times * per_route * batch.idx.size,
                            times * size,
                        )

    options.out.mkdir(parents=True, exist_ok=True)
    document = {
        "machine": machine(),
        "threads": probe.threads,
        "isa": isa,
        "shapes": {n: asdict(s) for n, s in SHAPES.items()},
        "rows": rows,
    }
    (options.out / "experts.json").write_text(json.dumps(document, indent=1))
    (options.out / "experts.md").write_text(table(rows))
    roofline(rows, options.out / "experts.png")
    print(f"wrote {options.out}/experts.json, experts.md, experts.png")


if __name__ == "__main__":
    main()
