#!/usr/bin/env bash
# Builds the wheels (CPython 3.11; stable ABI for 3.12 and newer) into dist/ and runs the demo from each in a fresh
# environment without a compiler: under the oldest supported jax, and under the newest where a Python >= 3.12 is here.
# Both are built against the FFI header of the oldest jaxlib, which pyproject.toml pins for the build.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/common.sh

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
steps=${KJAX_WHEEL_STEPS:-30}  # of the demo; the full length adds nothing to the check

# build PYTHON NAME: the wheel for that Python's ABI.
build() {
    "$1" -m venv "$work/build-$2"
    say "Building the wheel with $("$1" --version)."
    rm -rf "$work/dist-$2"
    "$work/build-$2/bin/python" -m pip --disable-pip-version-check wheel -qq --no-deps -w "$work/dist-$2" . ||
        die "the wheel could not be built; the messages above say where"
    mkdir -p dist
    cp "$work/dist-$2"/kjax-*.whl dist/
}

# check PYTHON NAME [REQUIREMENT...]: the demo from that wheel, with those requirements.
check() {
    local python=$1 name=$2 place=$work/check-$2
    shift 2
    "$python" -m venv "$place/venv"
    "$place/venv/bin/python" -m pip --disable-pip-version-check install -qq "$work/dist-$name"/kjax-*.whl "$@" ||
        die "the wheel could not be installed; the messages above say where"
    cp -r experiments "$place/experiments"  # away from the sources, so that kjax comes from the wheel
    # One file of kernels per instruction set.
    isas=$(cd ext && for file in gemm_*.cpp; do name=${file#gemm_}; echo "${name%.cpp}"; done)
    (
        cd "$place"
        export PATH="$place/venv/bin"  # no compiler, nor anything else
        unset CC CXX PYTHONPATH
        python - "$place" $isas <<'PY'
import sys
import jax, kjax
from kjax import _ext
place, *wanted = sys.argv[1:]
assert kjax.__file__.startswith(place), kjax.__file__
features = ["avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_vbmi", "amx_tile",
            "amx_bf16", "amx_permission"]
for name in wanted:  # on a CPU that has everything, each must be there to choose
    chosen, reason = _ext.choose_isa(features, name)
    assert chosen == name, f"the wheel lacks the {name} kernels: {reason}"
print(f"kjax from its wheel, Python {sys.version.split()[0]}, jax {jax.__version__}, kernels {', '.join(wanted)}")
PY
        python experiments/demo.py --steps "$steps" --run-dir "$place/run" </dev/null
    ) || die "the demo failed from the wheel ($name)"
}

require_compiler
require_disk "${KJAX_MIN_FREE_MB:-5000}" "building and checking the wheels"
oldest=$(sed -n 's/.*"jaxlib==\([0-9.]*\)".*/\1/p' pyproject.toml)
[ -n "$oldest" ] || die "pyproject.toml does not pin jaxlib for the build"

found=0
if find_python 3.11; then
    found=1
    python=$PYTHON_FOUND
    build "$python" cp311
    check "$python" cp311 "jax==$oldest" "jaxlib==$oldest"
else
    say "No Python 3.11 here: its wheel is not built."
fi
if find_python 3.12 3.13; then
    found=1
    python=$PYTHON_FOUND
    build "$python" abi3
    check "$python" abi3
else
    say "No Python 3.12 or 3.13 here: the wheel for them is not built, and the newest jax is not checked."
fi
[ $found = 1 ] || die "no usable Python: install Python 3.11 or newer"
say "Wheels, each checked by the demo:"
ls -1 dist/kjax-*.whl
