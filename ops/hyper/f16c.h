// Conversions between float16 and float32 eight at a time; only for translation units with F16C.
#pragma once

#include <immintrin.h>

#include "hyper/plain.h"

namespace onnxcomp::hyper {
namespace {

inline void FromHalfF16c(const uint16_t* halves, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + i));
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(eight));
  }
  FromHalf(halves + i, count - i, out + i);
}

inline void ToHalfF16c(const float* values, int64_t count, uint16_t* out) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i eight = _mm256_cvtps_ph(_mm256_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), eight);
  }
  ToHalf(values + i, count - i, out + i);
}

}  // namespace
}  // namespace onnxcomp::hyper
