#!/usr/bin/env bash
# Runs the tests with an environment's Python: scripts/test.sh VENV [ARGUMENT OF PYTEST]...
# Most programs of the tests run for milliseconds and are compiled for seconds. So what a program computes is tested
# without XLA's optimiser, and what its work decides (bits, training, resuming, memory: marked plain_xla) as users compile.
# JOBS: processes side by side (2), each up to 4 GB; a file stays in one, so that its fixtures are made once.
# KJAX_TEST_MARKS: which of the tests, as pytest's -m.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=$1/bin/python
shift
failed=0 empty=0
# pass MARKS [ARGUMENT]...; pytest ends with 5 where nothing was selected.
pass() {
    local marks=$1 code=0
    shift
    "$python" -m pytest -n "${JOBS:-2}" --dist loadfile -m "$marks${KJAX_TEST_MARKS:+ and ($KJAX_TEST_MARKS)}" "$@" ||
        code=$?
    case $code in 0) ;; 5) empty=$((empty + 1)) ;; *) failed=$code ;; esac
}
pass plain_xla "$@"
for flag in --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false; do
    # An XLA that does not know a flag (any more) ends the process.
    if JAX_PLATFORMS=cpu XLA_FLAGS=$flag "$python" -c "import jax; jax.devices()" >/dev/null 2>&1; then
        export XLA_FLAGS="${XLA_FLAGS:-} $flag"
    fi
done
pass "not plain_xla" "$@"
if [ $empty = 2 ]; then exit 5; fi
exit $failed
