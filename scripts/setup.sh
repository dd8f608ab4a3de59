#!/usr/bin/env bash
# Set-up for make: `install VENV` makes a virtual environment with the package and its extras, `install-rivals VENV` adds
# the benchmark's, `check-compiler` says whether torch.compile can build here. Whatever is missing is named in one line;
# pip's own words go to a log.
set -euo pipefail

fail() { echo "setup: $*" >&2; exit 1; }

# The first interpreter that is new enough; PYTHON=... overrides.
find_python() {
    for python in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$python"
            return
        fi
    done
    found=$("${PYTHON:-python3}" --version 2>/dev/null | head -n 1) || true
    fail "needs Python 3.11 or newer; ${PYTHON:-python3} is ${found:-not there}. Set PYTHON=/path/to/python3.11"
}

# pip_install WHAT... : quiet, and one line where it fails.
pip_install() {
    if ! "$venv/bin/python" -m pip install --disable-pip-version-check --retries 2 "$@" >>"$log" 2>&1; then
        if grep -qiE 'connection|resolution|timed out|no matching distribution|network' "$log"; then
            fail "pip could not fetch '${*: -1}': is there a network, and is Python's package index reachable? Details: $log"
        fi
        fail "pip could not install '${*: -1}'. Details: $log"
    fi
}

install() {
    venv=$1 log=$1/setup.log
    python=$(find_python)
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        echo "setup: making $venv with $($python --version)"
        if ! "$python" -m venv --clear "$venv" >/dev/null 2>&1; then
            rm -rf "$venv"
            fail "'$python -m venv' failed: install your system's python3-venv package"
        fi
    fi
    : >"$log"
    echo "setup: installing torch 2.13.0"
    pip_install torch==2.13.0 # first, so that nothing below pulls another build of it
    echo "setup: installing lookupffn with its extras, and building its kernels"
    pip_install scikit-build-core cmake ninja # by hand, because build isolation would fetch another torch
    pip_install --no-build-isolation --editable '.[dev]'
}

install_rivals() {
    venv=$1 log=$1/setup.log
    echo "setup: installing the engines that the benchmark compares with"
    pip_install --no-build-isolation --editable '.[dev,bench]'
}

check_compiler() {
    command -v "${CXX:-g++}" >/dev/null || fail "needs a C++ compiler for torch.compile in the tests; '${CXX:-g++}' is not there. Install g++"
}

cd "$(dirname "$0")/.."
case ${1:-} in
    install) install "$2" ;;
    install-rivals) install_rivals "$2" ;;
    check-compiler) check_compiler ;;
    *) fail "usage: scripts/setup.sh install VENV | install-rivals VENV | check-compiler" ;;
esac
