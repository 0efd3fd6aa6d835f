"""What the set-up says, in one line, when the machine lacks something."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def bash(command: str, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", "-c", f"set -euo pipefail; . scripts/common.sh; {command}"], cwd=ROOT, text=True,
                          capture_output=True, timeout=60, env={**os.environ, **environment})


def one_line(done: subprocess.CompletedProcess) -> str:
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("kjax: "), done.stderr
    return done.stderr


@pytest.fixture
def tools(tmp_path) -> Path:
    """A directory with the few commands that the scripts use and no compiler."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bash", "dirname", "df", "awk", "cat"):
        (folder / name).symlink_to(subprocess.check_output(["bash", "-c", f"command -v {name}"], text=True).strip())
    return folder


def fake_python(folder: Path, name: str, answer: str) -> Path:
    """A Python that answers the check of the set-up so."""
    path = folder / name
    path.write_text(f"#!/bin/sh\ncat >/dev/null\necho '{answer}'\n")
    path.chmod(0o755)
    return path


def test_missing_compiler(tools):
    environment = {"PATH": str(tools), "CXX": ""}
    assert "no C++ compiler: install one" in one_line(bash("require_compiler", **environment))
    (tools / "g++").symlink_to("/bin/true")
    assert bash("require_compiler", **environment).returncode == 0


def test_compiler_named_by_the_environment(tools):
    assert "CXX=nosuch -O2 is not a command" in one_line(bash("require_compiler", PATH=str(tools), CXX="nosuch -O2"))


def test_old_python(tmp_path):
    old = fake_python(tmp_path, "python3", "is 3.9, and kjax needs 3.11 or newer")
    assert "is 3.9, and kjax needs 3.11 or newer" in one_line(bash("choose_python", KJAX_PYTHON=str(old)))


def test_the_version_check_itself(tmp_path):
    """The check runs in the Python it judges; here with its version made old."""
    site = tmp_path / "sitecustomize.py"
    site.write_text("import sys\nsys.version_info = (3, 9, 1)\n")
    done = bash(f"python_problem {sys.executable}", PYTHONPATH=str(tmp_path))
    assert done.stdout == "is 3.9, and kjax needs 3.11 or newer\n"
    site.write_text("import sys\nsys.modules['ensurepip'] = None\n")
    done = bash(f"python_problem {sys.executable}", PYTHONPATH=str(tmp_path))
    assert "has no venv or pip module" in done.stdout
    assert bash(f"python_problem {sys.executable}").stdout == ""


def test_no_python_at_all(tools, tmp_path):
    environment = {"PATH": str(tools), "PYENV_ROOT": str(tmp_path / "none"), "KJAX_PYTHON": ""}
    assert "no usable Python: install Python 3.11 or newer" in one_line(bash("choose_python", **environment))


def test_python_of_pyenv_is_found(tools, tmp_path):
    folder = tmp_path / "pyenv" / "versions" / "3.12.9" / "bin"
    folder.mkdir(parents=True)
    python = fake_python(folder, "python", "")
    python.write_text("#!/bin/sh\ncat >/dev/null\n")  # no problem found
    done = bash("find_python 3.11 3.12 && echo $PYTHON_FOUND", PATH=str(tools), PYENV_ROOT=str(tmp_path / "pyenv"))
    assert done.stdout.strip() == str(python)


def test_little_disk(tools):
    message = one_line(bash("require_disk 100000000000 'the installation'"))
    assert "the installation needs 100000000000 MB of disk" in message and "make room" in message
    assert bash("require_disk 1 'the installation'").returncode == 0


def test_installation_is_redone_when_the_sources_change(tmp_path):
    (tmp_path / "ext").mkdir()
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    source = tmp_path / "ext" / "a.cpp"
    source.write_text("int a;\n")

    def stamp(extras: str) -> str:
        script = f". {ROOT / 'scripts' / 'common.sh'}; build_hash python3 {extras}"
        return subprocess.check_output(["bash", "-c", script], cwd=tmp_path, text=True)

    before = stamp("run")
    assert before == stamp("run") and len(before.strip()) == 64
    assert before != stamp("test")
    source.write_text("int b;\n")
    assert before != stamp("run")
