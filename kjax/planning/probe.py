"""This machine's speeds, measured in a few seconds: the experts' kernels, reading memory, and JAX's device."""

import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

WIDTH, HIDDEN, EXPERTS, TOKENS = 1024, 1024, 8, 4096  # 25.8 GFLOP forward over 50 MB of bf16 weights
READ = 1 << 28  # bytes, more than a cache
SAMPLES = 3


def speeds() -> dict[str, float]:
    """Fields of kjax.planning.machine.Machine; the kernels' and the device's as reached, not as on a data sheet."""
    found = {"host_peak": _experts(), "host_bandwidth": _read()}
    return found | _device(found["host_bandwidth"])


def _best(run: Callable[[], object]) -> float:
    """The shortest of some runs, in seconds, after one that does not count."""
    run()
    times = []
    for _ in range(SAMPLES):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def _experts() -> float:
    """Operations per second of a forward pass of bf16 experts with many tokens each."""
    from safetensors.numpy import save_file

    from kjax.offload import ExpertStore, host_experts
    from kjax.offload.store import PROJECTIONS
    from kjax.weights.safetensors import Checkpoint
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as directory:
        weights = {f"{e}.{p}": rng.standard_normal((WIDTH, HIDDEN), np.float32).astype(ml_dtypes.bfloat16)
                   for e in range(EXPERTS) for p in PROJECTIONS}
        save_file(weights, Path(directory) / "model.safetensors")
        with Checkpoint(directory) as files:
            entries = [[{p: files.entry(f"{e}.{p}") for p in PROJECTIONS} for e in range(EXPERTS)]]
            with ExpertStore(entries, check=False) as store:
                x = jnp.asarray(rng.standard_normal((TOKENS, WIDTH), np.float32), jnp.bfloat16)
                idx = (jnp.arange(TOKENS) % EXPERTS)[:, None]
                run = jax.jit(lambda x: host_experts(store, 0, x, idx, jnp.ones((TOKENS, 1))))
                seconds = _best(lambda: run(x).block_until_ready())
    return 6.0 * WIDTH * HIDDEN * TOKENS / seconds


def _read() -> float:
    """Bytes per second that all cores together read."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parts = np.array_split(np.ones(READ // 8, np.int64), threads)
    with ThreadPoolExecutor(threads) as pool:
        return READ / _best(lambda: list(pool.map(np.sum, parts)))


def _device(host_bandwidth: float) -> dict[str, float]:
    """JAX's device: matrix products in bf16 on an accelerator, in fp32 on the CPU, whose compiler widens bf16."""
    on_cpu = jax.default_backend() == "cpu"
    n = 1024 if on_cpu else 8192
    a = jnp.ones((n, n), jnp.float32 if on_cpu else jnp.bfloat16)
    product = jax.jit(lambda a: a @ a)
    found = {"device_peak": 2.0 * n**3 / _best(lambda: product(a).block_until_ready())}
    if on_cpu:
        return found | {"device_bandwidth": host_bandwidth}
    many = jnp.ones(READ // 4, jnp.float32)
    add = jax.jit(lambda many: many + 1)
    found["device_bandwidth"] = 2 * READ / _best(lambda: add(many).block_until_ready())
    there = np.ones(READ // 4, np.float32)
    found["pcie"] = READ / _best(lambda: jax.device_put(there).block_until_ready())
    return found
