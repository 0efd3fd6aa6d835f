#!/usr/bin/env bash
# The C++ programs under sanitizers: scripts/sanitize.sh [address|thread|plain|fuzz]... (default: the first three).
# Address and undefined behaviour: the self-test, fuzzing and refused memory. Threads: the self-test and concurrent calls.
# Plain, without sanitizers: allocations of a steady call and of a first one, which sanitizers would add to.
# KJAX_FUZZ_SECONDS sets how long random products run (60), KJAX_FUZZ_SEED where they begin (the date).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/common.sh
require_compiler

seconds=${KJAX_FUZZ_SECONDS:-60} seed=${KJAX_FUZZ_SEED:-$(date +%Y%m%d)000000}
cmake=$(command -v cmake || true)
if [ -z "$cmake" ]; then  # the one that the installation's build used, or pip's
    [ -x .venv/bin/cmake ] || .venv/bin/python -m pip --disable-pip-version-check install -qq "cmake>=3.18" ||
        die "cmake is missing and cannot be installed: install it and run this again"
    cmake=.venv/bin/cmake
fi

# build NAME SANITIZERS: both programs in build/NAME.
build() {
    say "Building with -fsanitize=${2:-none}."
    "$cmake" -S ext -B "build/$1" -DKJAX_PYTHON=OFF -DKJAX_SANITIZE="$2" >/dev/null
    "$cmake" --build "build/$1" --parallel 2 >/dev/null
}
# check NAME ENVIRONMENT... -- COMMAND: shows the last lines, and everything when it failed.
check() {
    local log=build/$1.log
    shift
    if env "$@" >"$log" 2>&1; then tail -n 1 "$log"; else cat "$log"; die "failed: $*"; fi
}

export ASAN_OPTIONS=abort_on_error=0:allocator_may_return_null=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1
for what in "${@:-address thread plain}"; do for one in $what; do
    case $one in
    address)
        build address address,undefined
        check address build/address/kjax_selftest
        check address build/address/kjax_robust fuzz "$seconds" "$seed"
        check address build/address/kjax_robust refusals
        ;;
    fuzz)
        build address address,undefined
        check address build/address/kjax_robust fuzz "$seconds" "$seed"
        ;;
    thread)
        build thread thread
        check thread KJAX_THREADS=4 build/thread/kjax_selftest
        check thread KJAX_THREADS=5 build/thread/kjax_robust together 20
        ;;
    plain)
        build plain ""
        check plain build/plain/kjax_robust steady
        check plain KJAX_THREADS=64 build/plain/kjax_robust memory
        check plain KJAX_THREADS=3 build/plain/kjax_robust refusals
        ;;
    *) die "sanitize.sh: $one is not address, thread, plain or fuzz" ;;
    esac
done; done
say "No sanitizer had anything to say."
