"""The stand-alone program that fuzzes decodes, refuses memory and counts allocations: built plain, run for seconds."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

EXT = Path(__file__).parents[1] / "ext"


@pytest.fixture(scope="module")
def robust(tmp_path_factory) -> Path:
    """build/plain/kjax_robust as scripts/sanitize.sh makes it, made here where it is not."""
    if not shutil.which("cmake") or os.uname().sysname != "Linux":
        pytest.skip("needs cmake on Linux")
    directory = tmp_path_factory.mktemp("plain")
    for command in (["cmake", "-S", EXT, "-B", directory, "-DKJAX_PYTHON=OFF"],
                    ["cmake", "--build", directory, "--parallel", "2", "--target", "kjax_robust"]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    return directory / "kjax_robust"


@pytest.mark.parametrize("mode, threads, says", [
    ("fuzz 3 7", 3, "fuzz: "), ("fuzz 0 169", 1, "fuzz: "),  # 169: rows end half a block before the next panel would
    ("steady", 3, "steady: 0 allocations in 60 calls on int4_group32 with adapters on the host"),
    ("refusals", 3, "an exception every time, and the next call right"), ("together 2", 3, ", 0 wrong"),
    ("modes", 2, "do not depend on the caller's rounding and denormals, which stay"),
    ("nodes", 2, "each thread those of its node before others"), ("files", 1, "is told by every call"),
    ("memory", 64, "memory: first calls on 64 threads take"),
])  # fmt: skip
def test_robust(robust, mode, threads, says):
    done = subprocess.run([robust, *mode.split()], capture_output=True, text=True, timeout=300, cwd=robust.parent,
                          env={**os.environ, "KJAX_THREADS": str(threads)})  # fmt: skip
    assert done.returncode == 0 and says in done.stdout, (done.stdout, done.stderr)
