"""Shared fixtures: where real data lies, and an environment in which host calls cannot starve XLA's pool."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import pytest  # noqa: E402

import kjax  # noqa: E402, F401  sets NPROC before JAX starts a backend


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The directory of real datasets, configs and tokenizers; tests that need it skip without it."""
    path = Path(os.environ.get("KJAX_TEST_DATA", Path(__file__).parents[1].parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip("no real data: set KJAX_TEST_DATA")
    return path


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=0, help="of the random models in the parity tests; CI uses 0")
