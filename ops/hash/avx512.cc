// Sixteen lanes at a time, and products of bytes with VNNI.

#include <immintrin.h>

#include "hash/format.h"

namespace onnxcomp::hash {
namespace {

constexpr int kTileRows = 12;  // times two panels: 24 accumulators
constexpr int kPanels = 2;

using Line = __m512;

inline Line Zero() { return _mm512_setzero_ps(); }
inline Line Load(const float* x) { return _mm512_loadu_ps(x); }
inline void Store(Line a, float* x) { _mm512_storeu_ps(x, a); }
inline Line Broadcast(float x) { return _mm512_set1_ps(x); }
inline Line Add(Line a, Line b) { return _mm512_add_ps(a, b); }
inline Line Multiply(Line a, Line b) { return _mm512_mul_ps(a, b); }
inline Line MultiplyAdd(Line a, Line b, Line c) { return _mm512_fmadd_ps(a, b, c); }
inline Line Flip(Line a) { return _mm512_xor_ps(a, _mm512_set1_ps(-0.0f)); }
inline float WidenOne(float x) { return x; }
inline float WidenOne(uint16_t x) { return _cvtsh_ss(x); }
inline float WidenOne(int8_t x) { return static_cast<float>(x); }
inline Line Widen(const float* x) { return _mm512_loadu_ps(x); }
inline Line Widen(const uint16_t* x) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
inline Line Widen(const int8_t* x) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}

}  // namespace
}  // namespace onnxcomp::hash

#include "hash/kernels.h"

namespace onnxcomp::hash {
namespace {

constexpr int kQuads = kGroup / 4;  // dwords of four columns in a span

// The builtin makes gcc 12 copy accumulators through the stack; as assembly they stay put.
inline void DotBroadcast(__m512i& acc, __m512i weights, const int8_t* x) {
  typedef int32_t Dword __attribute__((aligned(1), may_alias));
  asm("vpdpbusd %2%{1to16%}, %1, %0"
      : "+v"(acc)
      : "v"(weights), "m"(*reinterpret_cast<const Dword*>(x)));
}

inline void Dot(__m512i& acc, __m512i weights, __m512i x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(weights), "v"(x));
}

struct Order {
  alignas(64) uint8_t from[64];
  constexpr Order() : from() {
    for (int i = 0; i < 64; ++i) from[i] = static_cast<uint8_t>(i % 4 * kLanes + i / 4);
  }
};

// Four columns of 16 lanes: the four bytes of a lane become neighbours.
inline __m512i Quad(const int8_t* columns) {
  static constexpr Order kOrder;
  const __m512i bytes = _mm512_loadu_si512(columns);
  return _mm512_permutexvar_epi8(_mm512_load_si512(kOrder.from), bytes);
}

// Bytes plus 128, as the unsigned operand; the sum of the activations takes it away again.
inline __m512i Raise(__m512i bytes) { return _mm512_xor_si512(bytes, _mm512_set1_epi8(-128)); }

inline __m512 AddScaled(__m512 y, __m512i sums, float scale) {
  return _mm512_add_ps(y, _mm512_mul_ps(_mm512_cvtepi32_ps(sums), _mm512_set1_ps(scale)));
}

template <int M>
void StreamInt8(const Weight& weight, const Activations& x, int64_t panel, int64_t first,
                float* out) {
  constexpr int kChains = M == 1 ? 4 : M == 2 ? 2 : 1;
  __m512 y[M];
  for (int i = 0; i < M; ++i) y[i] = _mm512_setzero_ps();
  Steps all(weight, panel);
  for (int64_t span = 0; span < x.spans; ++span) {
    const int count = BlocksOf(weight, span);
    const uint64_t* steps = all.At(span * kSpan);
    const int64_t unit = RowsAt(x, first, span).unit;
    const int8_t* codes = x.codes + unit * kGroup;
    __m512i sums[M * kChains];
    int32_t biases[M] = {};
#pragma GCC unroll 4
    for (int i = 0; i < M * kChains; ++i) sums[i] = _mm512_setzero_si512();
    for (int b = 0; b < count; ++b, codes += kLanes * M) {
      const bool minus = (steps[b] & 1) != 0;
      const int8_t* tile = Slot<int8_t>(weight, steps[b] >> 1);
      const int8_t* four = codes + (minus ? x.negated : 0);
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        const __m512i weights = Raise(Quad(tile + q * 64));
#pragma GCC unroll 4
        for (int i = 0; i < M; ++i, four += 4) {
          DotBroadcast(sums[i * kChains + q % kChains], weights, four);
        }
      }
      for (int i = 0; i < M; ++i) {
        const int32_t sum = x.sums[(unit + i) * kSpan + b];
        biases[i] += minus ? sum : -sum;
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) {
      __m512i sum = _mm512_set1_epi32(128 * biases[i]);
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) sum = _mm512_add_epi32(sum, sums[i * kChains + c]);
      y[i] = AddScaled(y[i], sum, x.scales[unit + i]);
    }
  }
  for (int i = 0; i < M; ++i) _mm512_storeu_ps(out + i * 2 * kLanes, y[i]);
}

// Blocks of one panel as raised dwords with signs: w[(quad * 2) * 64].
void DecodeQuads(const Weight& weight, const uint64_t* steps, int count, uint8_t* w) {
  for (int b = 0; b < count; ++b) {
    const int8_t* tile = Slot<int8_t>(weight, steps[b] >> 1);
    const __mmask64 minus = (steps[b] & 1) != 0 ? ~__mmask64{0} : 0;
    for (int q = 0; q < 4; ++q, w += 2 * 64) {
      const __m512i bytes = Quad(tile + q * 64);
      const __m512i value = _mm512_mask_sub_epi8(bytes, minus, _mm512_setzero_si512(), bytes);
      _mm512_store_si512(w, Raise(value));
    }
  }
}

template <int M, int NP>
void MultiplyQuads(const uint8_t* w, int quads, const int8_t* x, const int32_t* block_sums,
                   const float* scales, float* out) {
  __m512i sums[M][NP];
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i) {
    int32_t bias = 0;
    for (int b = 0; b < kSpan; ++b) bias += block_sums[i * kSpan + b];
#pragma GCC unroll 2
    for (int p = 0; p < NP; ++p) sums[i][p] = _mm512_set1_epi32(-128 * bias);
  }
  for (int q = 0; q < quads; ++q, w += 2 * 64, x += 4 * M) {
    __m512i weights[NP];
#pragma GCC unroll 2
    for (int p = 0; p < NP; ++p) weights[p] = _mm512_load_si512(w + p * 64);
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i) {
      int32_t four;
      std::memcpy(&four, x + 4 * i, sizeof four);
      const __m512i value = _mm512_set1_epi32(four);
#pragma GCC unroll 2
      for (int p = 0; p < NP; ++p) Dot(sums[i][p], weights[p], value);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 2
    for (int p = 0; p < NP; ++p) {
      float* y = out + i * 2 * kLanes + p * kLanes;
      _mm512_storeu_ps(y, AddScaled(_mm512_loadu_ps(y), sums[i][p], scales[i]));
    }
  }
}

using QuadsFn = void (*)(const uint8_t*, int, const int8_t*, const int32_t*, const float*, float*);

template <int NP, int... M>
QuadsFn QuadsOf(int rows, std::integer_sequence<int, M...>) {
  static constexpr QuadsFn kByRows[] = {MultiplyQuads<M + 1, NP>...};
  return kByRows[rows - 1];
}

template <int NP>
QuadsFn QuadsFor(int rows) {
  return QuadsOf<NP>(rows, std::make_integer_sequence<int, kTileRows>());
}

void TilesInt8(const Weight& weight, const Activations& x, int64_t panel, int panels,
               int64_t first, int64_t rows, float* out) {
  alignas(64) uint8_t w[kQuads * 2 * 64];
  std::memset(out, 0, static_cast<size_t>(rows) * 2 * kLanes * sizeof(float));
  Steps steps[2] = {Steps(weight, panel), Steps(weight, panel + panels - 1)};
  for (int64_t span = 0; span < x.spans; ++span) {
    const int count = BlocksOf(weight, span);
    for (int p = 0; p < panels; ++p) {
      DecodeQuads(weight, steps[p].At(span * kSpan), count, w + p * 64);
      FetchSpan(weight, panel + p, span + 1);
    }
    for (int64_t m = 0; m < rows; m += kTileRows) {
      const Rows tile = RowsAt(x, first + m, span);
      const QuadsFn multiply = panels == 2 ? QuadsFor<2>(tile.count) : QuadsFor<1>(tile.count);
      multiply(w, count * 4, x.codes + tile.unit * kGroup, x.sums + tile.unit * kSpan,
               x.scales + tile.unit, out + m * 2 * kLanes);
    }
  }
}

void ProductInt8Dot(const Weight& weight, const Activations& x, int64_t panel, int panels,
                    int64_t first, int64_t rows, float* out) {
  if (x.codes == nullptr) return ProductInt8(weight, x, panel, panels, first, rows, out);
  if (x.rows > kStreamRows) return TilesInt8(weight, x, panel, panels, first, rows, out);
  for (int p = 0; p < panels; ++p, out += kLanes) {
    switch (rows) {
      case 1: StreamInt8<1>(weight, x, panel + p, first, out); break;
      case 2: StreamInt8<2>(weight, x, panel + p, first, out); break;
      case 3: StreamInt8<3>(weight, x, panel + p, first, out); break;
      default: StreamInt8<4>(weight, x, panel + p, first, out); break;
    }
  }
}

}  // namespace

const Isa& Avx512Isa() {
  static const Isa isa{kTileRows, kPanels, true, Product, ProductInt8Dot, Decode};
  return isa;
}

}  // namespace onnxcomp::hash
