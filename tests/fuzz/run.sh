#!/bin/sh
# Long runs: sanitized tests of kernels and codecs, mutated payloads, mutated models,
# coverage-guided mutations (pip install atheris), sessions.
#
#   tests/fuzz/run.sh [build|tests|kernels|models|reader|sessions ...]     all of them by default
#
# BUILD      where the sanitized libraries go            (build/sanitized)
# PYTHON     interpreter that can import onnxcomp        (python)
# PAYLOADS   mutated payloads for the kernels            (1000000)
# MODELS     mutated models for reader and rewriter      (100000)
# READER     seconds of coverage-guided fuzzing          (300)
# SESSIONS   sessions opened and closed                  (1000)
# SEED       first seed of both                          (1)
set -eu
cd "$(dirname "$0")/../.."
BUILD=${BUILD:-build/sanitized} PYTHON=${PYTHON:-python} SEED=${SEED:-1}
libraries="$BUILD/ops/libonnxcomp_ops.so $BUILD/passes/codecs/hyper/libonnxcomp_encoders.so"
flags="-fsanitize=address,undefined -fno-sanitize-recover=all"

build() {
  # -O1: the intrinsics of some kernels take minutes to compile with checks and more optimisation.
  cmake -S . -B "$BUILD" -DONNXCOMP_SANITIZE=ON -DCMAKE_CXX_FLAGS_RELEASE=-O1
  cmake --build "$BUILD" --parallel "$(nproc)"
  # shellcheck disable=SC2086
  ${CXX:-g++} -std=c++17 -O1 -g -Wall -Wextra $flags -Iops tests/fuzz/kernels.cc \
    -o "$BUILD/kernels" -ldl
}

tests() {
  # Python itself has no sanitizer: its runtime comes first, and its own leaks do not count.
  set -- $libraries
  asan=$(${CXX:-g++} -print-file-name=libasan.so)
  cxx=$(${CXX:-g++} -print-file-name=libstdc++.so)
  LD_PRELOAD="$asan $cxx" ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 \
    UBSAN_OPTIONS=print_stacktrace=1 ONNXCOMP_OPS_LIBRARY="$PWD/$1" \
    ONNXCOMP_ENCODERS_LIBRARY="$PWD/$2" "$PYTHON" -m pytest -q -p no:cacheprovider \
    tests/ops tests/passes/codecs --deselect tests/ops/test_library.py::test_one_symbol_is_exported
}

kernels() {
  set -- $libraries
  "$BUILD/kernels" "$1" "${PAYLOADS:-1000000}" "$SEED"
}

models() {
  "$PYTHON" tests/fuzz/models.py --count "${MODELS:-100000}" --seed "$SEED"
}

reader() {
  if "$PYTHON" -c "import atheris" 2>/dev/null; then
    "$PYTHON" tests/fuzz/reader.py --seconds "${READER:-300}" --seed "$SEED"
  else
    echo "skipped: pip install atheris"
  fi
}

sessions() {
  "$PYTHON" tests/fuzz/sessions.py --count "${SESSIONS:-1000}"
}

[ $# -gt 0 ] || set -- build tests kernels models reader sessions
for step in "$@"; do
  echo "== $step"
  "$step"
done
