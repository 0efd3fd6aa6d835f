"""What must be in the environment before JAX starts a backend; runs on `import kjax`."""

import os
import sys
import warnings

# Sixteen threads in XLA's CPU pool: pure_callback starves a pool as small as the cores of a small container, and with
# a fixed size XLA splits its reductions the same way, so a CPU run gives the same bits whatever the number of cores.
POOL_THREADS = "16"


def prepare():
    """Set NPROC unless the user did; warn when a backend already runs and the setting comes too late."""
    if "NPROC" in os.environ:
        return
    bridge = sys.modules.get("jax._src.xla_bridge")
    if bridge is not None and bridge.backends_are_initialized():
        warnings.warn(
            "kjax was imported after JAX had started a backend: host calls may hang on few cores, and bits may depend "
            f"on their number. Import kjax first, or set NPROC={POOL_THREADS}.", RuntimeWarning, stacklevel=3)
        return
    os.environ["NPROC"] = POOL_THREADS
