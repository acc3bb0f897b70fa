// Products in float32, AVX-512.
//
// A decoded byte is moved to the top of a dword and converted from there: one shuffle instead of
// two shifts, and the factor 2^24 goes into the scale.

#include "hyper/avx512.h"
#include "hyper/avx512_decode.h"
#include "hyper/plain.h"

namespace onnxcomp::hyper {
namespace {

constexpr int kStreamRows = 4;
constexpr int kTile = 12;

// Byte J of every dword times 2^24, as float.
template <int J>
inline __m512 Widen(__m512i bytes) {
  constexpr int kZero = 0x80;
  const __m128i control = _mm_set_epi8(
      12 + J, kZero - 256, kZero - 256, kZero - 256, 8 + J, kZero - 256, kZero - 256, kZero - 256,
      4 + J, kZero - 256, kZero - 256, kZero - 256, J, kZero - 256, kZero - 256, kZero - 256);
  return _mm512_cvtepi32_ps(_mm512_shuffle_epi8(bytes, _mm512_broadcast_i32x4(control)));
}

// Four weights of 16 rows times M interleaved rows of activations; sums[i * 4 + j] for weight j.
template <int M>
inline void FourWeights(__m512i bytes, const float* x, __m512* sums) {
  const __m512 w[4] = {Widen<0>(bytes), Widen<1>(bytes), Widen<2>(bytes), Widen<3>(bytes)};
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) {
      __m512& sum = sums[i * 4 + j];
      sum = _mm512_fmadd_ps(w[j], _mm512_set1_ps(x[j * M + i]), sum);
    }
  }
}

template <int K, int M, class Table>
inline void SumGroup(const Table& lookup, const uint8_t* codes, int group, const float* x,
                     __m512* sums) {
  __m512i before = LastDword(codes, group * K / 32);
  for (int t = 0; t < group; t += kStep, codes += K * kLine) {
    Unit units[4];
    Prefetch<K>(codes + kAhead * kLine);
    DecodeStep<K>(lookup, codes, before, units);
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u, x += 8 * M) {
      FourWeights<M>(FirstHalf(units[u]), x, sums);
      FourWeights<M>(SecondHalf(units[u]), x + 4 * M, sums);
    }
  }
}

template <int K, int M, class Table>
inline void StreamPanel(const Table& lookup, const Weight& weight, const Activations& x,
                        int64_t panel, Tile tile, float* out) {
  const Format& format = weight.format;
  __m512 y[M];
  for (int i = 0; i < M; ++i) y[i] = _mm512_setzero_ps();
  for (int64_t g = 0; g < format.groups; ++g) {
    __m512 sums[M * 4];
#pragma GCC unroll 16
    for (int i = 0; i < M * 4; ++i) sums[i] = _mm512_setzero_ps();
    const float* values = x.values + tile.unit(g) * format.group;
    SumGroup<K, M>(lookup, weight.block(panel, g), format.group, values, sums);
    const uint16_t* stored = weight.scale(panel, g);
    _mm_prefetch(reinterpret_cast<const char*>(stored + 16 * kLanes), _MM_HINT_T0);
    const __m512 scales = _mm512_mul_ps(LoadScales(stored), _mm512_set1_ps(0x1p-24f));
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) {
      const __m512* four = sums + i * 4;
      const __m512 sum = _mm512_add_ps(_mm512_add_ps(four[0], four[1]),
                                       _mm512_add_ps(four[2], four[3]));
      y[i] = _mm512_fmadd_ps(sum, scales, y[i]);
    }
  }
  for (int i = 0; i < M; ++i) _mm512_storeu_ps(out + i * 2 * kLanes, y[i]);
}

template <int K, int L>
struct Stream {
  static void Run(const Weight& weight, const Activations& x, int64_t panel, int panels, Tile tile,
                  float* out) {
    if constexpr (L <= 8) {
      const Entries entries(weight, false);
      Panels(Lookup<L, false>(entries.data), weight, x, panel, panels, tile, out);
    } else {
      Panels(LevelLookup<L>(*weight.levels, 0), weight, x, panel, panels, tile, out);
    }
  }

 private:
  template <class Table>
  static void Panels(const Table lookup, const Weight& weight, const Activations& x, int64_t panel,
                     int panels, Tile tile, float* out) {
    for (int p = 0; p < panels; ++p, out += kLanes) {
      switch (tile.rows) {
        case 1: StreamPanel<K, 1>(lookup, weight, x, panel + p, tile, out); break;
        case 2: StreamPanel<K, 2>(lookup, weight, x, panel + p, tile, out); break;
        case 3: StreamPanel<K, 3>(lookup, weight, x, panel + p, tile, out); break;
        default: StreamPanel<K, 4>(lookup, weight, x, panel + p, tile, out); break;
      }
    }
  }
};

// One group of up to two panels as floats: w[(t * 2 + p) * 16 + lane], times 2^24.
struct Floats {
  using Element = float;
  static constexpr int kPanel = kLanes;
  static constexpr int kUnit = 16 * kLanes;
  static constexpr uint8_t kBias = 0;

  static void Store(Unit unit, float* out) {
    StoreFour(FirstHalf(unit), out);
    StoreFour(SecondHalf(unit), out + 8 * kLanes);
  }

 private:
  static void StoreFour(__m512i bytes, float* out) {
    _mm512_store_ps(out, Widen<0>(bytes));
    _mm512_store_ps(out + 2 * kLanes, Widen<1>(bytes));
    _mm512_store_ps(out + 4 * kLanes, Widen<2>(bytes));
    _mm512_store_ps(out + 6 * kLanes, Widen<3>(bytes));
  }
};

template <int K, int L>
using DecodeTile = DecodeBlock<K, L, Floats>;

// One tile of M rows times NP panels over one decoded group.
template <int M, int NP>
void Multiply(const float* w, int group, const float* x, const __m512* scales, __mmask16 sofar,
              float* out) {
  __m512 sums[M][NP];
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 2
    for (int p = 0; p < NP; ++p) sums[i][p] = _mm512_setzero_ps();
  }
  for (int t = 0; t < group; ++t, w += 2 * kLanes, x += M) {
    const __m512 w0 = _mm512_load_ps(w);
    const __m512 w1 = _mm512_load_ps(w + kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i) {
      const __m512 value = _mm512_set1_ps(x[i]);
      sums[i][0] = _mm512_fmadd_ps(w0, value, sums[i][0]);
      if constexpr (NP == 2) sums[i][1] = _mm512_fmadd_ps(w1, value, sums[i][1]);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 2
    for (int p = 0; p < NP; ++p) {
      float* y = out + i * 2 * kLanes + p * kLanes;
      _mm512_storeu_ps(y, _mm512_fmadd_ps(sums[i][p], scales[p], _mm512_maskz_loadu_ps(sofar, y)));
    }
  }
}

using MultiplyFn = void (*)(const float*, int, const float*, const __m512*, __mmask16, float*);

template <int NP>
MultiplyFn MultiplyOf(int rows) {
  static constexpr MultiplyFn kByRows[kTile] = {
      Multiply<1, NP>, Multiply<2, NP>, Multiply<3, NP>,  Multiply<4, NP>,
      Multiply<5, NP>, Multiply<6, NP>, Multiply<7, NP>,  Multiply<8, NP>,
      Multiply<9, NP>, Multiply<10, NP>, Multiply<11, NP>, Multiply<12, NP>};
  return kByRows[rows - 1];
}

void Tiles(const Weight& weight, const Activations& x, int64_t panel, int panels, int64_t first,
           int64_t rows, float* out) {
  const Format& format = weight.format;
  const Entries entries(weight, false);
  alignas(64) float w[kMaxGroup * 2 * kLanes];
  for (int64_t g = 0; g < format.groups; ++g) {
    Dispatch<DecodeTile>(format, weight, entries, panel, panels, g, w);
    const __mmask16 sofar = g == 0 ? 0 : 0xffff;  // `out` starts from zero
    __m512 scales[2];
    for (int p = 0; p < panels; ++p) {
      scales[p] =
          _mm512_mul_ps(LoadScales(weight.scale(panel + p, g)), _mm512_set1_ps(0x1p-24f));
    }
    for (int64_t m = 0; m < rows; m += kTile) {
      const Tile tile = TileAt(x, first + m);
      const float* values = x.values + tile.unit(g) * format.group;
      const MultiplyFn multiply =
          panels == 2 ? MultiplyOf<2>(tile.rows) : MultiplyOf<1>(tile.rows);
      multiply(w, format.group, values, scales, sofar, out + m * 2 * kLanes);
    }
  }
}

}  // namespace

void ProductExactAvx512(const Weight& weight, const Activations& x, int64_t panel, int panels,
                        int64_t first, int64_t rows, float* out) {
  const bool large = weight.format.states > 8;
  if (rows > kStreamRows || (large && weight.levels == nullptr)) {
    return Tiles(weight, x, panel, panels, first, rows, out);
  }
  Dispatch<Stream>(weight.format, weight, x, panel, panels, TileAt(x, first), out);
}

}  // namespace onnxcomp::hyper
