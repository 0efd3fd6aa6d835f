"""Mapped experts that are larger than the memory a control group allows; skipped where no group can be made."""

import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from test_storage import write

ROOT = Path("/sys/fs/cgroup")
LIMIT = 24 << 20


@pytest.fixture
def group():
    """A memory control group with a limit: (its files by what they mean)."""
    v1 = (ROOT / "memory").is_dir()
    own = next((line.split(":", 2)[2] for line in Path("/proc/self/cgroup").read_text().splitlines()
                if line.split(":")[1].split(",").count("memory" if v1 else "")), "/")
    path = (ROOT / "memory" if v1 else ROOT) / own.lstrip("/") / f"kjax-{uuid.uuid4().hex[:8]}"
    limit, peak = ("memory.limit_in_bytes", "memory.max_usage_in_bytes") if v1 else ("memory.max", "memory.peak")
    try:
        path.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        try:
            (path / limit).write_text(str(LIMIT))
            (path / peak).read_text()
        except OSError as error:
            pytest.skip(f"memory cannot be limited here: {error}")
        yield path / "cgroup.procs", path / peak
    finally:
        path.rmdir()


LARGER = """
import os, sys
from pathlib import Path
from test_storage import *
from kjax.offload import store as stores
directory, procs = sys.argv[1:]
found = files(directory, 1, 6)
def use(how):
    with ExpertStore(found, storage=how) as store:
        return hashlib.sha256(b"".join(a.tobytes() for a in call(store, tokens=64))).hexdigest()
expected = use("mapped")  # modules, threads and scratch, too: they count where they were first touched
for path in Path(directory).iterdir():
    with open(path, "rb") as file: os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
Path(procs).write_text(str(os.getpid()))
print(size(found), use("mapped") == expected, storage.available()[0])
"""


def test_experts_larger_than_memory(tmp_path, group):
    """A forward and two backward calls over 75 MB with 25 MB to hold them: the same bits, and the limit is kept."""
    procs, peak = group
    write(tmp_path, 1, 6, 1024, 1024)
    os.sync()  # pages not yet written cannot be dropped
    done = subprocess.run([sys.executable, "-c", LARGER, str(tmp_path), str(procs)], cwd=Path(__file__).parent,
                          capture_output=True, text=True, timeout=120,
                          env={**os.environ, "KJAX_THREADS": "2"})  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stderr)
    weights, equal, free = done.stdout.split()
    assert equal == "True" and int(weights) == 6 * 3 * 4 << 20
    assert int(free) <= LIMIT
    # The files went through the group, in turns: it was filled, and never beyond its limit.
    assert LIMIT * 0.9 < int(peak.read_text()) <= LIMIT
