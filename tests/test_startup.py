"""NPROC and JAX's share of a GPU: set on import, left alone when the user chose, warned about when it is too late."""

import os
import subprocess
import sys


def run(code, **env):
    unset = ("NPROC", "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE")
    environment = {k: v for k, v in os.environ.items() if k not in unset} | env
    return subprocess.run([sys.executable, "-W", "always", "-c", code], env=environment, text=True, capture_output=True,
                          check=True)


def test_import_sets_nproc():
    assert run("import kjax, os; print(os.environ['NPROC'])").stdout.strip() == "16"


def test_the_users_nproc_stays():
    assert run("import kjax, os; print(os.environ['NPROC'])", NPROC="3").stdout.strip() == "3"


def test_too_late_is_a_warning():
    done = run("import jax; jax.devices(); import kjax, os; print('NPROC' in os.environ)")
    assert done.stdout.strip() == "False" and "Import kjax first" in done.stderr


def test_import_leaves_the_backend_unstarted():
    done = run("import kjax.offload; from jax._src import xla_bridge as b; print(b.backends_are_initialized())")
    assert done.stdout.strip() == "False"


SHARE = "import kjax, os; print(os.environ.get('XLA_PYTHON_CLIENT_MEM_FRACTION'))"


def test_import_sets_the_share_of_a_gpu():
    assert run(SHARE).stdout.strip() == "0.9"


def test_the_users_share_and_way_of_allocating_stay():
    assert run(SHARE, XLA_PYTHON_CLIENT_MEM_FRACTION="0.5").stdout.strip() == "0.5"
    assert run(SHARE, XLA_PYTHON_CLIENT_PREALLOCATE="false").stdout.strip() == "None"


def test_a_gpu_that_runs_already_is_a_warning_and_a_cpu_is_none():
    late = "import jax; jax.devices(); from jax._src import xla_bridge as b; {}; import kjax"
    assert "GPU" not in run(late.format("pass"), NPROC="16").stderr
    assert "Import kjax first" in run(late.format("b._backends['cuda'] = None"), NPROC="16").stderr
