"""NPROC: set on import, left alone when the user set it, warned about when it comes too late."""

import os
import subprocess
import sys


def run(code, **env):
    environment = {k: v for k, v in os.environ.items() if k != "NPROC"} | env
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
