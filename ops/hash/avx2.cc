// Eight lanes at a time: a line is two registers.

#include <immintrin.h>

#include "hash/format.h"

namespace onnxcomp::hash {
namespace {

constexpr int kTileRows = 6;  // twelve accumulators of sixteen registers
constexpr int kPanels = 1;

struct Line {
  __m256 lo, hi;
};

inline Line Zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Line Load(const float* x) { return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)}; }
inline void Store(Line a, float* x) {
  _mm256_storeu_ps(x, a.lo);
  _mm256_storeu_ps(x + 8, a.hi);
}
inline Line Broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Line Add(Line a, Line b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline Line Multiply(Line a, Line b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
inline Line MultiplyAdd(Line a, Line b, Line c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline Line Flip(Line a) {
  const __m256 minus = _mm256_set1_ps(-0.0f);
  return {_mm256_xor_ps(a.lo, minus), _mm256_xor_ps(a.hi, minus)};
}
inline float WidenOne(float x) { return x; }
inline float WidenOne(uint16_t x) { return _cvtsh_ss(x); }
inline float WidenOne(int8_t x) { return static_cast<float>(x); }
inline Line Widen(const float* x) { return Load(x); }
inline __m256 Eight(const uint16_t* x) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}
inline Line Widen(const uint16_t* x) { return {Eight(x), Eight(x + 8)}; }
inline __m256 Eight(const int8_t* x) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(x));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}
inline Line Widen(const int8_t* x) { return {Eight(x), Eight(x + 8)}; }

}  // namespace
}  // namespace onnxcomp::hash

#include "hash/kernels.h"

namespace onnxcomp::hash {

const Isa& Avx2Isa() {
  static const Isa isa{kTileRows, kPanels, false, Product, ProductInt8, Decode};
  return isa;
}

}  // namespace onnxcomp::hash
