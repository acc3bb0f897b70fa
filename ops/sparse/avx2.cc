// AVX2 with FMA.

#include <immintrin.h>

#include <cstring>

#include "sparse/format.h"
#include "sparse/shuffles.h"

namespace onnxcomp::sparse {
namespace {

constexpr bool kBiased = false;

struct Line {
  __m256 low, high;
};
struct Sums {
  __m256i low, high;
};
struct Word {
  __m256i low, high;
};

inline __m256i LoadBytes(const int8_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

inline Line Zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Line Load(const float* x) { return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)}; }
inline void Store(const Line& a, float* x) {
  _mm256_storeu_ps(x, a.low);
  _mm256_storeu_ps(x + 8, a.high);
}
inline Line LoadCodes(const int8_t* codes) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
inline Line Broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Line Add(const Line& a, const Line& b) {
  return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
inline Line Multiply(const Line& a, const Line& b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
inline Line MultiplyAdd(const Line& a, const Line& b, const Line& c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline float Sum(const Line& a) {
  const __m256 eight = _mm256_add_ps(a.low, a.high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

inline Sums Nothing() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Word LoadWord(const int8_t* codes) { return {LoadBytes(codes), LoadBytes(codes + 32)}; }
inline Sums Bias(const Sums& sums, const Word&) { return sums; }
inline Sums Minus(const Sums& sums, const Sums&) { return sums; }

// Neither factor is -128, so a sum of two products fits into 16 bits.
inline __m256i Dot32(__m256i sums, __m256i codes, __m256i x) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(codes, x));
  return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
inline Sums Dot(const Sums& sums, const Word& word, const int8_t* x) {
  return {Dot32(sums.low, word.low, LoadBytes(x)), Dot32(sums.high, word.high, LoadBytes(x + 32))};
}
inline Line ToLine(const Sums& sums) {
  return {_mm256_cvtepi32_ps(sums.low), _mm256_cvtepi32_ps(sums.high)};
}

inline __m128i LoadEight(const void* from) {
  return _mm_loadl_epi64(static_cast<const __m128i*>(from));
}

// Two bytes of the mask at a time: the codes of both lie side by side, and one shuffle places them.
void Expand(const uint8_t* bits, int64_t words, const int8_t* codes, int8_t* out) {
  const Shuffles& shuffles = AllShuffles();
  const __m128i upper = _mm_set_epi64x(0x0808080808080808, 0);
  for (int64_t i = 0; i < 4 * words; ++i, bits += 2, out += 16) {
    if (i % 4 == 0) {
      _mm_prefetch(reinterpret_cast<const char*>(codes + kAhead), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(bits + kAhead / 4), _MM_HINT_T0);
    }
    const uint8_t first = bits[0], second = bits[1];
    const int8_t* next = codes + __builtin_popcount(first);
    const __m128i both = _mm_unpacklo_epi64(LoadEight(codes), LoadEight(next));
    const __m128i places = _mm_add_epi8(
        upper, _mm_unpacklo_epi64(LoadEight(shuffles.places[first]),
                                  LoadEight(shuffles.places[second])));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_shuffle_epi8(both, places));
    codes = next + __builtin_popcount(second);
  }
}

void FromHalf(const uint16_t* halves, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + i));
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(bits));
  }
  for (; i < count; ++i) out[i] = _cvtsh_ss(halves[i]);
}

}  // namespace
}  // namespace onnxcomp::sparse

#include "sparse/products.h"

namespace onnxcomp::sparse {

const Isa& Avx2Isa() {
  static const Isa isa{"avx2", 8, 0, Expand, FromHalf, ProductInt8, ProductExact};
  return isa;
}

}  // namespace onnxcomp::sparse
