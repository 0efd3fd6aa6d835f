"""
How close the host experts come to the machine's limit, beside peers, in one run.

    python experiments/bench/experts.py                                    # kjax, both shapes, bf16
    python experiments/bench/experts.py --formats all --who kjax,transformers,kt-kernel --bar
    python experiments/bench/experts.py --shapes v2-lite --tokens 512,2048 --isa avx2
    python experiments/bench/experts.py --who kjax,kt-kernel --lora 8 --bar    # with adapters on every expert
    python experiments/bench/experts.py --report --bar                     # the table again, nothing measured

limit = max(operations / arithmetic peak, bytes of the touched experts / read bandwidth, their weights x decode cost);
share = limit / time. Peaks are measured with the same threads right before and after every sample, the decode cost
with the kernels' own products of zero rows; of the samples, the quietest decide: those during which peaks and load
stood still and cores could start about as many instructions as ever. Every case is compared with float64 on the decoded
weights before it is timed: relative L2 errors, also as multiples of those that rounding the operands alone gives. With
--lora that includes dA and dB of one expert, and each sample times the call without adapters too, so that what they
cost does not depend on the minute. Rows go to experts.json as they are measured, and a case that is there is not
measured again (--again does): a long table can be made in pieces. Each contender runs in a process of its own.

kt-kernel: pip install --no-deps --target DIR kt-kernel==0.7.2, and KJAX_BENCH_PEERS=DIR.
"""

import argparse
import json
import multiprocessing
import os
import time
from dataclasses import asdict
from pathlib import Path

from cases import FORMATS, SHAPES, checked_batch, timed_batches
from contenders import CONTENDERS, why_not
from oracle import Judge
from peaks import Probe, Work, machine, measure
from report import PASSES, roofline, table

from kjax import _ext

# glibc keeps what is freed, as a compiled program keeps its buffers: no page faults among the samples.
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
KEY = ("who", "isa", "shape", "format", "tokens", "pass", "lora")


class Results:
    """The rows measured so far, in a file that is whole after every one."""

    def __init__(self, path: Path):
        self.path = path
        self.document = json.loads(path.read_text()) if path.exists() else {"rows": []}

    @property
    def rows(self) -> list[dict]:
        return self.document["rows"]

    def has(self, row: dict) -> bool:
        return any(all(r[k] == row[k] for k in KEY) for r in self.rows)

    def add(self, row: dict):
        self.document["rows"] = [r for r in self.rows if any(r[k] != row[k] for k in KEY)] + [row]
        fresh = self.path.with_suffix(".tmp")
        fresh.write_text(json.dumps(self.document, indent=1))
        fresh.replace(self.path)


def measure_contender(who: str, shape_name: str, fmt: str, options):
    """All cases of one contender that are not measured yet; runs in a child process."""
    reason = why_not(who, fmt, options.lora)
    if reason:
        return print(f"{who}, {fmt}: {reason}", flush=True)
    _ext.force_isa(options.isa)
    isa, probe, shape = _ext.isa()["name"], Probe(_ext.threads()), SHAPES[shape_name]
    products = "avx512" if fmt == "fp32" and isa in ("avx512bf16", "amx") else isa  # what an fp32 store multiplies with
    results = Results(options.out / "experts.json")
    results.document |= {"machine": machine(), "threads": probe.threads}
    results.document["shapes"] = {name: asdict(s) for name, s in SHAPES.items()}
    for contender in CONTENDERS[who](shape, fmt, probe.threads, options.lora):
        judge = Judge(contender.weights, contender.adapters, contender.either)
        for tokens in options.tokens:
            for passed in options.passes:
                row = dict(
                    zip(KEY, (contender.name, isa, shape_name, contender.format, tokens, passed, contender.lora),
                        strict=True)
                )  # fmt: skip
                if passed not in contender.calls or (results.has(row) and not options.again):
                    continue
                if time.monotonic() > options.until:
                    return print("out of time: run again to go on", flush=True)
                call, checked = contender.calls[passed], checked_batch(shape, tokens)
                contender.prepare()
                row["errors"] = judge.errors(checked, call(checked))
                batches = timed_batches(shape, tokens)
                touched = sum(b.touched for b in batches)
                times = 1 + PASSES.index(passed)
                work = Work(
                    times * 2 * shape.weights * shape.per_token * tokens * len(batches),
                    times * touched * contender.bytes_of_expert,
                    touched * shape.weights * contender.decode.get(passed, 0),
                )
                each = lambda call, batches=batches: call and (lambda: [call(b) for b in batches])  # noqa: E731
                beside = each(contender.beside.get(passed))
                figures = measure(probe, products, each(call), work, options.seconds, beside)
                for name in ("milliseconds", "flops", "bytes", "decode_seconds"):
                    figures[name] /= len(batches)
                results.add(row | figures)
                print(table(results.rows[-1:], options.bar).splitlines()[-1], flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--shapes", type=names, default=["v2-lite", "v3"])
    parser.add_argument("--formats", type=names, default=["bf16"], help="or: all")
    parser.add_argument(
        "--tokens", type=lambda text: [int(n) for n in text.split(",")], default=[1, 16, 128, 512, 2048]
    )
    parser.add_argument("--passes", type=names, default=list(PASSES))
    parser.add_argument("--who", type=names, default=["kjax"], help=f"of {', '.join(CONTENDERS)}")
    parser.add_argument("--isa", default=None, help="kernels and arithmetic peak to use; default: what kjax chooses")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="with adapters on every expert")
    parser.add_argument("--seconds", type=float, default=4, help="time to wait for quiet samples of one case")
    parser.add_argument("--minutes", type=float, default=1e6, help="start no case after that")
    parser.add_argument("--again", action="store_true", help="measure cases that are in the file already")
    parser.add_argument("--bar", action="store_true", help="show what each figure is held to beside it")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    options = parser.parse_args()
    if options.formats == ["all"]:
        options.formats = list(FORMATS)
    options.until = time.monotonic() + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)

    os.environ |= MALLOC
    spawn = multiprocessing.get_context("spawn")
    for shape_name in [] if options.report else options.shapes:
        for who in options.who:
            for fmt in options.formats:
                child = spawn.Process(target=measure_contender, args=(who, shape_name, fmt, options))
                child.start()
                child.join()
                if child.exitcode:
                    print(f"{who}, {shape_name}, {fmt}: ended with {child.exitcode}", flush=True)

    results = Results(options.out / "experts.json")
    order = {name: i for i, name in enumerate([*SHAPES, *FORMATS, *PASSES])}
    rows = sorted(
        results.rows,
        key=lambda r: (r["lora"] != "", r["who"] != "kjax", r["isa"], order[r["shape"]], order[r["format"]], r["who"],
                       r["lora"], r["tokens"], order[r["pass"]]),
    )  # fmt: skip
    (options.out / "experts.md").write_text(table(rows, options.bar))
    roofline(rows, options.out / "experts.png")
    if options.report:
        print(table(rows, options.bar))
    print(f"wrote {options.out}/experts.json, experts.md, experts.png")


if __name__ == "__main__":
    main()
