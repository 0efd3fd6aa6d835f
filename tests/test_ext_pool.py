"""The thread pool's size, cancellation and forks; the FFI targets."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ext_oracle import bits, make_layer, route

from kjax import _ext


def in_child(code, **env):
    """The last line a child process prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def problem(rng, tokens, width, experts, per_token=2):
    x = bits(rng.standard_normal((tokens, width)), "bf16")
    return x, *route(rng, tokens, experts, per_token)


THREADS = "from kjax import _ext\ntry: print(_ext.threads())\nexcept ValueError as e: print(e)"
STORE = "from kjax import _ext\ntry: print(_ext.Store(1, 1, 4, 4, 'bf16').id)\nexcept ValueError as e: print(e)"


@pytest.mark.parametrize("value", ["1", "3", "64"])
def test_threads_as_asked(value):
    assert in_child(THREADS, KJAX_THREADS=value) == value


@pytest.mark.parametrize("value", ["0", "-2", "two", "3x", "1e3", "99999999999999999999"])
def test_threads_out_of_range_are_an_error(value):
    for code in (THREADS, STORE):
        assert in_child(code, KJAX_THREADS=value) == f"KJAX_THREADS={value} is not a number of threads from 1 to 4096"


def test_threads_follow_the_affinity_mask():
    core = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, {{{core}}})\n" + THREADS
    assert in_child(code, KJAX_THREADS="") == "1"


V1 = "sys/fs/cgroup/cpu/x/cpu.cfs_"


@pytest.mark.parametrize(
    "cgroup, files, quota",
    [
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000"}, 0),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "150000 100000"}, 1.5),
        ("0::/a/b\n", {"sys/fs/cgroup/a/b/cpu.max": "max 100000", "sys/fs/cgroup/a/cpu.max": "400000 100000"}, 4),
        ("0::/a/b\n", {"sys/fs/cgroup/a/b/cpu.max": "200000 100000", "sys/fs/cgroup/a/cpu.max": "400000 100000"}, 2),
        ("4:cpu,cpuacct:/x\n0::/\n", {V1 + "quota_us": "300000", V1 + "period_us": "100000"}, 3),
        ("4:cpu,cpuacct:/x\n", {V1 + "quota_us": "-1", V1 + "period_us": "100000"}, 0),
        ("4:cpuset:/x\n", {V1 + "quota_us": "100000", V1 + "period_us": "100000"}, 0),
        ("broken\n", {"sys/fs/cgroup/cpu.max": "nonsense"}, 0),
    ],
)  # fmt: skip
def test_cgroup_quota(tmp_path, cgroup, files, quota):
    for name, content in {"proc/self/cgroup": cgroup, **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert _ext.cgroup_cpu_quota(str(tmp_path)) == quota


def test_threads_follow_the_quota(tmp_path):
    """The smaller of the affinity mask and the quota, rounded up."""
    cores = len(os.sched_getaffinity(0))
    for name in ("proc/self", "sys/fs/cgroup"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    code = f"from kjax import _ext; print(_ext.count_threads({str(tmp_path)!r}))"
    for quota, count in [("100000", 1), ("50000", 1), ("110000", min(2, cores)), ("max", cores)]:
        (tmp_path / "sys/fs/cgroup/cpu.max").write_text(f"{quota} 100000\n")
        assert in_child(code, KJAX_THREADS="") == str(count), quota


def test_idle_threads_sleep():
    """A twentieth of a second of spinning would be seen: threads give up after a tenth of a millisecond."""
    code = """
import time, numpy as np
from ext_oracle import make_layer, route
from kjax import _ext
layer = make_layer(np.random.default_rng(0), 2, 16, 16)
idx, gate = route(np.random.default_rng(0), 8, 2, 1)
_ext.forward(layer.store.id, 0, np.zeros((8, 16), np.float32), idx, gate, False)
time.sleep(0.05)
begin = time.process_time()
time.sleep(0.5)
print(time.process_time() - begin)
"""
    assert float(in_child(code, KJAX_THREADS="4")) < 0.05


NO_THREADS = """
import os, resource, numpy as np
from ext_oracle import make_layer, route
from kjax import _ext
rng = np.random.default_rng(0)
layer = make_layer(rng, 2, 16, 16)
x, (idx, gate) = np.zeros((8, 16), np.float32), route(rng, 8, 2, 1)
if os.getuid() == 0: os.setresuid(65534, 65534, 0)  # the limit does not hold for root
soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
resource.setrlimit(resource.RLIMIT_NPROC, (0, hard))
try: print(_ext.forward(layer.store.id, 0, x, idx, gate, False)[0].shape)
except RuntimeError as error: print(error)
resource.setrlimit(resource.RLIMIT_NPROC, (soft, hard))
print(_ext.forward(layer.store.id, 0, x, idx, gate, False)[0].shape)
"""


def test_a_limit_on_threads_is_an_error_and_the_store_stays_usable():
    done = subprocess.run([sys.executable, "-c", NO_THREADS], cwd=Path(__file__).parent, capture_output=True, text=True,
                          env={**os.environ, "KJAX_THREADS": "3"}, timeout=120)  # fmt: skip
    first, last = done.stdout.strip().splitlines()
    assert first.startswith("cannot start kernel thread 1 of 3") and last == "(8, 16)", done.stderr


def test_cancel_stops_running_and_later_calls():
    rng = np.random.default_rng(0)
    layer = make_layer(rng, 4, 512, 512)
    args = problem(rng, 1500, 512, 4)
    seen = []

    def use():
        try:
            while True:
                _ext.forward(layer.store.id, 0, *args, False)
        except RuntimeError as error:
            seen.append(str(error))

    worker = threading.Thread(target=use)
    worker.start()
    while not layer.store.stats()["forward"]:
        time.sleep(0.001)
    _ext.cancel(True)
    try:
        worker.join(60)
        assert seen == ["cancelled"]
        with pytest.raises(RuntimeError, match="cancelled"):
            _ext.backward(layer.store.id, 0, 0, *args, args[0])
    finally:
        _ext.cancel(False)
    _ext.forward(layer.store.id, 0, *args, False)


FORK = """
import os, numpy as np
from ext_oracle import make_layer, route
from kjax import _ext
rng = np.random.default_rng(0)
layer = make_layer(rng, 2, 16, 16)
x, (idx, gate) = np.zeros((8, 16), np.float32), route(rng, 8, 2, 1)
{before}
read, write = os.pipe()
if os.fork() == 0:
    try: text = str(_ext.forward(layer.store.id, 0, x, idx, gate, False)[0].shape)
    except RuntimeError as error: text = str(error)
    os.write(write, text.encode())
    os._exit(0)
os.wait()
print(os.read(read, 1000).decode())
"""


def test_child_of_a_fork_gets_an_error_not_a_hang():
    used = FORK.format(before="_ext.forward(layer.store.id, 0, x, idx, gate, False)")
    assert "forked after kjax started its kernel threads" in in_child(used, KJAX_THREADS="3")
    assert in_child(FORK.format(before=""), KJAX_THREADS="3") == "(8, 16)"


REFUSED = """
import resource, numpy as np
from ext_oracle import make_layer, route
from kjax import _ext
rng = np.random.default_rng(0)
layer = make_layer(rng, 2, 16, 16)
x, (idx, gate) = np.zeros((8, 16), np.float32), route(rng, 8, 2, 1)
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (16 << 20), hard))
try: _ext.forward(layer.store.id, 0, x, idx, gate, False)
except (RuntimeError, MemoryError) as error: print(type(error).__name__, error)
resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
print(_ext.forward(layer.store.id, 0, x, idx, gate, False)[0].shape)
"""


def test_refused_threads_are_an_error_and_the_store_stays_usable():
    """Sixty-four stacks do not fit below the address-space limit; after it is lifted the same call works."""
    done = subprocess.run(
        [sys.executable, "-c", REFUSED], cwd=Path(__file__).parent, env={**os.environ, "KJAX_THREADS": "64"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    first, last = done.stdout.strip().splitlines()
    assert first.startswith("RuntimeError cannot start kernel thread") and "KJAX_THREADS" in first
    assert last == "(8, 16)"


def test_memory_exhaustion_is_an_exception_and_the_store_stays_usable():
    code = REFUSED.replace(
        "np.zeros((8, 16), np.float32), route(rng, 8, 2, 1)",
        "np.zeros((400000, 16), np.uint16), route(rng, 400000, 2, 1)",  # bf16, so that 26 MB of sums are needed
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, env={**os.environ, "KJAX_THREADS": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    first, last = done.stdout.strip().splitlines()
    assert first.startswith("MemoryError") and last == "(400000, 16)"


def test_more_threads_than_cores():
    code = "import test_ext_kernels as t; t.test_bits_do_not_depend_on_concurrent_calls(); print('done')"
    assert in_child(code, KJAX_THREADS="16") == "done"


@pytest.fixture(scope="module")
def targets():
    for name, capsule in _ext.ffi_targets().items():
        jax.ffi.register_ffi_target("test_" + name, capsule, platform="cpu")


NO_ADAPTERS = {"scales": np.full(3, np.nan, np.float32), "dropout": np.float64(0), "host": np.int64(-1)}


def ffi_forward(store, layer, x, idx, gate, keep, *more):
    shapes = (jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((), jnp.int32))
    call = jax.ffi.ffi_call("test_kjax_experts_forward", shapes)
    return call(jnp.int32(layer), x, idx, gate, *more, store=np.int64(store), keep=np.int64(keep), **NO_ADAPTERS)


def ffi_backward(store, layer, slip, x, idx, gate, dy):
    shapes = (jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct(gate.shape, jnp.float32))
    call = jax.ffi.ffi_call("test_kjax_experts_backward", shapes)
    return call(jnp.int32(layer), slip, x, idx, gate, dy, store=np.int64(store), **NO_ADAPTERS)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_ffi_gives_the_bits_of_the_module(targets, dtype):
    rng = np.random.default_rng(1)
    layer = make_layer(rng, 3, 40, 24, dtype)
    idx, gate = route(rng, 11, 3, 2)
    x, dy = (bits(rng.standard_normal((11, 40)), dtype) for _ in range(2))
    expected, slip = _ext.forward(layer.store.id, 0, x, idx, gate, True)
    expected = (expected, *_ext.backward(layer.store.id, 0, slip, x, idx, gate, dy)[:2])
    as_jax = [jnp.asarray(a).view(jnp.bfloat16) if dtype == "bf16" else jnp.asarray(a) for a in (x, dy)]
    y, slip = jax.jit(lambda *a: ffi_forward(layer.store.id, 0, *a, True))(as_jax[0], idx, gate)
    dx, dgate = jax.jit(lambda *a: ffi_backward(layer.store.id, 0, *a))(slip, as_jax[0], idx, gate, as_jax[1])
    for a, b in zip((y, dx, dgate), expected, strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(b.dtype), b)
    assert layer.store.stats()["recomputed"] == 0


def test_ffi_errors_name_what_is_wrong(targets):
    rng = np.random.default_rng(2)
    layer = make_layer(rng, 3, 8, 8)
    idx, gate = route(rng, 4, 3, 2)
    x = jnp.zeros((4, 8))
    number = layer.store.id
    for message, wrong in [
        ("layer 7 is not in 0..0", lambda: ffi_forward(number, 7, x, idx, gate, False)),
        ("idx must be int32", lambda: ffi_forward(number, 0, x, idx.astype(np.int16), gate, False)),
        ("gate must be float32 with idx's shape", lambda: ffi_forward(number, 0, x, idx, gate[:, :1], False)),
        ("x must be bfloat16 or float32", lambda: ffi_forward(number, 0, x.astype(jnp.float16), idx, gate, False)),
        ("1 arrays for the adapters instead of 0", lambda: ffi_forward(number, 0, x, idx, gate, False, x)),
        ("dy must be like x", lambda: ffi_backward(number, 0, jnp.int32(0), x, idx, gate, x[:3])),
        ("there is no expert store 12345", lambda: ffi_backward(12345, 0, jnp.int32(0), x, idx, gate, x)),
        ("is neither -1", lambda: ffi_forward(number, 0, x, idx + 40, gate, False)),
    ]:
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            jax.block_until_ready(wrong())
    layer.store.close()
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"expert store {number} is closed"):
        jax.block_until_ready(ffi_forward(number, 0, x, idx, gate, False))
