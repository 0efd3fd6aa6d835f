"""The two cases in which a host call can starve XLA's thread pool: one core; many virtual devices with large shards.

Each runs in a process of its own under a timeout: the default transport without any help, pure_callback with the NPROC
that kjax sets on import.
"""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.plain_xla

SCRIPT = """
import os, sys
case, transport = sys.argv[1:]
if case == "one core":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
if transport == "auto":
    os.environ["NPROC"] = str(len(os.sched_getaffinity(0)))  # what XLA would take without kjax
import kjax
import jax, jax.numpy as jnp, numpy as np
import ml_dtypes
from functools import partial
from jax.sharding import Mesh, PartitionSpec as P
from kjax.offload import ExpertStore, host_experts
d = 1024
rng = np.random.default_rng(0)
weights = [rng.standard_normal(shape).astype(np.float32) for shape in [(1, 2, 4, d), (1, 2, 4, d), (1, 2, d, 4)]]
store = ExpertStore.from_arrays(*weights, transport=transport)
devices = jax.devices()
n = 1024 * len(devices)  # 4 MiB of x on each device
x = jnp.ones((n, d), jnp.float32)
idx, gate = jnp.zeros((n, 1), jnp.int32), jnp.ones((n, 1))
def layers(x, idx, gate):
    return jax.lax.scan(lambda x, _: (x + 1e-3 * host_experts(store, 0, x, idx, gate), None), x, None, length=3)[0]
if len(devices) > 1:
    mesh = Mesh(np.array(devices), ("d",))
    layers = jax.shard_map(layers, mesh=mesh, in_specs=P("d"), out_specs=P("d"))
step = jax.jit(jax.grad(lambda x: layers(x, idx, gate).sum()))
for _ in range(2):
    step(x).block_until_ready()
print("finished", len(devices))
"""


@pytest.mark.parametrize("transport", ["auto", "pure_callback"])
@pytest.mark.parametrize("case, devices", [("one core", 1), ("many devices", 8)])
def test_host_calls_finish(case, devices, transport):
    env = {k: v for k, v in os.environ.items() if k not in ("NPROC", "XLA_FLAGS", "KJAX_TRANSPORT")}
    env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    done = subprocess.run([sys.executable, "-c", SCRIPT, case, transport], env=env, timeout=120, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["finished", str(devices)]
