// Functions for an instruction set that the rest of a file does not need: all that stands between
// ONNXCOMP_TARGET(set) and ONNXCOMP_END_TARGET is compiled for it.

#pragma once

#include "common/processor.h"

#ifdef ONNXCOMP_X86
#include <immintrin.h>
#endif

#define ONNXCOMP_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define ONNXCOMP_TARGET(set) \
  ONNXCOMP_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define ONNXCOMP_END_TARGET _Pragma("clang attribute pop")
#define ONNXCOMP_AVX512_SETS "avx2,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni"
#else
#define ONNXCOMP_TARGET(set) _Pragma("GCC push_options") ONNXCOMP_PRAGMA(GCC target(set))
#define ONNXCOMP_END_TARGET _Pragma("GCC pop_options")
// GCC takes vectors of 256 bits for loops without intrinsics unless told otherwise.
#define ONNXCOMP_AVX512_SETS \
  "avx2,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,prefer-vector-width=512"
#endif
