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

// Decodes groups of one panel for the tiles: w[(t / 4 * 2 + p) * 64], a dword of 16 rows each.
template <int K, int L>
struct DecodeTile {
  static void Run(const Weight& weight, const Entries& entries, int64_t panel, int panels,
                  int64_t g, uint8_t* w) {
    const int64_t ahead = PairAhead(weight.format, g);
    for (int p = 0; p < panels; ++p, w += kLine) {
      const uint8_t* codes = weight.block(panel + p, g);
      if (L > 8 && weight.levels != nullptr) {
        Panel(LevelLookup<(L > 8 ? L : 10)>(*weight.levels, 0x80), weight.format, codes, ahead, w);
      } else if (L > 8 && entries.odd) {
        Panel(LookupOf<L, (L > 8)>(entries.data), weight.format, codes, ahead, w);
      } else {
        Panel(LookupOf<L, false>(entries.data), weight.format, codes, ahead, w);
      }
    }
  }

 private:
  template <class Table>
  static void Panel(const Table lookup, const Format& format, const uint8_t* codes,
                    int64_t ahead, uint8_t* out) {
    __m512i before = LastDword(codes, format.dwords);
    for (int t = 0; t < format.group; t += kStep, codes += K * kLine) {
      Unit units[4];
      Prefetch<K>(codes + ahead);
      DecodeStep<K>(lookup, codes, before, units);
      for (int u = 0; u < 4; ++u, out += 4 * kLine) {
        _mm512_store_si512(out, FirstHalf(units[u]));
        _mm512_store_si512(out + 2 * kLine, SecondHalf(units[u]));
      }
    }
  }
};

}  // namespace
}  // namespace onnxcomp::hyper
