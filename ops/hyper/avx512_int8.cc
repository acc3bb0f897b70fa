// Products with int8 activations, AVX-512 VNNI.
//
// Few rows of activations: decode and multiply in registers while the codes stream in. More rows:
// decode one group of two panels into the first-level cache, then multiply tiles of 12 rows by it.

#include "hyper/avx512.h"
#include "hyper/avx512_block.h"
#include "hyper/plain.h"

namespace onnxcomp::hyper {
namespace {

constexpr int kStreamRows = 4;  // up to here the streaming form is the faster one
constexpr int kTile = 12;       // 12 rows times 2 panels: 24 accumulators

// The builtin makes gcc 12 copy accumulators through the stack; as assembly they stay put.
inline void Dot(__m512i& acc, __m512i weights, __m512i x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(weights), "v"(x));
}

inline void DotBroadcast(__m512i& acc, __m512i weights, const int8_t* x) {
  typedef int32_t Dword __attribute__((aligned(1), may_alias));
  asm("vpdpbusd %2%{1to16%}, %1, %0"
      : "+v"(acc)
      : "v"(weights), "m"(*reinterpret_cast<const Dword*>(x)));
}

inline __m512i Broadcast(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, sizeof four);
  return _mm512_set1_epi32(four);
}

// Sums over one group for one row of activations: eight of them meet eight weights as a qword.
template <int K, class Table>
inline __m512i SumOne(const Table& lookup, const uint8_t* codes, int group, const int8_t* x) {
  __m512i before = LastDword(codes, group * K / 32);
  __m512i lo[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
  __m512i hi[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
  for (int t = 0; t < group; t += kStep, codes += K * kLine, x += kStep) {
    Unit units[4];
    Prefetch<K>(codes + kAhead * kLine);
    DecodeStep<K>(lookup, codes, before, units);
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) {
      int64_t eight;
      std::memcpy(&eight, x + 8 * u, sizeof eight);
      const __m512i values = _mm512_set1_epi64(eight);
      Dot(lo[u % 2], units[u].lo, values);
      Dot(hi[u % 2], units[u].hi, values);
    }
  }
  const Unit sums{_mm512_add_epi32(lo[0], lo[1]), _mm512_add_epi32(hi[0], hi[1])};
  return _mm512_add_epi32(FirstHalf(sums), SecondHalf(sums));
}

// Sums over one group for M interleaved rows of activations.
template <int K, int M, class Table>
inline void SumFew(const Table& lookup, const uint8_t* codes, int group, const int8_t* x,
                   __m512i* sums) {
  __m512i before = LastDword(codes, group * K / 32);
  for (int t = 0; t < group; t += kStep, codes += K * kLine) {
    Unit units[4];
    Prefetch<K>(codes + kAhead * kLine);
    DecodeStep<K>(lookup, codes, before, units);
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u, x += 8 * M) {
      const __m512i first = FirstHalf(units[u]);
      const __m512i second = SecondHalf(units[u]);
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) DotBroadcast(sums[i], first, x + 4 * i);
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) DotBroadcast(sums[i], second, x + 4 * (M + i));
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
    const int64_t unit = tile.unit(g);
    const int8_t* codes = x.codes + unit * format.group;
    __m512i sums[M];
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) sums[i] = _mm512_set1_epi32(x.biases[unit + i]);
    if constexpr (M == 1) {
      const __m512i sum = SumOne<K>(lookup, weight.block(panel, g), format.group, codes);
      sums[0] = _mm512_add_epi32(sums[0], sum);
    } else {
      SumFew<K, M>(lookup, weight.block(panel, g), format.group, codes, sums);
    }
    const uint16_t* stored = weight.scale(panel, g);
    _mm_prefetch(reinterpret_cast<const char*>(stored + 16 * kLanes), _MM_HINT_T0);
    const __m512 scales = LoadScales(stored);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) y[i] = Accumulate(y[i], sums[i], scales, x.scales[unit + i]);
  }
  for (int i = 0; i < M; ++i) _mm512_storeu_ps(out + i * 2 * kLanes, y[i]);
}

template <int K, int L>
struct Stream {
  static void Run(const Weight& weight, const Activations& x, int64_t panel, int panels, Tile tile,
                  float* out) {
    if constexpr (L <= 8) {
      const Entries entries(weight, true);
      Panels(Lookup<L, false>(entries.data), weight, x, panel, panels, tile, out);
    } else {
      if constexpr (kLargeStructures<K, L>) {
        if (weight.structure != nullptr) {
          const StructuredLookup<L> lookup(*weight.structure, 0x80);
          return Panels(lookup, weight, x, panel, panels, tile, out);
        }
      }
      Panels(LevelLookup<L>(*weight.levels, 0x80), weight, x, panel, panels, tile, out);
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

// One tile of M rows times NP panels over one decoded group.
template <int M, int NP>
void Multiply(const uint8_t* w, int group, const int8_t* x, const int32_t* biases,
              const float* x_scales, const __m512* scales, __mmask16 sofar, float* out) {
  __m512i sums[M][NP];
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 2
    for (int p = 0; p < NP; ++p) sums[i][p] = _mm512_set1_epi32(biases[i]);
  }
  for (int t = 0; t < group; t += 4, w += 2 * kLine, x += 4 * M) {
    const __m512i w0 = _mm512_load_si512(w);
    const __m512i w1 = _mm512_load_si512(w + kLine);
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i) {
      const __m512i four = Broadcast(x + 4 * i);
      Dot(sums[i][0], w0, four);
      if constexpr (NP == 2) Dot(sums[i][1], w1, four);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 2
    for (int p = 0; p < NP; ++p) {
      float* y = out + i * 2 * kLanes + p * kLanes;
      _mm512_storeu_ps(y, Accumulate(_mm512_maskz_loadu_ps(sofar, y), sums[i][p], scales[p], x_scales[i]));
    }
  }
}

using MultiplyFn = void (*)(const uint8_t*, int, const int8_t*, const int32_t*, const float*,
                            const __m512*, __mmask16, float*);

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
  const Entries entries(weight, true);
  alignas(64) uint8_t w[kMaxGroup * 2 * kLanes];
  for (int64_t g = 0; g < format.groups; ++g) {
    Dispatch<DecodeTile>(format, weight, entries, panel, panels, g, w);
    const __mmask16 sofar = g == 0 ? 0 : 0xffff;  // `out` starts from zero
    __m512 scales[2];
    for (int p = 0; p < panels; ++p) scales[p] = LoadScales(weight.scale(panel + p, g));
    for (int64_t m = 0; m < rows; m += kTile) {
      const Tile tile = TileAt(x, first + m);
      const int64_t unit = tile.unit(g);
      const MultiplyFn multiply =
          panels == 2 ? MultiplyOf<2>(tile.rows) : MultiplyOf<1>(tile.rows);
      multiply(w, format.group, x.codes + unit * format.group, x.biases + unit, x.scales + unit,
               scales, sofar, out + m * 2 * kLanes);
    }
  }
}

}  // namespace

void ProductInt8Avx512(const Weight& weight, const Activations& x, int64_t panel, int panels,
                       int64_t first, int64_t rows, float* out) {
  const bool large = weight.format.states > 8;
  if (rows > kStreamRows || (large && weight.levels == nullptr && weight.structure == nullptr)) {
    return Tiles(weight, x, panel, panels, first, rows, out);
  }
  Dispatch<Stream>(weight.format, weight, x, panel, panels, TileAt(x, first), out);
}

}  // namespace onnxcomp::hyper
