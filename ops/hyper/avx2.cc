// AVX2 without VNNI: |x| times the weights with the sign of x, so that no 16-bit sum saturates
// (2 * 127 * 127 < 2^15), then pairs to 32 bits.

#include "hyper/avx2.h"

#include <immintrin.h>

#include <cstdint>

namespace onnxcomp::hyper {
namespace {

constexpr uint8_t kBias = 0;
constexpr const char* kIsaName = "avx2";

inline void Dot(__m256i& sums, __m256i weights, __m256i x) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(weights, x));
  sums = _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  // Keeps the compiler from starting many products at once, which spills them.
  asm volatile("" : "+x"(sums));
}

}  // namespace
}  // namespace onnxcomp::hyper

#include "hyper/avx2_kernels.h"

namespace onnxcomp::hyper {

const Isa& Avx2Isa() { return ThisIsa(); }

}  // namespace onnxcomp::hyper
