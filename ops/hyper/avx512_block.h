// One group of two panels, decoded for tiles of activations, and what becomes of its sums.
//
// Internal linkage throughout; only for translation units compiled with AVX-512 flags.
#pragma once

#include "hyper/avx512_decode.h"
#include "hyper/plain.h"

namespace onnxcomp::hyper {
namespace {

// y + float(sums) * (scale of the weights * scale of the activations), each step rounded.
inline __m512 Accumulate(__m512 y, __m512i sums, __m512 weights, float x) {
  const __m512 scale = _mm512_mul_ps(weights, _mm512_set1_ps(x));
  return _mm512_add_ps(y, _mm512_mul_ps(_mm512_cvtepi32_ps(sums), scale));
}

// One group as bytes with 0x80 added: w[(t / 4 * 2 + p) * 64], a dword of 16 rows each.
struct UnsignedBytes {
  using Element = uint8_t;
  static constexpr int kPanel = kLine;     // elements from a panel to the next one
  static constexpr int kUnit = 4 * kLine;  // and from eight weights of a row to the next ones
  static constexpr uint8_t kBias = 0x80;

  static void Store(Unit unit, uint8_t* out) {
    _mm512_store_si512(out, FirstHalf(unit));
    _mm512_store_si512(out + 2 * kLine, SecondHalf(unit));
  }
};

template <int K, int L>
using DecodeTile = DecodeBlock<K, L, UnsignedBytes>;

}  // namespace
}  // namespace onnxcomp::hyper
