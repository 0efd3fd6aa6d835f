#!/usr/bin/env bash
# Makes a virtual environment with kjax in it: scripts/setup.sh run|test [VENV [PYTHON]]
# "run" is what the demo needs; "test" adds pytest and the independent oracles (torch, transformers, peft).
# A second call does nothing unless pyproject.toml, ext/ or the Python changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/common.sh

extras=${1:?run or test}
venv=${2:-.venv}
case $extras in run) need=2500 ;; test) need=5000 ;; *) die "setup.sh: $extras is neither run nor test" ;; esac

if [ -n "${3:-}" ]; then KJAX_PYTHON=$3; fi
if [ -x "$venv/bin/python" ] && [ -z "${KJAX_PYTHON:-}" ]; then
    PYTHON_FOUND=$venv/bin/python  # the environment that is there decides
    problem=$(python_problem "$PYTHON_FOUND")
    [ -z "$problem" ] || die "$PYTHON_FOUND $problem: remove the folder $venv (make clean) and run this again"
else
    choose_python
fi

stamp=$venv/.kjax-$extras
hash=$(build_hash "$PYTHON_FOUND" "$extras")
# An environment made for the tests serves the demo too.
for file in "$stamp" "$venv/.kjax-test"; do
    if [ -f "$file" ] && [ "$(cat "$file")" = "$(build_hash "$PYTHON_FOUND" "${file##*.kjax-}")" ]; then exit 0; fi
done

require_compiler
require_disk "${KJAX_MIN_FREE_MB:-$need}" "the installation"
rm -f "$venv"/.kjax-*
if [ ! -x "$venv/bin/python" ]; then
    say "Making $venv with $("$PYTHON_FOUND" --version)."
    "$PYTHON_FOUND" -m venv "$venv" || die "could not make the virtual environment $venv"
fi
python=$venv/bin/python
# Two -q: warnings of the index configuration are not ours; errors still show.
pip() { "$python" -m pip --disable-pip-version-check "$@"; }

extra=""
if [ "$extras" = test ]; then extra="[test]"; fi
say "Installing the dependencies and building ext/ (a few minutes the first time)."
pip install -qq -e ".$extra" || die "the installation failed; the messages above say where"

if [ "$extras" = test ]; then
    # By their names: with the extra [oracle] pip would build ext/ once more.
    mapfile -t oracles < <("$python" -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["oracle"], sep="\n")')
    torch=${oracles[0]}
    # The CPU build is a tenth of the default one's size: from the configured indexes, else from PyTorch's own.
    if pip install -qq "$torch+cpu" 2>/dev/null ||
       pip install -qq --retries 0 --timeout 20 --index-url https://download.pytorch.org/whl/cpu "$torch" 2>/dev/null; then
        pip install -qq "${oracles[@]}" || die "the oracles could not be installed; the messages above say where"
    else
        say "No CPU build of $torch for $("$python" --version): the tests that compare with it are skipped."
        pip install -qq tiktoken || die "tiktoken could not be installed; the messages above say where"
    fi
fi
build_hash "$PYTHON_FOUND" "$extras" >"$stamp"
