"""Mapped and resident experts: the choice, the copy, equal bits, the memory both take, and files lost under a store."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import experts_cases as cases
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_store import entries, projections, tensors

from kjax import _ext
from kjax.errors import CheckpointError, ConfigError
from kjax.offload import ExpertStore, resident, storage
from kjax.offload.store import size

LAYERS, EXPERTS, D, F = 2, 9, 96, 72


def write(directory, layers=LAYERS, experts=EXPERTS, d=D, f=F):
    weights, *_ = cases.problem(np.random.default_rng(0), layers=layers, e=experts, d=d, f=f)
    named = sorted(tensors(weights).items())
    save_file(dict(named[::2]), Path(directory) / "a.safetensors")
    save_file(dict(named[1::2]), Path(directory) / "b.safetensors")
    return weights


def files(directory, layers=LAYERS, experts=EXPERTS):
    found = entries(Path(directory) / "a.safetensors") | entries(Path(directory) / "b.safetensors")
    return projections(found, layers, experts)


def call(store, tokens=300, per_token=3, seed=1):
    """Every result of a forward and a backward call, and of a backward call that recomputes."""
    rng = np.random.default_rng(seed)
    x, dy = (rng.standard_normal((tokens, store.width)).astype(np.float32) for _ in range(2))
    idx = rng.integers(-1, store.experts, (tokens, per_token)).astype(np.int32)
    gate = rng.random((tokens, per_token)).astype(np.float32)
    y, slip = _ext.forward(store.id, store.layers - 1, x, idx, gate, True)
    once, again = (_ext.backward(store.id, store.layers - 1, entry, x, idx, gate, dy)[:2] for entry in (slip, 0))
    return y, *once, *again


def bits_of(found, how) -> str:
    with ExpertStore(found, storage=how) as store:
        assert store.storage == how
        return hashlib.sha256(b"".join(a.tobytes() for a in call(store))).hexdigest()


@pytest.fixture
def directory(tmp_path):
    write(tmp_path)
    return tmp_path


def test_a_copy_holds_the_bytes_of_the_files(directory):
    found = files(directory)
    with ExpertStore(found) as mapped, ExpertStore(found, storage="resident") as copied:
        for layer, expert in ((0, 0), (0, 5), (1, 8)):
            for name in ("gate_proj", "up_proj", "down_proj"):
                assert np.array_equal(mapped.decode(layer, expert, name), copied.decode(layer, expert, name))
    assert bits_of(found, "mapped") == bits_of(found, "resident")


def test_a_copy_in_many_chunks(directory, monkeypatch):
    monkeypatch.setattr(resident, "CHUNK", 1000)
    assert bits_of(files(directory), "mapped") == bits_of(files(directory), "resident")


def test_a_copy_drops_the_page_cache(tmp_path):
    write(tmp_path, 1, 8, 512, 512)
    found = files(tmp_path, 1, 8)
    handle = os.open(tmp_path / "a.safetensors", os.O_RDONLY)
    os.fsync(handle)

    def cached() -> bool:
        try:
            return os.preadv(handle, [bytearray(1)], os.fstat(handle).st_size // 2, os.RWF_NOWAIT) == 1
        except BlockingIOError:
            return False

    try:
        for attempt in range(10):  # the kernel keeps pages that are still on their way through its lists
            os.pread(handle, 10, os.fstat(handle).st_size // 2)
            if not attempt and not cached():
                pytest.skip("this file system does not tell what is cached")
            ExpertStore(found, storage="resident").close()
            if not cached():
                return
        raise AssertionError("it stays in the page cache")
    except OSError as error:
        pytest.skip(f"this file system does not tell what is cached: {error}")
    finally:
        os.close(handle)


def test_a_copy_of_a_truncated_file_names_it(directory):
    found = files(directory)
    path = directory / "b.safetensors"
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(CheckpointError, match=r"b\.safetensors: tensor 'layers.*the file ends at byte"):
        ExpertStore(found, storage="resident")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors: cannot be opened"):
        ExpertStore(found, storage="resident")


def memory(root, *, available=100, huge="madvise", cgroup=None, limits=None) -> Path:
    """A machine with so many GB available; limits: of control groups, (limit, used, page cache) in GB by path."""
    made = {"proc/meminfo": f"MemTotal: 999 kB\nMemAvailable:   {available * 10**6} kB\n",
            "sys/kernel/mm/transparent_hugepage/enabled": " ".join(
                f"[{name}]" if name == huge else name for name in ("always", "madvise", "never")),
            "proc/self/cgroup": cgroup or "0::/\n"}
    for path, (limit, used, cache) in (limits or {}).items():
        v1 = path.startswith("memory")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if v1 else ("memory.max", "memory.current")
        for name, value in zip(names, (limit, used), strict=True):
            made[f"sys/fs/cgroup/{path}/{name}"] = value if isinstance(value, str) else str(int(value * 1e9))
        prefix = "total_" if v1 else ""
        made[f"sys/fs/cgroup/{path}/memory.stat"] = (f"anon 5\n{prefix}inactive_file {int(cache * 0.75e9)}\n"
                                                     f"{prefix}active_file {int(cache * 0.25e9)}\n")
    for name, content in made.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content + "\n")
    return root


@pytest.mark.parametrize("limits, cgroup, free", [
    ({}, None, 102.4),
    ({"": (50, 30, 10)}, None, 30),
    ({"": ("max", 30, 10)}, None, 102.4),
    ({"a/b": (40, 20, 0), "a": (30, 20, 5)}, "0::/a/b\n", 15),
    ({"a/b": (20, 30, 0)}, "0::/a/b\n", 0),
    ({"memory/x": (40, 10, 2)}, "4:cpu:/\n3:memory:/x\n", 32),
    ({"memory/x": (9.2e9, 10, 2)}, "3:cpu,memory:/x\n0::/\n", 102.4),
])  # fmt: skip
def test_available_memory(tmp_path, limits, cgroup, free):
    root = memory(tmp_path, limits=limits, cgroup=cgroup)
    found, limit = storage.available(root)
    assert found == pytest.approx(free * 1e9, rel=1e-6)
    assert limit == ("are free" if free > 100 else limit) and ("control group" in limit) == (free < 100)


@pytest.mark.parametrize("steps, nodes, gigabytes, huge, mode, why", [
    (0, 1, 5, "always", "mapped", "repaid by 30 training steps$"),
    (29, 1, 5, "always", "mapped", "not 29"),
    (30, 1, 5, "always", "resident", "30 steps repay"),
    (30, 1, 5, "never", "mapped", "huge pages switched off"),
    (30, 1, 90, "always", "mapped", "90.0 GB are too much for the 102.4 GB are free"),
    (5, 2, 5, "always", "mapped", "repaid by 6"),
    (6, 2, 5, "never", "resident", "6 steps repay"),
])  # fmt: skip
def test_auto(tmp_path, steps, nodes, gigabytes, huge, mode, why):
    chosen = storage.choose("auto", int(gigabytes * 1e9), steps, nodes=nodes, root=memory(tmp_path, huge=huge))
    assert chosen.mode == mode
    assert re.search(why, chosen.reason)


def test_storage_as_set(tmp_path):
    root = memory(tmp_path, available=100)
    assert storage.choose("mapped", 10**15, 10**6, root=root).mode == "mapped"
    assert str(storage.choose("resident", 10**9, root=root)) == "resident: as set"
    with pytest.raises(ConfigError, match="Model.storage = 'resident': 200.0 GB of routed experts, and 102.4 GB are "
                                          "free: set 'mapped'"):
        storage.choose("resident", 200 * 10**9, root=root)


def test_size_counts_every_tensor(directory):
    assert size(files(directory)) == LAYERS * EXPERTS * 3 * D * F * 4


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":\t") for line in lines)[field].split()[0]) * 1024


@pytest.mark.parametrize("how", ["mapped", "resident"])
def test_nothing_proportional_to_the_weights_besides_them(tmp_path, how):
    """Beyond the checkpoint's bytes: at most 64 MB and the activations, in the peak while loading and in use."""
    code = f"""
import os
from pathlib import Path
from test_storage import *
found = files({str(tmp_path)!r}, 1, 16)
warm = files({str(tmp_path / "warm")!r})
with ExpertStore(warm, storage={how!r}) as store: call(store)  # modules, threads, the pool's scratch
before = status("RssAnon")
seen = []
class Watched(resident.Resident):
    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        seen.append(status("RssAnon"))
import kjax.offload.store
kjax.offload.store.Resident = Watched
with ExpertStore(found, storage={how!r}) as store:
    call(store, tokens=64)
    seen.append(status("RssAnon"))
print(size(found), max(seen) - before, status("RssAnon") - before)
"""
    write(tmp_path, 1, 16, 1024, 1024)
    (tmp_path / "warm").mkdir()
    write(tmp_path / "warm")
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True,
                          timeout=120, env={**os.environ, "KJAX_THREADS": "2"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    weights, used, after = map(int, done.stdout.split())
    activations = 64 * 3 * 4 * (2 * 1024 + 4 * 1024)
    assert weights == 16 * 3 * 4 << 20
    extra = used - (weights if how == "resident" else 0)
    assert extra < (24 << 20) + activations  # of the 64 MB that are allowed; the weights are 201 MB
    assert after < 24 << 20


LOST = """
import faulthandler, os, sys
from pathlib import Path
{before}
from test_storage import *
found = files({directory!r})
path = Path({directory!r}) / "a.safetensors"
whole = path.read_bytes()
store = ExpertStore(found, storage={how!r})
expected = bits(call(store))
{after}
os.truncate(path, 4096)
for attempt in range(2):
    try: call(store); print("no error")
    except CheckpointError as error: print(error)
try: print(store.decode(1, 8, "down_proj").shape)
except CheckpointError as error: print(error)
path.write_bytes(whole)
assert bits(call(store)) == expected
print("usable")
{end}
"""


def bits(arrays) -> str:
    return hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()


def in_child(code, **env):
    return subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True,
                          timeout=120, env={**os.environ, **env})  # fmt: skip


@pytest.mark.parametrize("before, after", [("", ""), ("faulthandler.enable()", ""), ("", "faulthandler.enable()")])
def test_a_file_truncated_under_a_store(directory, before, after):
    """An error that names the file, twice; then the file is put back, and the same store gives the same bits."""
    done = in_child(LOST.format(directory=str(directory), how="mapped", before=before, after=after, end=""))
    assert done.returncode == 0, (done.stdout, done.stderr)
    *errors, usable = done.stdout.strip().splitlines()
    assert len(errors) == 3 and usable == "usable"
    for error in errors[:2]:
        assert re.search(rf"{directory}/a.safetensors: cannot be read at byte \d+: it has 4096 bytes now and", error)
    assert "(" in errors[2]  # that expert may lie in the other file


def test_a_file_truncated_under_a_copy_does_not_matter(directory):
    done = in_child(LOST.format(directory=str(directory), how="resident", before="", after="", end=""))
    assert done.stdout.split("\n")[:2] == ["no error", "no error"], done.stderr


@pytest.mark.parametrize("enable", ["", "faulthandler.enable()"])
def test_bus_errors_elsewhere_still_end_the_process(directory, tmp_path, enable):
    """The handler answers for checkpoints alone: another truncated mapping kills the process as without kjax."""
    end = f"""
import mmap
(Path({str(tmp_path)!r}) / "other").write_bytes(bytes(8192))
with open(Path({str(tmp_path)!r}) / "other", "r+b") as other:
    view = mmap.mmap(other.fileno(), 8192)
    other.truncate(0)
    {enable or "pass"}
    call(store)
    print("before", flush=True)
    view[5000]
print("survived")
"""
    done = in_child(LOST.format(directory=str(directory), how="mapped", before="", after="", end=end))
    assert done.returncode == -7 and done.stdout.strip().endswith("before")
    assert ("Fatal Python error: Bus error" in done.stderr) == bool(enable)


def test_a_lost_file_through_a_compiled_call(directory):
    code = f"""
import os
from test_storage import *
import jax, jax.numpy as jnp
from kjax.offload import host_experts
store = ExpertStore(files({str(directory)!r}))
x, idx, gate = jnp.ones((40, store.width)), jnp.tile(jnp.arange(8), (40, 1)), jnp.ones((40, 8))
step = jax.jit(jax.grad(lambda x: host_experts(store, 0, x, idx, gate).sum()))
step(x).block_until_ready()
os.truncate({str(directory / "b.safetensors")!r}, 8192)
try: step(x).block_until_ready()
except (jax.errors.JaxRuntimeError, ValueError) as error: print(error)
"""
    for transport in ("ffi", "pure_callback"):
        write(directory)
        done = in_child(code, KJAX_TRANSPORT=transport)
        assert f"{directory}/b.safetensors: cannot be read at byte" in done.stdout, (done.stdout, done.stderr)


def test_memory_just_below_a_huge_page_is_given_back():
    before = status("VmSize")
    for _ in range(100):
        _ext.host_memory(2**21 - 32, 0)
    assert status("VmSize") - before < 50 << 20


def test_memory_of_large_calls_is_given_back():
    """A call keeps 41 MB of sums in fp32 for the next; 256 small ones, or closing the last store, free them."""
    code = """
from test_storage import *
from kjax import _ext
from ext_oracle import make_layer
layer = make_layer(np.random.default_rng(0), 4, 256, 256)
def use(tokens, times):
    for _ in range(times):
        x, idx = np.full((tokens, 256), 0x3f80, np.uint16), np.zeros((tokens, 2), np.int32)  # ones in bf16
        _ext.backward(layer.store.id, 0, 0, x, idx, np.ones(idx.shape, np.float32), x)
use(10, 1)
sizes = [status("RssAnon")]
for step in (lambda: use(40000, 1), lambda: use(10, 255), lambda: use(10, 2), lambda: use(40000, 1), layer.store.close):
    step()
    sizes.append(status("RssAnon"))
print(*sizes)
"""
    done = in_child(code)
    small, large, kept, freed, again, closed = map(int, done.stdout.split())
    assert large > small + 30e6 and kept > small + 30e6 and again > small + 30e6, done.stdout
    assert freed < small + 10e6 and closed < small + 10e6, done.stdout
