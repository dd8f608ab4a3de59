#!/usr/bin/env bash
# The kernels' C++ tests in every way this machine can run them: as they ship, under AddressSanitizer and UBSan, under
# ThreadSanitizer, and on emulated processors: old x86 ones, which must not meet an instruction they lack, and 64-bit
# Arm. Arguments go to the programs (--long, --seed N). Builds lie in build/native-*, JOBS compilers at once (all
# cores).
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PATH:$PWD/.venv/bin # cmake comes with the package's own set-up where the system has none
machine=$(uname -m)

fail() { echo "test_native: $*" >&2; exit 1; }
skip() { echo "SKIPPED $*"; }
has() { for tool in "$@"; do command -v "$tool" >/dev/null || return 1; done; }

programs=(kernel_tests encoder_tests)

# build NAME CMAKE_OPTION... : the programs, in build/native-NAME
build() {
    local dir=build/native-$1
    shift
    mkdir -p "$dir"
    if ! { cmake -S . -B "$dir" -DLOOKUPFFN_TORCH=OFF -DLOOKUPFFN_TESTS=ON "$@" &&
        cmake --build "$dir" --parallel "${JOBS:-$(nproc)}"; } >"$dir/build.log" 2>&1; then
        grep -m 5 -iE 'error' "$dir/build.log" >&2 || tail -n 5 "$dir/build.log" >&2
        fail "the build failed. Details: $dir/build.log"
    fi
}

# tests NAME ARGUMENT... : those that were built pass here
tests() {
    local name=$1 program
    shift
    for program in "${programs[@]}"; do "${under[@]}" "build/native-$name/$program" "$@" || return; done
}
under=()

# emulated EMULATOR CPU IMPLEMENTATION NAME ARGUMENT... : the tests pass on this CPU, with this implementation in use
emulated() {
    local emulator=$1 cpu=$2 implementation=$3 output
    shift 3
    echo "== $emulator, $cpu"
    under=("$emulator" -cpu "$cpu")
    if ! output=$(tests "$@" 2> >(grep -v 'TCG doesn.t support' >&2)); then
        echo "$output"
        fail "the tests failed on an emulated $cpu"
    fi
    echo "$output"
    grep -qE "in use: $implementation\$" <<<"$output" || fail "an emulated $cpu should use $implementation"
}

has cmake "${CXX:-c++}" || fail "needs cmake and a C++ compiler: run make test once, or install cmake and g++"

echo "== Release"
build release
tests release "$@"

echo "== AddressSanitizer and UBSan"
build address -DLOOKUPFFN_SANITIZE=address,undefined
UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 tests address "$@"

echo "== ThreadSanitizer"
build thread -DLOOKUPFFN_SANITIZE=thread
# Some releases of ThreadSanitizer cannot live with much randomness of addresses.
if has setarch && setarch -R true 2>/dev/null; then under=(setarch -R); fi
TSAN_OPTIONS=halt_on_error=1 tests thread "$@"

if [[ $machine != x86_64 ]]; then
    skip "emulated x86 processors: this one is $machine"
elif ! has qemu-x86_64; then
    skip "emulated x86 processors: needs qemu-x86_64 (Debian: qemu-user)"
else
    emulated qemu-x86_64 Nehalem scalar release "$@"
    version=$(qemu-x86_64 --version | grep -oE '[0-9]+\.[0-9]+' | head -n 1)
    if [[ $(printf '%s\n' 7.2 "$version" | sort -V | head -n 1) == 7.2 ]]; then
        emulated qemu-x86_64 Haswell avx2 release "$@"
    else
        skip "an emulated Haswell: qemu-x86_64 knows AVX2 from release 7.2 on"
    fi
fi

if ! has aarch64-linux-gnu-g++ qemu-aarch64; then
    skip "emulated Arm processors: needs aarch64-linux-gnu-g++, qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user)"
else
    build aarch64 -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
        -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_EXE_LINKER_FLAGS=-static
    emulated qemu-aarch64 max neon_dot aarch64 "$@"
    emulated qemu-aarch64 cortex-a53 neon aarch64 "$@"
fi
echo "test_native: passed"
