# Functions shared by the scripts: messages, finding a usable Python, checking the machine. Sourced by bash.

# One line that says what is wrong and what to do, then the end.
die() { printf 'kjax: %s\n' "$*" >&2; exit 1; }
say() { printf '%s\n' "$*"; }

# Why the Python $1 cannot be used, or nothing when it can.
python_problem() {
    "$1" - 2>/dev/null <<'PY' || echo "cannot be run"
import os, sys, sysconfig
if sys.version_info < (3, 11):
    print("is %d.%d, and kjax needs 3.11 or newer" % sys.version_info[:2])
elif sys.maxsize < 2**32:
    print("is a 32-bit build")
else:
    try:
        import ensurepip, venv
    except ImportError:
        print("has no venv or pip module (Debian, Ubuntu: apt-get install python%d.%d-venv)" % sys.version_info[:2])
    else:
        if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
            print("has no C headers (Debian, Ubuntu: apt-get install python%d.%d-dev)" % sys.version_info[:2])
PY
}

# Candidates for version $1 (such as 3.12): on PATH, then those that pyenv installed.
python_candidates() {
    command -v "python$1" || true
    local path
    for path in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1".*/bin/python; do
        if [ -x "$path" ]; then echo "$path"; fi
    done
}

# Prints the first usable Python among the versions given; fails with the reasons in PYTHON_REASONS otherwise.
find_python() {
    local version candidate problem
    PYTHON_REASONS=""
    for version in "$@"; do
        while read -r candidate; do
            [ -n "$candidate" ] || continue
            problem=$(python_problem "$candidate")
            if [ -z "$problem" ]; then PYTHON_FOUND=$candidate; return 0; fi
            PYTHON_REASONS="$PYTHON_REASONS; $candidate $problem"
        done <<<"$(python_candidates "$version")"
    done
    return 1
}

# The Python of the main environment: $KJAX_PYTHON, else 3.11 (the base that CI tests), else a newer one.
choose_python() {
    local problem
    if [ -n "${KJAX_PYTHON:-}" ]; then
        problem=$(python_problem "$KJAX_PYTHON")
        [ -z "$problem" ] || die "KJAX_PYTHON=$KJAX_PYTHON $problem"
        PYTHON_FOUND=$KJAX_PYTHON
    else
        find_python 3.11 3.12 3.13 3.14 3 ||
            die "no usable Python: install Python 3.11 or newer, or set KJAX_PYTHON to one${PYTHON_REASONS}"
    fi
}

require_compiler() {
    local compiler=${CXX:-}
    if [ -n "$compiler" ]; then
        command -v "${compiler%% *}" >/dev/null || die "CXX=$compiler is not a command: set CXX to a C++ compiler"
        return
    fi
    for compiler in c++ g++ clang++; do
        if command -v "$compiler" >/dev/null; then return; fi
    done
    die "no C++ compiler: install one (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++) and run this again"
}

# At least $1 MB free where the project lies, for $2.
require_disk() {
    local free
    free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1024) }')
    [ "$free" -ge "$1" ] || die "$2 needs $1 MB of disk here and $free MB are free: make room and run this again"
}

# A hash of what decides the installation: the build files, the sources of the module, and $1 (Python and extras).
build_hash() {
    "$1" - "$2" <<'PY'
import hashlib, pathlib, sys
digest = hashlib.sha256(f"{sys.version} {sys.argv[1]}".encode())
for path in [pathlib.Path("pyproject.toml"), *sorted(p for p in pathlib.Path("ext").rglob("*") if p.is_file())]:
    digest.update(f"{path}\0".encode() + path.read_bytes())
print(digest.hexdigest())
PY
}
