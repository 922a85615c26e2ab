#!/usr/bin/env bash
# The native tests under a sanitizer or valgrind:
#
#     sanitize.sh thread|address|valgrind [stress|interface] [BUILD]
#
# `stress` has an engine without a model, `interface` runs over the ONNX Runtime that FRAMESTEP_ONNXRUNTIME names; without
# either both run, where the checker can. `address` looks for undefined behaviour as well. What ONNX Runtime itself
# and the loader do is left out by suppressions, which name them only. Ends with 0 where nothing was found.
set -euo pipefail
kind=${1:?thread, address or valgrind}
tests=${2:-both}
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)
build=${3:-$root/build/native-$kind}
bundle=$root/tests/data/steps.bundle
states=$(mktemp -d)
trap 'rm -rf "$states"' EXIT

case $kind in
    thread) flags=thread checker=() ;;
    address) flags=address,undefined checker=() ;;
    valgrind)
        flags=
        checker=(valgrind --quiet --error-exitcode=9 --leak-check=full --show-leak-kinds=definite,indirect
            --errors-for-leak-kinds=definite,indirect --fair-sched=yes --suppressions="$here/valgrind.supp")
        ;;
    *) echo "sanitize.sh: '$kind' is unknown; expected thread, address or valgrind" >&2; exit 2 ;;
esac
export TSAN_OPTIONS="halt_on_error=1 second_deadlock_stack=1"
export ASAN_OPTIONS="detect_leaks=1 detect_stack_use_after_return=1 check_initialization_order=1"
export LSAN_OPTIONS="suppressions=$here/leak.supp print_suppressions=0"
export UBSAN_OPTIONS="print_stacktrace=1"

build_target() {
    cmake -S "$here/.." -B "$build" -DFRAMESTEP_TESTS=ON -DFRAMESTEP_TENSORRT=OFF "-DFRAMESTEP_SANITIZE=$flags" \
        -DCMAKE_BUILD_TYPE=Debug "-DCMAKE_CXX_FLAGS_DEBUG=-O0 -g1" "-DCMAKE_C_FLAGS_DEBUG=-O0 -g1" >"$build.log" 2>&1 &&
        cmake --build "$build" --parallel 2 --target "$1" >>"$build.log" 2>&1 || { cat "$build.log" >&2; exit 3; }
}

mkdir -p "$build"
if [ "$tests" != interface ]; then
    build_target framestep_stress
    "${checker[@]}" "$build/tests/framestep_stress" "$bundle" "$states"
fi
if [ "$tests" != stress ] && [ "$kind" != thread ]; then
    build_target framestep_interface
    "${checker[@]}" "$build/tests/framestep_interface" "$bundle" "${FRAMESTEP_ONNXRUNTIME:?path of libonnxruntime.so}" "$states"
fi
