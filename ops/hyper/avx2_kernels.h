// The AVX2 form. Included by one translation unit for each way to multiply bytes, which defines
//   Dot         sums += four products in every dword of eight rows
//   kBias       0x80 when the weights' bytes are unsigned, else 0
//   kIsaName
//
// One group of a panel is decoded into the first-level cache and multiplied from there, whatever
// the number of rows of activations.
#pragma once

#include "hyper/avx2_decode.h"
#include "hyper/f16c.h"

namespace onnxcomp::hyper {
namespace {

constexpr int kTile = 4;  // 4 rows times 16 lanes: 8 accumulators, of 16 registers

inline __m256i Broadcast(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, sizeof four);
  return _mm256_set1_epi32(four);
}

// Scales of eight rows times 2^-12, exact.
inline __m256 LoadScales(const uint16_t* scales) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales));
  return _mm256_mul_ps(_mm256_cvtph_ps(halves), _mm256_set1_ps(0x1p-12f));
}

// One tile of M rows over one decoded group of one panel.
template <int M>
void MultiplyInt8(const uint8_t* w, int group, const int8_t* x, const int32_t* biases,
                  const float* x_scales, const uint16_t* stored, float* out) {
  __m256i sums[M][2];
#pragma GCC unroll 4
  for (int i = 0; i < M; ++i) {
    sums[i][0] = sums[i][1] = _mm256_set1_epi32(kBias != 0 ? biases[i] : 0);
  }
  for (int t = 0; t < group; t += 4, w += kLine, x += 4 * M) {
    const __m256i w0 = _mm256_load_si256(reinterpret_cast<const __m256i*>(w));
    const __m256i w1 = _mm256_load_si256(reinterpret_cast<const __m256i*>(w + 32));
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) {
      const __m256i four = Broadcast(x + 4 * i);
      Dot(sums[i][0], w0, four);
      Dot(sums[i][1], w1, four);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < M; ++i) {
    for (int half = 0; half < 2; ++half) {
      float* y = out + i * 2 * kLanes + half * 8;
      const __m256 scale =
          _mm256_mul_ps(LoadScales(stored + half * 8), _mm256_set1_ps(x_scales[i]));
      const __m256 term = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[i][half]), scale);
      _mm256_storeu_ps(y, _mm256_add_ps(_mm256_loadu_ps(y), term));
    }
  }
}

void ProductInt8(const Weight& weight, const Activations& x, int64_t panel, int panels,
                 int64_t first, int64_t rows, float* out) {
  using Fn = void (*)(const uint8_t*, int, const int8_t*, const int32_t*, const float*,
                      const uint16_t*, float*);
  static constexpr Fn kByRows[kTile] = {MultiplyInt8<1>, MultiplyInt8<2>, MultiplyInt8<3>,
                                        MultiplyInt8<4>};
  const Format& format = weight.format;
  const Entries entries(weight);
  alignas(64) uint8_t w[kMaxGroup * kLanes];
  std::memset(out, 0, static_cast<size_t>(rows) * 2 * kLanes * sizeof(float));
  for (int p = 0; p < panels; ++p) {
    for (int64_t g = 0; g < format.groups; ++g) {
      DecodeBytes<kBias>(weight, entries, panel + p, g, w);
      for (int64_t m = 0; m < rows; m += kTile) {
        const Tile tile = TileAt(x, first + m);
        const int64_t unit = tile.base + g * tile.rows;
        kByRows[tile.rows - 1](w, format.group, x.codes + unit * format.group, x.biases + unit,
                               x.scales + unit, weight.scale(panel + p, g),
                               out + m * 2 * kLanes + p * kLanes);
      }
    }
  }
}

// Byte `j` of every dword times 2^24, as float.
inline __m256 Widen(__m256i bytes, int j) {
  const __m256i top = _mm256_sllv_epi32(bytes, _mm256_set1_epi32(24 - 8 * j));
  return _mm256_cvtepi32_ps(_mm256_and_si256(top, _mm256_set1_epi32(static_cast<int>(0xff000000))));
}

// One panel's group as floats times 2^24: w[t * 16 + lane].
void DecodeFloats(const Weight& weight, const Entries& entries, int64_t panel, int64_t group,
                  const int16_t* places, float* w) {
  alignas(64) uint8_t bytes[kMaxGroup * kLanes];
  DecodeBytes<0>(weight, entries, panel, group, bytes);
  for (int v = 0; v < weight.format.group / 4; ++v) {
    for (int half = 0; half < 2; ++half) {
      const __m256i four = LoadDword(bytes + v * kLine + half * 32);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        _mm256_store_ps(w + places[4 * v + j] * kLanes + half * 8, Widen(four, j));
      }
    }
  }
}

template <int M>
void MultiplyExact(const float* w, int group, const float* x, const uint16_t* stored, float* out) {
  __m256 sums[M][2][2];  // even and odd weights apart, to hide latency when M is small
#pragma GCC unroll 4
  for (int i = 0; i < M; ++i) {
    for (int half = 0; half < 2; ++half) sums[i][half][0] = sums[i][half][1] = _mm256_setzero_ps();
  }
  constexpr int kChains = M <= 2 ? 2 : 1;
  for (int t = 0; t < group; t += kChains, w += kChains * kLanes, x += kChains * M) {
#pragma GCC unroll 2
    for (int c = 0; c < kChains; ++c) {
      const __m256 w0 = _mm256_load_ps(w + c * kLanes);
      const __m256 w1 = _mm256_load_ps(w + c * kLanes + 8);
#pragma GCC unroll 4
      for (int i = 0; i < M; ++i) {
        const __m256 value = _mm256_set1_ps(x[c * M + i]);
        sums[i][0][c] = _mm256_fmadd_ps(w0, value, sums[i][0][c]);
        sums[i][1][c] = _mm256_fmadd_ps(w1, value, sums[i][1][c]);
      }
    }
  }
  for (int i = 0; i < M; ++i) {
    for (int half = 0; half < 2; ++half) {
      float* y = out + i * 2 * kLanes + half * 8;
      const __m256 scale = _mm256_mul_ps(LoadScales(stored + half * 8), _mm256_set1_ps(0x1p-24f));
      const __m256 sum = _mm256_add_ps(sums[i][half][0], sums[i][half][1]);
      _mm256_storeu_ps(y, _mm256_fmadd_ps(sum, scale, _mm256_loadu_ps(y)));
    }
  }
}

void ProductExact(const Weight& weight, const Activations& x, int64_t panel, int panels,
                  int64_t first, int64_t rows, float* out) {
  using Fn = void (*)(const float*, int, const float*, const uint16_t*, float*);
  static constexpr Fn kByRows[kTile] = {MultiplyExact<1>, MultiplyExact<2>, MultiplyExact<3>,
                                        MultiplyExact<4>};
  const Format& format = weight.format;
  const Entries entries(weight);
  alignas(64) float w[kMaxGroup * kLanes];
  int16_t places[kMaxGroup];
  for (int t = 0; t < format.group; ++t) places[CutPosition(format, t)] = static_cast<int16_t>(t);
  std::memset(out, 0, static_cast<size_t>(rows) * 2 * kLanes * sizeof(float));
  for (int p = 0; p < panels; ++p) {
    for (int64_t g = 0; g < format.groups; ++g) {
      DecodeFloats(weight, entries, panel + p, g, places, w);
      for (int64_t m = 0; m < rows; m += kTile) {
        const Tile tile = TileAt(x, first + m);
        const float* values = x.values + (tile.base + g * tile.rows) * format.group;
        kByRows[tile.rows - 1](w, format.group, values, weight.scale(panel + p, g),
                               out + m * 2 * kLanes + p * kLanes);
      }
    }
  }
}

// One butterfly inside a register: `other` is x with the partners swapped.
template <int Upper>
inline __m256 Butterfly(__m256 x, __m256 other) {
  return _mm256_blend_ps(_mm256_add_ps(x, other), _mm256_sub_ps(other, x), Upper);
}

// Strides 1, 2, 4 inside one register.
inline __m256 TransformEight(__m256 x) {
  x = Butterfly<0xaa>(x, _mm256_permute_ps(x, 0xb1));
  x = Butterfly<0xcc>(x, _mm256_permute_ps(x, 0x4e));
  return Butterfly<0xf0>(x, _mm256_permute2f128_ps(x, x, 1));
}

// Eight weights from t on: the sign bits of those that are negated.
inline __m256 SignBits(int t) {
  const __m128i signs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kSigns.value + t));
  const __m256i top = _mm256_set1_epi32(static_cast<int>(0x80000000u));
  return _mm256_castsi256_ps(_mm256_and_si256(_mm256_cvtepi16_epi32(signs), top));
}

void Rotate(const float* from, float* to, int group) {
  for (int t = 0; t < group; t += 8) {
    _mm256_storeu_ps(to + t, TransformEight(_mm256_xor_ps(_mm256_loadu_ps(from + t), SignBits(t))));
  }
  for (int stride = 8; stride < group; stride *= 2) {
    for (int i = 0; i < group; i += 8) {
      if ((i & stride) != 0) continue;
      const __m256 a = _mm256_loadu_ps(to + i);
      const __m256 b = _mm256_loadu_ps(to + i + stride);
      _mm256_storeu_ps(to + i, _mm256_add_ps(a, b));
      _mm256_storeu_ps(to + i + stride, _mm256_sub_ps(a, b));
    }
  }
}

float Quantize(const float* values, int group, int8_t* codes, int32_t* total) {
  const __m256 magnitude_bits = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  const __m256 largest = _mm256_set1_ps(0x1.fffffep127f);
  __m256 most = _mm256_setzero_ps();
  __m256 finite = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
  for (int t = 0; t < group; t += 8) {
    const __m256 magnitude = _mm256_and_ps(_mm256_loadu_ps(values + t), magnitude_bits);
    finite = _mm256_and_ps(finite, _mm256_cmp_ps(magnitude, largest, _CMP_LE_OQ));
    most = _mm256_max_ps(most, magnitude);
  }
  alignas(32) float lanes[8];
  _mm256_store_ps(lanes, most);
  float amax = 0.0f;
  for (float lane : lanes) amax = lane > amax ? lane : amax;
  if (_mm256_movemask_ps(finite) != 0xff || amax < 0x1p-100f) {
    return QuantizeGroup(values, group, codes, total);
  }
  const __m256 inverse = _mm256_set1_ps(127.0f / amax);
  __m256i sum = _mm256_setzero_si256();
  for (int t = 0; t < group; t += 8) {
    const __m256i wide =
        _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(values + t), inverse));
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(wide),
                                          _mm256_extracti128_si256(wide, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + t), _mm_packs_epi16(words, words));
    sum = _mm256_add_epi32(sum, wide);
  }
  alignas(32) int32_t parts[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(parts), sum);
  *total = 0;
  for (int32_t part : parts) *total += part;
  return amax / 127.0f;
}

const Isa& ThisIsa() {
  static const Isa isa{
      kIsaName,
      kTile,
      CutPosition,
      Rotate,
      FromHalfF16c,
      ToHalfF16c,
      Quantize,
      ProductInt8,
      ProductExact,
      DecodePanelRows,
      DecodeOneRow};
  return isa;
}

}  // namespace
}  // namespace onnxcomp::hyper
