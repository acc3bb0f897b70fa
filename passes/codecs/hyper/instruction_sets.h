// Functions for an instruction set that the rest of a file does not need: all that stands between
// ONNXCOMP_TARGET(set) and ONNXCOMP_END_TARGET is compiled for it.

#pragma once

#include <cstdint>

#include "common/processor.h"

#if defined(ONNXCOMP_X86)
#include <immintrin.h>
#elif defined(ONNXCOMP_ARM64)
#include <arm_neon.h>
#endif

#define ONNXCOMP_AVX2_SETS "avx2,fma"
#define ONNXCOMP_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define ONNXCOMP_TARGET(set) \
  ONNXCOMP_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define ONNXCOMP_END_TARGET _Pragma("clang attribute pop")
#define ONNXCOMP_AVX512_SETS "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni"
#else
#define ONNXCOMP_TARGET(set) _Pragma("GCC push_options") ONNXCOMP_PRAGMA(GCC target(set))
#define ONNXCOMP_END_TARGET _Pragma("GCC pop_options")
// GCC takes vectors of 256 bits for loops without intrinsics unless told otherwise.
#define ONNXCOMP_AVX512_SETS \
  "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,prefer-vector-width=512"
#endif

namespace hyper {

// Instruction sets by number: 0 baseline, 1 AVX2 and FMA, 2 AVX-512 with VNNI; -1 takes the best. Returns
// the number of what to take, -1 where this machine does not have it.
inline int32_t chosen_isa(int32_t isa) {
  int32_t best = 0;
#ifdef ONNXCOMP_X86
  using onnxcomp::X86;
  if (onnxcomp::HasX86({X86::kAvx2, X86::kFma})) best = 1;
  if (best == 1 && onnxcomp::HasX86({X86::kAvx512F, X86::kAvx512Bw, X86::kAvx512Vl, X86::kAvx512Dq,
                                     X86::kAvx512Vnni}))
    best = 2;
#endif
  if (isa == -1) return best;
  return isa >= 0 && isa <= best ? isa : -1;
}

}  // namespace hyper
