// Portable pieces that every instruction set may fall back to.
//
// Internal linkage throughout: each translation unit gets its own copy, compiled with its own flags.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/float16.h"
#include "hyper/format.h"

namespace onnxcomp::hyper {
namespace {

// One row's bit string in one group: dword d lies 64 d bytes after the first.
inline uint32_t DwordOf(const uint8_t* lane, int d) {
  uint32_t dword;
  std::memcpy(&dword, lane + d * kLine, sizeof dword);
  return dword;
}

// q[t * stride] = table[s_t] for 32 weights of one row; `before` is the dword before `lane`.
template <int K, int L, class T>
inline uint32_t DecodeStepLane(const uint8_t* lane, uint32_t before, const int8_t* table, T* q,
                               int stride) {
  constexpr uint32_t kMask = (1u << L) - 1;
  uint64_t pairs[K];
  for (int d = 0; d < K; ++d) {
    const uint32_t now = DwordOf(lane, d);
    pairs[d] = before | static_cast<uint64_t>(now) << 32;
    before = now;
  }
#pragma GCC unroll 32
  for (int t = 0; t < 32; ++t) {
    // A window starts at most 12 bits before it ends: never before the dword before its last.
    const int last = ((t + 1) * K - 1) / 32;
    const int shift = (t + 1) * K - L - 32 * (last - 1);
    q[t * stride] = table[static_cast<uint32_t>(pairs[last] >> shift) & kMask];
  }
  return before;
}

template <int K, int L, class T>
void DecodeLaneOf(int group, const uint8_t* lane, const int8_t* table, T* q, int stride) {
  uint32_t before = DwordOf(lane, group * K / 32 - 1);
  for (int t = 0; t < group; t += 32, lane += K * kLine) {
    before = DecodeStepLane<K, L>(lane, before, table, q + t * stride, stride);
  }
}

// Place of L among 6, 7, 8, 10, 12.
inline int StatesIndex(const Format& format) {
  return format.states <= 8 ? format.states - 6 : format.states / 2 - 2;
}

// q[t * stride] = table[s_t] for all weights of one row's group.
template <class T>
inline void DecodeLane(const Format& format, const uint8_t* lane, const int8_t* table, T* q,
                       int stride) {
  using Fn = void (*)(int, const uint8_t*, const int8_t*, T*, int);
  // By bits and states; null where L >= k + 2 does not hold, which never gets here.
  static constexpr Fn kByFormat[6][5] = {
      {DecodeLaneOf<1, 6, T>, DecodeLaneOf<1, 7, T>, DecodeLaneOf<1, 8, T>,
       DecodeLaneOf<1, 10, T>, DecodeLaneOf<1, 12, T>},
      {DecodeLaneOf<2, 6, T>, DecodeLaneOf<2, 7, T>, DecodeLaneOf<2, 8, T>,
       DecodeLaneOf<2, 10, T>, DecodeLaneOf<2, 12, T>},
      {DecodeLaneOf<3, 6, T>, DecodeLaneOf<3, 7, T>, DecodeLaneOf<3, 8, T>,
       DecodeLaneOf<3, 10, T>, DecodeLaneOf<3, 12, T>},
      {DecodeLaneOf<4, 6, T>, DecodeLaneOf<4, 7, T>, DecodeLaneOf<4, 8, T>,
       DecodeLaneOf<4, 10, T>, DecodeLaneOf<4, 12, T>},
      {nullptr, DecodeLaneOf<5, 7, T>, DecodeLaneOf<5, 8, T>, DecodeLaneOf<5, 10, T>,
       DecodeLaneOf<5, 12, T>},
      {nullptr, nullptr, DecodeLaneOf<6, 8, T>, DecodeLaneOf<6, 10, T>, DecodeLaneOf<6, 12, T>}};
  kByFormat[format.bits - 1][StatesIndex(format)](format.group, lane, table, q, stride);
}

// Strides 1, 2 and 4 of eight integers, at distances of 4, 2, 1 so that halves move together.
inline void TransformEightInt16(int16_t* q) {
  int a[8];
  int b[8];
  for (int i = 0; i < 4; ++i) {
    a[i] = q[i] + q[i + 4];
    a[i + 4] = q[i] - q[i + 4];
  }
  for (int half = 0; half < 8; half += 4) {
    for (int i = half; i < half + 2; ++i) {
      b[i] = a[i] + a[i + 2];
      b[i + 2] = a[i] - a[i + 2];
    }
  }
  for (int i = 0; i < 8; i += 2) {
    q[i] = static_cast<int16_t>(b[i] + b[i + 1]);
    q[i + 1] = static_cast<int16_t>(b[i] - b[i + 1]);
  }
}

// H q in place. Integers: the order of the strides does not matter.
inline void TransformInt16(int16_t* q, int group) {
  for (int base = 0; base < group; base += 8) TransformEightInt16(q + base);
  for (int stride = 8; stride < group; stride *= 2) {
    for (int base = 0; base < group; base += 2 * stride) {
      int16_t* low = q + base;
      int16_t* high = low + stride;
      for (int i = 0; i < stride; ++i) {
        const auto a = low[i];
        const auto b = high[i];
        low[i] = static_cast<int16_t>(a + b);
        high[i] = static_cast<int16_t>(a - b);
      }
    }
  }
}

// sign_t = a[t div 16] * b[t mod 16], both given by the bits of one word (a set bit is -1).
constexpr int SignOf(int t) {
  constexpr uint32_t kNegative = 0x7888u;  // entries 3, 7, 11, 12, 13, 14 of a and b
  return (((kNegative >> (t / 16)) ^ (kNegative >> (t % 16))) & 1u) != 0 ? -1 : 1;
}

struct SignTable {
  int16_t value[kMaxGroup];
  constexpr SignTable() : value() {
    for (int t = 0; t < kMaxGroup; ++t) value[t] = static_cast<int16_t>(SignOf(t));
  }
};
constexpr SignTable kSigns;

inline float ScaleOf(uint16_t half) { return HalfToFloat(half) * 0x1p-12f; }

// One row in one group to float32.
inline void DecodeGroup(const Weight& weight, const uint8_t* lane, uint16_t scale, int width,
                        float* out) {
  int16_t q[kMaxGroup];
  DecodeLane(weight.format, lane, weight.table, q, 1);
  TransformInt16(q, weight.format.group);
  const float factor = ScaleOf(scale);
  for (int t = 0; t < width; ++t) {
    out[t] = static_cast<float>(static_cast<int16_t>(kSigns.value[t] * q[t])) * factor;
  }
}

// Isa::decode_panel.
inline void DecodePanelRows(const Weight& weight, int64_t panel, int64_t group, int count,
                            int width, float* out, int64_t stride) {
  const uint8_t* block = weight.block(panel, group);
  const uint16_t* scales = weight.scale(panel, group);
  for (int lane = 0; lane < count; ++lane) {
    DecodeGroup(weight, block + lane * 4, scales[lane], width, out + lane * stride);
  }
}

// Isa::decode_row.
inline void DecodeOneRow(const Weight& weight, int64_t row, int64_t group, int width, float* out) {
  const int64_t panel = row / kLanes;
  const int lane = static_cast<int>(row % kLanes);
  DecodeGroup(weight, weight.block(panel, group) + lane * 4, weight.scale(panel, group)[lane],
              width, out);
}

inline int IdentityPosition(const Weight&, int t) { return t; }

// Isa::bias of forms whose weights' bytes are unsigned, 128 too large.
inline int32_t UnsignedBias(const Weight&) { return -128; }

// Isa::place.
inline void PlaceCodes(const int8_t* codes, int count, int group, const Layout& layout,
                       int8_t* out) {
  if (!layout.moved) {
    if (count == 1) {
      std::memcpy(out, codes, static_cast<size_t>(group));
      return;
    }
    for (int t = 0; t < group; t += 4, out += 4 * count) {
      for (int i = 0; i < count; ++i) std::memcpy(out + 4 * i, codes + i * group + t, 4);
    }
    return;
  }
  for (int i = 0; i < count; ++i, codes += group) {
    for (int t = 0; t < group; ++t) {
      const int position = layout.positions[t];
      out[(position / 4 * count + i) * 4 + position % 4] = codes[t];
    }
  }
}

// Isa::position of forms that cut four windows of each row into the bytes of a dword: where k
// divides 8, windows 8 bits apart are cut by one shift; in order otherwise.
inline int CutPosition(const Format& format, int t) {
  if (8 % format.bits != 0 || format.states > 8) return t;
  const int apart = 8 / format.bits;
  const int of_dword = t % (4 * apart);
  return t - of_dword + of_dword % apart * 4 + of_dword / apart;
}

// One panel's group, row by row: out[(t / 4) * 64 + lane * 4 + t mod 4], xored with `bias`.
inline void DecodeScalar(const Format& format, const int8_t* table, const uint8_t* codes,
                         uint8_t bias, uint8_t* out) {
  for (int lane = 0; lane < kLanes; ++lane) {
    int8_t q[kMaxGroup];
    DecodeLane(format, codes + lane * 4, table, q, 1);
    for (int t = 0; t < format.group; ++t) {
      out[t / 4 * kLine + lane * 4 + t % 4] = static_cast<uint8_t>(q[t]) ^ bias;
    }
  }
}

// Isa::from_half and Isa::to_half, also for what is left over by vectors.
inline void FromHalf(const uint16_t* halves, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = HalfToFloat(halves[i]);
}

inline void ToHalf(const float* values, int64_t count, uint16_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = FloatToHalf(values[i]);
}

// spec.md section 4: amax / 127 is the scale, codes are rounded to nearest even.
inline float QuantizeGroup(const float* values, int group, int8_t* codes, int32_t* total) {
  float amax = 0.0f;
  bool finite = true;
  for (int t = 0; t < group; ++t) {
    const float magnitude = __builtin_fabsf(values[t]);
    finite = finite && magnitude <= 0x1.fffffep127f;
    amax = magnitude > amax ? magnitude : amax;
  }
  if (!finite || amax < 0x1p-100f) {
    std::memset(codes, 0, static_cast<size_t>(group));
    *total = 0;
    return finite ? 0.0f : BitsToFloat(0x7fc00000u);
  }
  const float inverse = 127.0f / amax;
  int32_t sum = 0;
  for (int t = 0; t < group; ++t) {
    // Adding 1.5 * 2^23 rounds to an integer, to nearest even.
    const float shifted = values[t] * inverse + 0x1.8p23f;
    codes[t] = static_cast<int8_t>(FloatToBits(shifted) & 0xffu);
    sum += codes[t];
  }
  *total = sum;
  return amax / 127.0f;
}

// Some rows of activations that lie interleaved; see Activations.
struct Tile {
  int64_t first;
  int64_t all;  // rows of the activations
  int rows;

  // Where group g of the first row lies, in groups: multiply by their size for elements.
  int64_t unit(int64_t g) const { return g * all + first; }
};

inline Tile TileAt(const Activations& x, int64_t first) {
  const int64_t left = x.rows - first;
  return {first, x.rows, static_cast<int>(left < x.tile ? left : x.tile)};
}

}  // namespace
}  // namespace onnxcomp::hyper
