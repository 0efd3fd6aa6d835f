"""What must be in the environment before JAX starts a backend; runs on `import kjax`."""

import os
import sys
import warnings

# Sixteen threads in XLA's CPU pool: pure_callback starves a pool as small as the cores of a small container, and with
# a fixed size XLA splits its reductions the same way, so a CPU run gives the same bits whatever the number of cores.
POOL_THREADS = "16"
# JAX takes three quarters of a GPU's memory unless told otherwise. What it does not get is for the CUDA context and the
# libraries, CONTEXT bytes: a tenth is that much on every GPU from 11 GB on.
FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
DEVICE_SHARE = 0.9
CONTEXT = 2**30
# Other ways to say how much of the GPU JAX takes: whoever uses one has chosen.
CHOSEN = ("XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_ALLOCATOR", "XLA_CLIENT_MEM_FRACTION")


def prepare():
    """Set what the user did not; warn when a backend already runs and a setting comes too late."""
    bridge = sys.modules.get("jax._src.xla_bridge")
    late = bridge is not None and bridge.backends_are_initialized()
    if "NPROC" not in os.environ:
        if late:
            warnings.warn(
                "kjax was imported after JAX had started a backend: host calls may hang on few cores, and bits may "
                f"depend on their number. Import kjax first, or set NPROC={POOL_THREADS}.", RuntimeWarning,
                stacklevel=3)
        else:
            os.environ["NPROC"] = POOL_THREADS
    if FRACTION not in os.environ and not any(name in os.environ for name in CHOSEN):
        if not late:
            os.environ[FRACTION] = str(DEVICE_SHARE)
        elif accelerated(bridge):
            warnings.warn(
                "kjax was imported after JAX had started a GPU: JAX takes three quarters of its memory, less than "
                f"plans count on. Import kjax first, or set {FRACTION}={DEVICE_SHARE}.", RuntimeWarning, stacklevel=3)


def accelerated(bridge) -> bool:
    """Whether one of the backends that run is no CPU."""
    return any(name != "cpu" for name in getattr(bridge, "_backends", {}))
