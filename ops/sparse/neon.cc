// NEON, which every 64-bit ARM has.

#include <arm_neon.h>

#include "common/float16.h"
#include "sparse/format.h"
#include "sparse/shuffles.h"

namespace onnxcomp::sparse {
namespace {

constexpr bool kBiased = false;

struct Line {
  float32x4_t v[4];
};
struct Sums {
  int32x4_t v[4];
};
struct Word {
  int8x16_t v[4];
};

template <class To, class Op>
inline To Each(const Op& op) {
  return To{{op(0), op(1), op(2), op(3)}};
}

inline Line Broadcast(float x) { return Each<Line>([x](int) { return vdupq_n_f32(x); }); }
inline Line Zero() { return Broadcast(0.0f); }
inline Line Load(const float* x) { return Each<Line>([x](int i) { return vld1q_f32(x + 4 * i); }); }
inline void Store(const Line& a, float* x) {
  for (int i = 0; i < 4; ++i) vst1q_f32(x + 4 * i, a.v[i]);
}
inline Line LoadCodes(const int8_t* codes) {
  const int8x16_t bytes = vld1q_s8(codes);
  const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_s8(vget_high_s8(bytes));
  return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(low))),
           vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))),
           vcvtq_f32_s32(vmovl_s16(vget_high_s16(high)))}};
}
inline Line Add(const Line& a, const Line& b) {
  return Each<Line>([&](int i) { return vaddq_f32(a.v[i], b.v[i]); });
}
inline Line Multiply(const Line& a, const Line& b) {
  return Each<Line>([&](int i) { return vmulq_f32(a.v[i], b.v[i]); });
}
inline Line MultiplyAdd(const Line& a, const Line& b, const Line& c) {
  return Each<Line>([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); });
}
inline float Sum(const Line& a) {
  const float32x4_t four = vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
  const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
  return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}

inline Sums Nothing() { return Each<Sums>([](int) { return vdupq_n_s32(0); }); }
inline Word LoadWord(const int8_t* codes) {
  return Each<Word>([codes](int i) { return vld1q_s8(codes + 16 * i); });
}
inline Sums Bias(const Sums& sums, const Word&) { return sums; }
inline Sums Minus(const Sums& sums, const Sums&) { return sums; }

// Neither factor is -128, so a sum of two products fits into 16 bits.
inline int32x4_t Dot16(int32x4_t sums, int8x16_t codes, int8x16_t x) {
  const int16x8_t low = vmull_s8(vget_low_s8(codes), vget_low_s8(x));
  const int16x8_t high = vmull_high_s8(codes, x);
  return vpadalq_s16(sums, vpaddq_s16(low, high));
}
inline Sums Dot(const Sums& sums, const Word& word, const int8_t* x) {
  return Each<Sums>([&](int i) { return Dot16(sums.v[i], word.v[i], vld1q_s8(x + 16 * i)); });
}
inline Line ToLine(const Sums& sums) {
  return Each<Line>([&](int i) { return vcvtq_f32_s32(sums.v[i]); });
}

void Expand(const uint8_t* bits, int64_t words, const int8_t* codes, int8_t* out) {
  const Shuffles& shuffles = AllShuffles();
  for (int64_t i = 0; i < 8 * words; ++i, out += 8) {
    vst1_s8(out, vtbl1_s8(vld1_s8(codes), vreinterpret_s8_u8(vld1_u8(shuffles.places[bits[i]]))));
    codes += __builtin_popcount(bits[i]);
  }
}

void FromHalf(const uint16_t* halves, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = HalfToFloat(halves[i]);
}

}  // namespace
}  // namespace onnxcomp::sparse

#include "sparse/products.h"

namespace onnxcomp::sparse {

const Isa& NeonIsa() {
  static const Isa isa{"neon", 8, 0, Expand, FromHalf, ProductInt8, ProductExact};
  return isa;
}

}  // namespace onnxcomp::sparse
