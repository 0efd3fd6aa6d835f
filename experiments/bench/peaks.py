"""The machine's peaks through the compiled probe, and how quiet it was while a sample ran."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).parent / "probe.cpp"


def _build() -> ctypes.CDLL:
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    library = Path(tempfile.gettempdir()) / f"kjax_probe_{os.getuid()}_{digest}.so"
    if not library.exists():
        compiler = shutil.which("c++")
        if not compiler:
            raise SystemExit("the bench compiles its probe: install a C++ compiler")
        command = [
            compiler,
            "-O2",
            "-std=c++20",
            "-shared",
            "-fPIC",
            "-pthread",
            str(SOURCE),
            "-o",
            f"{library}.{os.getpid()}",
        ]
        subprocess.run(command, check=True)
        os.replace(f"{library}.{os.getpid()}", library)
    probe = ctypes.CDLL(str(library))
    probe.peak.restype = probe.bandwidth.restype = ctypes.c_double
    probe.peak.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_double]
    probe.bandwidth.argtypes = [ctypes.c_int, ctypes.c_size_t]
    return probe


class Probe:
    """Peaks in FLOP/s and bytes/s with `threads` threads."""

    KINDS = {"avx2": 0, "avx512": 0, "scalar": 0, "avx512bf16": 1, "amx": 2}

    def __init__(self, threads: int):
        self._probe, self.threads = _build(), threads

    def arithmetic(self, isa: str, milliseconds: float = 15) -> float:
        """For bf16 products; ISAs that multiply in fp32 are held to the FMA peak of AVX-512, AVX2 to half of it."""
        return self._probe.peak(self.KINDS[isa], self.threads, milliseconds) * 1e9 * (0.5 if isa == "avx2" else 1)

    def bandwidth(self, size: int = 512 << 20) -> float:
        return self._probe.bandwidth(self.threads, size) * 1e9


@dataclass
class Sample:
    seconds: float
    arithmetic: float  # FLOP/s, mean of before and after
    bandwidth: float  # bytes/s, likewise
    noise: float  # share of the machine others took, plus how much the peaks moved


def _busy() -> float:
    fields = [int(v) for v in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def sample(probe: Probe, isa: str, call, at_least: float = 0.1) -> Sample:
    """Times `call`, repeated to `at_least` seconds, between two probes of both peaks."""
    call()
    begin = time.perf_counter()
    call()
    repeats = max(1, int(at_least / (time.perf_counter() - begin)))
    before = probe.arithmetic(isa), probe.bandwidth()
    busy, own, begin = _busy(), sum(os.times()[:2]), time.perf_counter()
    for _ in range(repeats):
        call()
    elapsed = time.perf_counter() - begin
    others = max(0.0, _busy() - busy - (sum(os.times()[:2]) - own)) / elapsed / (os.cpu_count() or 1)
    after = probe.arithmetic(isa), probe.bandwidth()
    moved = max(abs(a - b) / max(a, b) for a, b in zip(before, after, strict=True))
    return Sample(elapsed / repeats, (before[0] + after[0]) / 2, (before[1] + after[1]) / 2, others + 0.5 * moved)


def machine() -> dict:
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        "",
    )
    return {
        "cpu": model or platform.machine(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }
