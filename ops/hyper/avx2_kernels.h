// The AVX2 form. Included by one translation unit for each way to multiply bytes, which defines
//   Dot         sums += four products in every dword of eight rows
//   kBias       0x80 when the weights' bytes are unsigned, else 0
//   kIsaName
//
// One group of a panel is decoded into the first-level cache and multiplied from there, whatever
// the number of rows of activations.
#pragma once

#include "hyper/avx2_decode.h"
#include "hyper/avx2_structured_products.h"
#include "hyper/f16c.h"

namespace onnxcomp::hyper {
namespace {

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
  if (weight.structure != nullptr) {
    return ProductStructured(weight, x, panel, panels, first, rows, out);
  }
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
        const int64_t unit = tile.unit(g);
        kByRows[tile.rows - 1](w, format.group, x.codes + unit * format.group, x.biases + unit,
                               x.scales + unit, weight.scale(panel + p, g),
                               out + m * 2 * kLanes + p * kLanes);
      }
    }
  }
}

// Isa::position.
int Position(const Weight& weight, int t) {
  return weight.structure != nullptr ? StructuredPosition(weight.format, t)
                                     : CutPosition(weight.format, t);
}

// Byte `j` of every dword times 2^24, as float.
inline __m256 Widen(__m256i bytes, int j) {
  const __m256i top = _mm256_sllv_epi32(bytes, _mm256_set1_epi32(24 - 8 * j));
  return _mm256_cvtepi32_ps(_mm256_and_si256(top, _mm256_set1_epi32(static_cast<int>(0xff000000))));
}

// One panel's group as floats times 2^24: w[t * 16 + lane].
void DecodeFloats(const Weight& weight, const Entries* entries, int64_t panel, int64_t group,
                  const int16_t* places, float* w) {
  alignas(64) uint8_t bytes[kMaxGroup * kLanes];
  if (weight.structure != nullptr) {
    DispatchStructured<DecodeWhole>(weight, weight, panel, group, bytes);
  } else {
    DecodeBytes<0>(weight, *entries, panel, group, bytes);
  }
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
  for (int t = 0; t < format.group; ++t) places[Position(weight, t)] = static_cast<int16_t>(t);
  std::memset(out, 0, static_cast<size_t>(rows) * 2 * kLanes * sizeof(float));
  for (int p = 0; p < panels; ++p) {
    for (int64_t g = 0; g < format.groups; ++g) {
      DecodeFloats(weight, &entries, panel + p, g, places, w);
      for (int64_t m = 0; m < rows; m += kTile) {
        const Tile tile = TileAt(x, first + m);
        const float* values = x.values + tile.unit(g) * format.group;
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

// Stride `stride`, a multiple of eight.
inline void TransformOnce(float* x, int stride, int group) {
  for (int i = 0; i < group; i += 8) {
    if ((i & stride) != 0) continue;
    const __m256 a = _mm256_loadu_ps(x + i);
    const __m256 b = _mm256_loadu_ps(x + i + stride);
    _mm256_storeu_ps(x + i, _mm256_add_ps(a, b));
    _mm256_storeu_ps(x + i + stride, _mm256_sub_ps(a, b));
  }
}

// Strides `stride` and twice that, on the way through registers once.
inline void TransformTwice(float* x, int stride, int group) {
  for (int i = 0; i < group; i += 8) {
    if ((i & (3 * stride)) != 0) continue;
    const __m256 a = _mm256_loadu_ps(x + i);
    const __m256 b = _mm256_loadu_ps(x + i + stride);
    const __m256 c = _mm256_loadu_ps(x + i + 2 * stride);
    const __m256 d = _mm256_loadu_ps(x + i + 3 * stride);
    const __m256 ab = _mm256_add_ps(a, b);
    const __m256 ba = _mm256_sub_ps(a, b);
    const __m256 cd = _mm256_add_ps(c, d);
    const __m256 dc = _mm256_sub_ps(c, d);
    _mm256_storeu_ps(x + i, _mm256_add_ps(ab, cd));
    _mm256_storeu_ps(x + i + stride, _mm256_add_ps(ba, dc));
    _mm256_storeu_ps(x + i + 2 * stride, _mm256_sub_ps(ab, cd));
    _mm256_storeu_ps(x + i + 3 * stride, _mm256_sub_ps(ba, dc));
  }
}

void Rotate(const float* from, float* to, int group) {
  for (int t = 0; t < group; t += 8) {
    _mm256_storeu_ps(to + t, TransformEight(_mm256_xor_ps(_mm256_loadu_ps(from + t), SignBits(t))));
  }
  int stride = 8;
  for (; 2 * stride < group; stride *= 4) TransformTwice(to, stride, group);
  if (stride < group) TransformOnce(to, stride, group);
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
  __m128 top = _mm_max_ps(_mm256_castps256_ps128(most), _mm256_extractf128_ps(most, 1));
  top = _mm_max_ps(top, _mm_movehl_ps(top, top));
  const float amax = _mm_cvtss_f32(_mm_max_ss(top, _mm_movehdup_ps(top)));
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
  __m128i parts = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
  parts = _mm_add_epi32(parts, _mm_shuffle_epi32(parts, 0x4e));
  *total = _mm_cvtsi128_si32(_mm_add_epi32(parts, _mm_shuffle_epi32(parts, 0xb1)));
  return amax / 127.0f;
}

// 32 codes in the order of their positions.
class Mover {
 public:
  explicit Mover(const Layout& layout) {
    const __m256i order = LoadDword(layout.order);
    const __m256i upper = _mm256_set_m128i(_mm_set1_epi8(16), _mm_setzero_si128());
    const __m256i half = _mm256_and_si256(order, _mm256_set1_epi8(16));
    const __m256i stays = _mm256_cmpeq_epi8(half, upper);  // does not come from the other half
    const __m256i byte = _mm256_and_si256(order, _mm256_set1_epi8(15));
    const __m256i none = _mm256_set1_epi8(static_cast<char>(0x80));
    here_ = _mm256_blendv_epi8(none, byte, stays);
    there_ = _mm256_blendv_epi8(byte, none, stays);
  }

  __m256i Load(const int8_t* codes) const {
    const __m256i row = LoadDword(reinterpret_cast<const uint8_t*>(codes));
    const __m256i turned = _mm256_permute2x128_si256(row, row, 1);
    return _mm256_or_si256(_mm256_shuffle_epi8(row, here_), _mm256_shuffle_epi8(turned, there_));
  }

 private:
  __m256i here_;
  __m256i there_;
};

inline void StoreCodes(int8_t* out, __m256i codes) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), codes);
}

// Both registers, the dwords of a and b in turn.
inline void StoreTwo(__m256i a, __m256i b, int8_t* out) {
  const __m256i low = _mm256_unpacklo_epi32(a, b);
  const __m256i high = _mm256_unpackhi_epi32(a, b);
  StoreCodes(out, _mm256_permute2x128_si256(low, high, 0x20));
  StoreCodes(out + 32, _mm256_permute2x128_si256(low, high, 0x31));
}

// Four registers, a dword of each in turn.
inline void StoreFour(__m256i a, __m256i b, __m256i c, __m256i d, int8_t* out) {
  const __m256i ac0 = _mm256_unpacklo_epi32(a, c);
  const __m256i ac1 = _mm256_unpackhi_epi32(a, c);
  const __m256i bd0 = _mm256_unpacklo_epi32(b, d);
  const __m256i bd1 = _mm256_unpackhi_epi32(b, d);
  const __m256i first = _mm256_unpacklo_epi32(ac0, bd0);
  const __m256i second = _mm256_unpackhi_epi32(ac0, bd0);
  const __m256i third = _mm256_unpacklo_epi32(ac1, bd1);
  const __m256i fourth = _mm256_unpackhi_epi32(ac1, bd1);
  StoreCodes(out, _mm256_permute2x128_si256(first, second, 0x20));
  StoreCodes(out + 32, _mm256_permute2x128_si256(third, fourth, 0x20));
  StoreCodes(out + 64, _mm256_permute2x128_si256(first, second, 0x31));
  StoreCodes(out + 96, _mm256_permute2x128_si256(third, fourth, 0x31));
}

// Isa::place.
void Place(const int8_t* codes, int count, int group, const Layout& layout, int8_t* out) {
  if (count == 3) return PlaceCodes(codes, count, group, layout, out);
  const Mover mover(layout);
  for (int t = 0; t < group; t += 32, codes += 32, out += 32 * count) {
    const __m256i first = mover.Load(codes);
    if (count == 1) {
      StoreCodes(out, first);
    } else if (count == 2) {
      StoreTwo(first, mover.Load(codes + group), out);
    } else {
      StoreFour(first, mover.Load(codes + group), mover.Load(codes + 2 * group),
                mover.Load(codes + 3 * group), out);
    }
  }
}

const Isa& ThisIsa() {
  static const Isa isa{
      kIsaName,
      kTile,
      Position,
      StructuredBias,
      Rotate,
      FromHalfF16c,
      ToHalfF16c,
      Quantize,
      Place,
      ProductInt8,
      ProductExact,
      DecodePanelRows,
      DecodeOneRow,
      nullptr,
      kUnsignedDot ? nullptr : Calm};
  return isa;
}

}  // namespace
}  // namespace onnxcomp::hyper
