// AVX-512 with VNNI and VBMI2.

#include <immintrin.h>

#include <cstring>

#include "sparse/format.h"

namespace onnxcomp::sparse {
namespace {

// VPDPBUSD multiplies unsigned with signed bytes: activations count 128 more than they are.
constexpr bool kBiased = true;

using Line = __m512;
using Sums = __m512i;
using Word = __m512i;

inline Line Zero() { return _mm512_setzero_ps(); }
inline Line Load(const float* x) { return _mm512_loadu_ps(x); }
inline void Store(Line a, float* x) { _mm512_storeu_ps(x, a); }
inline Line LoadCodes(const int8_t* codes) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}
inline Line Broadcast(float x) { return _mm512_set1_ps(x); }
inline Line Add(Line a, Line b) { return _mm512_add_ps(a, b); }
inline Line Multiply(Line a, Line b) { return _mm512_mul_ps(a, b); }
inline Line MultiplyAdd(Line a, Line b, Line c) { return _mm512_fmadd_ps(a, b, c); }
inline float Sum(Line a) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

inline __m512i High() { return _mm512_set1_epi8(-128); }  // 128, unsigned
inline Sums Nothing() { return _mm512_setzero_si512(); }
inline Word LoadWord(const int8_t* codes) { return _mm512_loadu_si512(codes); }
inline Sums Bias(Sums sums, Word word) { return _mm512_dpbusd_epi32(sums, High(), word); }
inline Sums Minus(Sums sums, Sums bias) { return _mm512_sub_epi32(sums, bias); }
inline Sums Dot(Sums sums, Word word, const int8_t* x) {
  return _mm512_dpbusd_epi32(sums, _mm512_loadu_si512(x), word);
}
inline Line ToLine(Sums sums) { return _mm512_cvtepi32_ps(sums); }

void Expand(const uint8_t* bits, int64_t words, const int8_t* codes, int8_t* out) {
  for (int64_t i = 0; i < words; ++i, bits += 8, out += kWord) {
    uint64_t word = 0;
    std::memcpy(&word, bits, sizeof word);
    __builtin_prefetch(codes + kAhead, 0, 3);
    if (i % 8 == 0) __builtin_prefetch(bits + kAhead / 4, 0, 3);
    __m512i next = _mm512_loadu_si512(codes);
    // From a register: from memory, the instruction is many times slower on AMD's processors.
    __asm__("" : "+v"(next));
    _mm512_storeu_si512(out, _mm512_maskz_expand_epi8(word, next));
    codes += __builtin_popcountll(word);
  }
}

void FromHalf(const uint16_t* halves, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t left = count - i;
    const auto lanes = static_cast<__mmask16>(left < kLanes ? (1 << left) - 1 : 0xffff);
    const __m256i bits = _mm256_maskz_loadu_epi16(lanes, halves + i);
    _mm512_mask_storeu_ps(out + i, lanes, _mm512_cvtph_ps(bits));
  }
}

}  // namespace
}  // namespace onnxcomp::sparse

#include "sparse/products.h"

namespace onnxcomp::sparse {

const Isa& Avx512Isa() {
  static const Isa isa{"avx512", kWord, -128, Expand, FromHalf, ProductInt8, ProductExact};
  return isa;
}

}  // namespace onnxcomp::sparse
