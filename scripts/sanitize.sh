#!/usr/bin/env bash
# The C++ programs under sanitizers: scripts/sanitize.sh [address|thread|plain|static|emulated|fuzz]... (default: the
# first five).
# Address and undefined behaviour: the self-test on every instruction set, fuzzing and refused memory. Threads: one
# instruction set, as all run on the same threads, and concurrent calls. Without sanitizers: plain counts what a steady
# call and a first one allocate, which sanitizers would add to; static runs the self-test as it is taken elsewhere,
# emulated the AVX-512 kernels and the model of AMX on a CPU that has AVX2 alone.
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

# build NAME SANITIZERS [OPTION...]: both programs in build/NAME.
build() {
    local name=$1 sanitizers=$2 begin=$SECONDS
    shift 2
    say "Building with ${sanitizers:-no} sanitizers."
    local log=build/$name.log
    mkdir -p build
    if ! { "$cmake" -S ext -B "build/$name" -DKJAX_PYTHON=OFF -DKJAX_SANITIZE="$sanitizers" "$@" &&
           "$cmake" --build "build/$name" --parallel 2; } >"$log" 2>&1; then
        cat "$log"
        die "build/$name could not be built"
    fi
    say "  built in $((SECONDS - begin)) s"
}
# check NAME [VARIABLE=VALUE...] COMMAND: shows the last line, and everything when it failed.
check() {
    local log=build/$1.log begin=$SECONDS
    shift
    if env "$@" >"$log" 2>&1; then say "  $(tail -n 1 "$log") ($((SECONDS - begin)) s)"; else cat "$log"; die "failed: $*"; fi
}

isa=scalar  # for threads: the fastest that every x86-64 of the last ten years has
if grep -qw avx2 /proc/cpuinfo 2>/dev/null; then isa=avx2; fi
export ASAN_OPTIONS=abort_on_error=0:allocator_may_return_null=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1
for what in "${@:-address thread plain static emulated}"; do for one in $what; do
    case $one in
    address | fuzz)
        build address address,undefined
        [ "$one" = fuzz ] || check address build/address/kjax_selftest
        check address build/address/kjax_robust fuzz "$seconds" "$seed"
        [ "$one" = fuzz ] || check address build/address/kjax_robust refusals
        ;;
    thread)
        build thread thread
        check thread KJAX_THREADS=4 build/thread/kjax_selftest "$isa"
        check thread KJAX_THREADS=5 build/thread/kjax_robust together 20
        ;;
    plain)
        build plain ""
        check plain build/plain/kjax_robust steady
        check plain build/plain/kjax_robust modes
        check plain build/plain/kjax_robust nodes
        check plain build/plain/kjax_robust files
        check plain KJAX_THREADS=64 build/plain/kjax_robust memory
        check plain KJAX_THREADS=3 build/plain/kjax_robust refusals
        ;;
    static)
        build static "" -DKJAX_STATIC=ON
        if command -v ldd >/dev/null && ldd build/static/kjax_selftest >/dev/null 2>&1; then
            die "build/static/kjax_selftest needs shared libraries"
        fi
        check static build/static/kjax_selftest
        ;;
    emulated)
        if [ "$isa" != avx2 ] || grep -qw avx512_bf16 /proc/cpuinfo; then
            say "The AVX-512 kernels are emulated on CPUs with AVX2 and without AVX-512-BF16; this is none."
            continue
        fi
        python=python3
        [ ! -x .venv/bin/python ] || python=.venv/bin/python
        "$python" -m pip --disable-pip-version-check install -qq --no-deps --upgrade --target build/simde simde-py==0.8.2.post1 ||
            die "SIMDe's headers (simde-py) cannot be installed"
        build emulated "" -DKJAX_EMULATE="$PWD/build/simde/simde_py/simde"
        for emulated in avx512 avx512bf16 amx_soft; do check emulated build/emulated/kjax_selftest "$emulated"; done
        check emulated build/emulated/kjax_robust fuzz "$((seconds / 2))" "$seed"
        ;;
    *) die "sanitize.sh: $one is not address, thread, plain, static, emulated or fuzz" ;;
    esac
done; done
say "Nothing was found."
