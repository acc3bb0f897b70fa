// The NEON form. Included by one translation unit for each way to multiply bytes, which defines
// Dot, DotLane and kIsaName.
//
// One group of a panel is decoded into the first-level cache and multiplied from there, whatever
// the number of rows of activations.
#pragma once

#include "hyper/neon_structured.h"

namespace onnxcomp::hyper {
namespace {

// The bytes of one panel's group in the order of Position.
inline void DecodeAny(const Weight& weight, int64_t panel, int64_t group, uint8_t* out) {
  if (weight.structure != nullptr) return DecodeStructuredBytes(weight, panel, group, out);
  DecodeBytes(weight, panel, group, out);
}

// Isa::position.
int Position(const Weight& weight, int t) {
  return weight.structure != nullptr ? StructuredPosition(weight.format, t)
                                     : CutPosition(weight.format, t);
}

constexpr int kTile = 4;  // 4 rows times 16 lanes: 16 accumulators, of 32 registers

// Scales of four rows times 2^-12, exact.
inline float32x4_t LoadScales(const uint16_t* scales) {
  const float16x4_t halves = vreinterpret_f16_u16(vld1_u16(scales));
  return vmulq_n_f32(vcvt_f32_f16(halves), 0x1p-12f);
}

// Four weights of 16 lanes times M rows of activations.
template <int M>
inline void FourInt8(const uint8_t* w, const int8_t* x, int32x4_t (*sums)[kQuarters]) {
  int8x16_t weights[kQuarters];
  for (int q = 0; q < kQuarters; ++q) weights[q] = vreinterpretq_s8_u8(vld1q_u8(w + 16 * q));
  if constexpr (M == kTile) {
    const int8x16_t rows = vld1q_s8(x);
    for (int q = 0; q < kQuarters; ++q) {
      sums[0][q] = DotLane<0>(sums[0][q], weights[q], rows);
      sums[1][q] = DotLane<1>(sums[1][q], weights[q], rows);
      sums[2][q] = DotLane<2>(sums[2][q], weights[q], rows);
      sums[3][q] = DotLane<3>(sums[3][q], weights[q], rows);
    }
  } else {
    for (int i = 0; i < M; ++i) {
      int32_t four;
      std::memcpy(&four, x + 4 * i, sizeof four);
      const int8x16_t row = vreinterpretq_s8_s32(vdupq_n_s32(four));
      for (int q = 0; q < kQuarters; ++q) sums[i][q] = Dot(sums[i][q], weights[q], row);
    }
  }
}

// One tile of M rows over one decoded group of one panel.
template <int M>
void MultiplyInt8(const uint8_t* w, int group, const int8_t* x, const float* x_scales,
                  const uint16_t* stored, float* out) {
  int32x4_t sums[M][kQuarters];
  for (int i = 0; i < M; ++i) {
    for (int q = 0; q < kQuarters; ++q) sums[i][q] = vdupq_n_s32(0);
  }
  for (int t = 0; t < group; t += 4, w += kLine, x += 4 * M) FourInt8<M>(w, x, sums);
  for (int q = 0; q < kQuarters; ++q) {
    const float32x4_t scales = LoadScales(stored + 4 * q);
    for (int i = 0; i < M; ++i) {
      float* y = out + i * 2 * kLanes + 4 * q;
      const float32x4_t scale = vmulq_n_f32(scales, x_scales[i]);
      const float32x4_t term = vmulq_f32(vcvtq_f32_s32(sums[i][q]), scale);
      vst1q_f32(y, vaddq_f32(vld1q_f32(y), term));
    }
  }
}

void ProductInt8(const Weight& weight, const Activations& x, int64_t panel, int panels,
                 int64_t first, int64_t rows, float* out) {
  using Fn = void (*)(const uint8_t*, int, const int8_t*, const float*, const uint16_t*, float*);
  static constexpr Fn kByRows[kTile] = {MultiplyInt8<1>, MultiplyInt8<2>, MultiplyInt8<3>,
                                        MultiplyInt8<4>};
  const Format& format = weight.format;
  alignas(64) uint8_t w[kMaxGroup * kLanes];
  std::memset(out, 0, static_cast<size_t>(rows) * 2 * kLanes * sizeof(float));
  for (int p = 0; p < panels; ++p) {
    for (int64_t g = 0; g < format.groups; ++g) {
      DecodeAny(weight, panel + p, g, w);
      for (int64_t m = 0; m < rows; m += kTile) {
        const Tile tile = TileAt(x, first + m);
        const int64_t unit = tile.unit(g);
        kByRows[tile.rows - 1](w, format.group, x.codes + unit * format.group, x.scales + unit,
                               weight.scale(panel + p, g), out + m * 2 * kLanes + p * kLanes);
      }
    }
  }
}

// Byte J of every dword, as float.
template <int J>
inline float32x4_t Widen(uint8x16_t bytes) {
  const uint32x4_t top = vshlq_n_u32(vreinterpretq_u32_u8(bytes), 24 - 8 * J);
  const int32x4_t masked =
      vreinterpretq_s32_u32(vandq_u32(top, vdupq_n_u32(0xff000000u)));
  return vcvtq_n_f32_s32(masked, 24);
}

// One panel's group as floats: w[t * 16 + lane].
void DecodeFloats(const Weight& weight, int64_t panel, int64_t group, const int16_t* places,
                  float* w) {
  alignas(64) uint8_t bytes[kMaxGroup * kLanes];
  DecodeAny(weight, panel, group, bytes);
  for (int t = 0; t < weight.format.group; t += 4) {
    for (int q = 0; q < kQuarters; ++q) {
      const uint8x16_t four = vld1q_u8(bytes + t / 4 * kLine + 16 * q);
      float* out = w + 4 * q;
      vst1q_f32(out + places[t] * kLanes, Widen<0>(four));
      vst1q_f32(out + places[t + 1] * kLanes, Widen<1>(four));
      vst1q_f32(out + places[t + 2] * kLanes, Widen<2>(four));
      vst1q_f32(out + places[t + 3] * kLanes, Widen<3>(four));
    }
  }
}

// One weight of 16 lanes times M rows of activations.
template <int M>
inline void OneExact(const float* w, const float* x, float32x4_t (*sums)[kQuarters]) {
  for (int q = 0; q < kQuarters; ++q) {
    const float32x4_t weights = vld1q_f32(w + 4 * q);
    if constexpr (M == kTile) {
      const float32x4_t rows = vld1q_f32(x);
      sums[0][q] = vfmaq_laneq_f32(sums[0][q], weights, rows, 0);
      sums[1][q] = vfmaq_laneq_f32(sums[1][q], weights, rows, 1);
      sums[2][q] = vfmaq_laneq_f32(sums[2][q], weights, rows, 2);
      sums[3][q] = vfmaq_laneq_f32(sums[3][q], weights, rows, 3);
    } else {
      for (int i = 0; i < M; ++i) sums[i][q] = vfmaq_n_f32(sums[i][q], weights, x[i]);
    }
  }
}

template <int M>
void MultiplyExact(const float* w, int group, const float* x, const uint16_t* stored, float* out) {
  float32x4_t sums[M][kQuarters];
  for (int i = 0; i < M; ++i) {
    for (int q = 0; q < kQuarters; ++q) sums[i][q] = vdupq_n_f32(0.0f);
  }
  for (int t = 0; t < group; ++t, w += kLanes, x += M) OneExact<M>(w, x, sums);
  for (int q = 0; q < kQuarters; ++q) {
    const float32x4_t scales = LoadScales(stored + 4 * q);
    for (int i = 0; i < M; ++i) {
      float* y = out + i * 2 * kLanes + 4 * q;
      vst1q_f32(y, vfmaq_f32(vld1q_f32(y), sums[i][q], scales));
    }
  }
}

void ProductExact(const Weight& weight, const Activations& x, int64_t panel, int panels,
                  int64_t first, int64_t rows, float* out) {
  using Fn = void (*)(const float*, int, const float*, const uint16_t*, float*);
  static constexpr Fn kByRows[kTile] = {MultiplyExact<1>, MultiplyExact<2>, MultiplyExact<3>,
                                        MultiplyExact<4>};
  const Format& format = weight.format;
  alignas(64) float w[kMaxGroup * kLanes];
  int16_t places[kMaxGroup];
  for (int t = 0; t < format.group; ++t) places[Position(weight, t)] = static_cast<int16_t>(t);
  std::memset(out, 0, static_cast<size_t>(rows) * 2 * kLanes * sizeof(float));
  for (int p = 0; p < panels; ++p) {
    for (int64_t g = 0; g < format.groups; ++g) {
      DecodeFloats(weight, panel + p, g, places, w);
      for (int64_t m = 0; m < rows; m += kTile) {
        const Tile tile = TileAt(x, first + m);
        const float* values = x.values + tile.unit(g) * format.group;
        kByRows[tile.rows - 1](w, format.group, values, weight.scale(panel + p, g),
                               out + m * 2 * kLanes + p * kLanes);
      }
    }
  }
}

// Strides 1 and 2 inside one register. Fused multiply-add with 1 and -1 rounds as the sum and the
// difference do.
inline float32x4_t TransformFour(float32x4_t x) {
  const float32x4_t odd = {1.0f, -1.0f, 1.0f, -1.0f};
  const float32x4_t upper = {1.0f, 1.0f, -1.0f, -1.0f};
  x = vfmaq_f32(vrev64q_f32(x), x, odd);
  return vfmaq_f32(vextq_f32(x, x, 2), x, upper);
}

void Rotate(const float* from, float* to, int group) {
  for (int t = 0; t < group; t += 4) {
    const float32x4_t signs = vcvtq_f32_s32(vmovl_s16(vld1_s16(kSigns.value + t)));
    vst1q_f32(to + t, TransformFour(vmulq_f32(vld1q_f32(from + t), signs)));
  }
  for (int stride = 4; stride < group; stride *= 2) {
    for (int i = 0; i < group; i += 4) {
      if ((i & stride) != 0) continue;
      const float32x4_t a = vld1q_f32(to + i);
      const float32x4_t b = vld1q_f32(to + i + stride);
      vst1q_f32(to + i, vaddq_f32(a, b));
      vst1q_f32(to + i + stride, vsubq_f32(a, b));
    }
  }
}

float Quantize(const float* values, int group, int8_t* codes, int32_t* total) {
  float32x4_t most = vdupq_n_f32(0.0f);
  uint32x4_t finite = vdupq_n_u32(0xffffffffu);
  for (int t = 0; t < group; t += 4) {
    const float32x4_t magnitude = vabsq_f32(vld1q_f32(values + t));
    finite = vandq_u32(finite, vcleq_f32(magnitude, vdupq_n_f32(0x1.fffffep127f)));
    most = vmaxq_f32(most, magnitude);
  }
  const float amax = vmaxvq_f32(most);
  if (vminvq_u32(finite) == 0 || amax < 0x1p-100f) {
    return QuantizeGroup(values, group, codes, total);
  }
  const float inverse = 127.0f / amax;
  int32x4_t sum = vdupq_n_s32(0);
  for (int t = 0; t < group; t += 8) {
    const int32x4_t low = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(values + t), inverse));
    const int32x4_t high = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(values + t + 4), inverse));
    vst1_s8(codes + t, vmovn_s16(vcombine_s16(vmovn_s32(low), vmovn_s32(high))));
    sum = vaddq_s32(sum, vaddq_s32(low, high));
  }
  *total = vaddvq_s32(sum);
  return amax / 127.0f;
}

void FromHalfNeon(const uint16_t* halves, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    vst1q_f32(out + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(halves + i))));
  }
  FromHalf(halves + i, count - i, out + i);
}

void ToHalfNeon(const float* values, int64_t count, uint16_t* out) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    vst1_u16(out + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(values + i))));
  }
  ToHalf(values + i, count - i, out + i);
}

// 32 codes in the order of their positions.
inline int8x16x2_t Moved(const int8_t* codes, const uint8x16x2_t& order) {
  const int8x16x2_t row = vld1q_s8_x2(codes);
  return {{vqtbl2q_s8(row, order.val[0]), vqtbl2q_s8(row, order.val[1])}};
}

inline int32x4_t Dwords(int8x16_t codes) { return vreinterpretq_s32_s8(codes); }

// Isa::place.
void Place(const int8_t* codes, int count, int group, const Layout& layout, int8_t* out) {
  if (count == 3) return PlaceCodes(codes, count, group, layout, out);
  const uint8x16x2_t order = vld1q_u8_x2(layout.order);
  for (int t = 0; t < group; t += 32, codes += 32, out += 32 * count) {
    int8x16x2_t rows[kTile];
    rows[0] = Moved(codes, order);  // there is a row at least
    for (int i = 1; i < count; ++i) rows[i] = Moved(codes + i * group, order);
    for (int half = 0; half < 2; ++half) {
      auto* target = reinterpret_cast<int32_t*>(out + 16 * count * half);
      const int32x4_t first = Dwords(rows[0].val[half]);
      if (count == 1) {
        vst1q_s32(target, first);
      } else if (count == 2) {
        const int32x4x2_t pair{{first, Dwords(rows[1].val[half])}};
        vst2q_s32(target, pair);
      } else {
        const int32x4x4_t four{{first, Dwords(rows[1].val[half]), Dwords(rows[2].val[half]),
                                Dwords(rows[3].val[half])}};
        vst4q_s32(target, four);
      }
    }
  }
}

const Isa& ThisIsa() {
  static const Isa isa{
      kIsaName,
      kTile,
      Position,
      UnsignedBias,
      Rotate,
      FromHalfNeon,
      ToHalfNeon,
      Quantize,
      Place,
      ProductInt8,
      ProductExact,
      DecodePanelRows,
      DecodeOneRow};
  return isa;
}

}  // namespace
}  // namespace onnxcomp::hyper
