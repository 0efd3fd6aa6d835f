"""The machine's peaks through the compiled probe, how quiet it was while a sample ran, and a case's figures."""

import ctypes
import hashlib
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).parent / "probe.cpp"
QUIET = 0.08  # noise below which a sample counts as quiet


def _build() -> ctypes.CDLL:
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    library = Path(tempfile.gettempdir()) / f"kjax_probe_{os.getuid()}_{digest}.so"
    if not library.exists():
        compiler = shutil.which("c++")
        if not compiler:
            raise SystemExit("the bench compiles its probe: install a C++ compiler")
        fresh = f"{library}.{os.getpid()}"
        flags = ["-O2", "-std=c++20", "-shared", "-fPIC", "-pthread"]
        subprocess.run([compiler, *flags, str(SOURCE), "-o", fresh], check=True)
        os.replace(fresh, library)
    probe = ctypes.CDLL(str(library))
    probe.peak.restype = probe.issue.restype = probe.bandwidth.restype = ctypes.c_double
    probe.peak.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_double]
    probe.issue.argtypes = [ctypes.c_int, ctypes.c_double]
    probe.bandwidth.argtypes = [ctypes.c_int, ctypes.c_size_t]
    return probe


class Probe:
    """Peaks in FLOP/s and bytes/s with `threads` threads."""

    # fp32 FMA of 256 and 512 bits, bf16 dot products, tiles
    KINDS = {"scalar": 0, "avx2": 0, "avx512": 1, "avx512bf16": 2, "amx": 3}

    def __init__(self, threads: int):
        self._probe, self.threads = _build(), threads
        self.most_issued = 0.0

    # Of three short tries the best: what others take from the machine only ever lowers them.
    def arithmetic(self, isa: str, milliseconds: float = 6) -> float:
        return max(self._probe.peak(self.KINDS[isa], self.threads, milliseconds) for _ in range(3)) * 1e9

    # Rounds of instructions a second in 10^9, the middle of three tries; `most_issued` is the most there ever was.
    def issue(self, milliseconds: float = 6) -> float:
        tries = [self._probe.issue(self.threads, milliseconds) for _ in range(3)]
        self.most_issued = max(self.most_issued, *tries)
        return statistics.median(tries)

    def bandwidth(self, size: int = 256 << 20) -> float:
        return max(self._probe.bandwidth(self.threads, size) for _ in range(3)) * 1e9


@dataclass
class Sample:
    seconds: float
    arithmetic: float  # FLOP/s, the better of before and after
    bandwidth: float  # bytes/s, likewise
    disturbed: float  # share of the machine others took, plus half of how much the peaks moved
    issue: float  # rounds of instructions a second, the worse of before and after
    beside: float = 0.0  # seconds of the other call, if there is one

    # Half, as no kernel needs every instruction that a core can start.
    def noise(self, probe: Probe) -> float:
        return self.disturbed + 0.5 * (1 - self.issue / probe.most_issued)


@dataclass
class Work:
    """What one call has to do at least."""

    flops: float
    bytes: float
    decode: float  # seconds

    def limit(self, arithmetic: float, bandwidth: float) -> tuple[float, str]:
        """Seconds, and what binds."""
        parts = {"arithmetic": self.flops / arithmetic, "memory": self.bytes / bandwidth, "decode": self.decode}
        binds = max(parts, key=parts.get)
        return parts[binds], binds


def _busy() -> float:
    fields = [int(v) for v in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def samples(probe: Probe, isa: str, call, seconds: float, beside=None, at_least: float = 0.1):
    """Times `call`, repeated to `at_least` seconds, between probes of both peaks, until five samples were quiet or
    `seconds` are over; three samples at least. With `beside` each repetition times that call too."""
    call()
    begin = time.perf_counter()
    call()
    repeats = max(1, round(at_least / (time.perf_counter() - begin)))
    look = lambda: (probe.arithmetic(isa), probe.bandwidth(), probe.issue())  # noqa: E731
    out, before = [], look()
    while len(out) < 3 or (sum(s.noise(probe) < QUIET for s in out) < 5 and time.perf_counter() - begin < seconds):
        busy, own, start, other = _busy(), sum(os.times()[:2]), time.perf_counter(), 0.0
        for _ in range(repeats):
            call()
            if beside:
                began = time.perf_counter()
                beside()
                other += time.perf_counter() - began
        elapsed = time.perf_counter() - start
        others = max(0.0, _busy() - busy - (sum(os.times()[:2]) - own)) / elapsed / (os.cpu_count() or 1)
        after = look()
        moved = max(abs(a - b) / max(a, b) for a, b in zip(before[:2], after[:2], strict=True))
        arithmetic, bandwidth, _ = map(max, before, after)
        disturbed, issue = others + 0.5 * moved, min(before[2], after[2])
        out.append(Sample((elapsed - other) / repeats, arithmetic, bandwidth, disturbed, issue, other / repeats))
        before = after
    return out


def measure(probe: Probe, isa: str, call, work: Work, seconds: float, beside=None) -> dict:
    """Figures of one case: medians of the quiet samples, of the quietest three if there are fewer; with `beside`, also
    what share `call` takes longer than that."""
    taken = sorted(samples(probe, isa, call, seconds, beside), key=lambda s: s.noise(probe))
    kept = taken[: max(3, sum(s.noise(probe) < QUIET for s in taken))]
    middle = lambda f: statistics.median(f(s) for s in kept)  # noqa: E731
    limits = [work.limit(s.arithmetic, s.bandwidth) for s in kept]
    return {
        "milliseconds": 1e3 * middle(lambda s: s.seconds),
        "share": statistics.median(limit / s.seconds for (limit, _), s in zip(limits, kept, strict=True)),
        "bound": limits[0][1],
        "flops": work.flops,
        "bytes": work.bytes,
        "decode_seconds": work.decode,
        "gflops": middle(lambda s: work.flops / s.seconds) * 1e-9,
        "peak_gflops": middle(lambda s: s.arithmetic) * 1e-9,
        "bandwidth_gbs": middle(lambda s: s.bandwidth) * 1e-9,
        "quiet": sum(s.noise(probe) < QUIET for s in taken),
        "samples": len(taken),
    } | ({"cost": middle(lambda s: s.seconds / s.beside) - 1} if beside else {})


def machine() -> dict:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), platform.machine())
    memory = next(line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gb": round(int(memory) / 2**20, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }
