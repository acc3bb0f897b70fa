// Portable pieces that every instruction set may fall back to.
//
// Internal linkage throughout: each translation unit gets its own copy, compiled with its own flags.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/float16.h"
#include "hyper/format.h"

namespace onnxcomp::hyper {
namespace {

// One row's bit string in one group: dword d lies 64 d bytes after the first.
inline uint32_t DwordOf(const uint8_t* lane, int d) {
  uint32_t dword;
  std::memcpy(&dword, lane + d * (kLanes * 4), sizeof dword);
  return dword;
}

// q[t * stride] = table[s_t] for the group's weights of one row.
template <class T>
inline void DecodeLane(const Format& format, const uint8_t* lane, const int8_t* table, T* q,
                       int stride) {
  const uint32_t mask = (1u << format.states) - 1;
  // Bits 0 .. 31 of `window` are the dword before, bits 32 .. 63 the current one; a window ends at
  // most 12 bits after it starts and therefore never needs more.
  uint64_t window = static_cast<uint64_t>(DwordOf(lane, format.dwords - 1)) << 32;
  int loaded = 0;
  int end = format.bits;
  for (int t = 0; t < format.group; ++t, end += format.bits) {
    while (loaded * 32 < end) {
      window = (window >> 32) | (static_cast<uint64_t>(DwordOf(lane, loaded)) << 32);
      ++loaded;
    }
    const int shift = end - format.states - (loaded - 2) * 32;
    q[t * stride] = table[static_cast<uint32_t>(window >> shift) & mask];
  }
}

// H q in place, exact in integers.
inline void TransformInt16(int16_t* q, int group) {
  for (int stride = 1; stride < group; stride *= 2) {
    for (int base = 0; base < group; base += 2 * stride) {
      for (int i = base; i < base + stride; ++i) {
        const int a = q[i];
        const int b = q[i + stride];
        q[i] = static_cast<int16_t>(a + b);
        q[i + stride] = static_cast<int16_t>(a - b);
      }
    }
  }
}

// sign_t = a[t div 16] * b[t mod 16], both given by the bits of one word (a set bit is -1).
inline int SignOf(int t) {
  constexpr uint32_t kNegative = 0x7888u;  // entries 3, 7, 11, 12, 13, 14 of a and b
  const uint32_t bit = (kNegative >> (t / 16)) ^ (kNegative >> (t % 16));
  return (bit & 1u) != 0 ? -1 : 1;
}

inline float ScaleOf(uint16_t half) { return HalfToFloat(half) * 0x1p-12f; }

inline int IdentityPosition(const Format&, int t) { return t; }

// spec.md section 4: amax / 127 is the scale, codes are rounded to nearest even.
inline float QuantizeGroup(const float* values, int group, int8_t* codes) {
  float amax = 0.0f;
  bool finite = true;
  for (int t = 0; t < group; ++t) {
    const float magnitude = std::fabs(values[t]);
    finite = finite && magnitude <= 0x1.fffffep127f;
    amax = magnitude > amax ? magnitude : amax;
  }
  if (!finite || amax < 0x1p-100f) {
    std::memset(codes, 0, static_cast<size_t>(group));
    return finite ? 0.0f : BitsToFloat(0x7fc00000u);
  }
  const float inverse = 127.0f / amax;
  for (int t = 0; t < group; ++t) {
    // Adding 1.5 * 2^23 rounds to an integer, to nearest even.
    const float shifted = values[t] * inverse + 0x1.8p23f;
    codes[t] = static_cast<int8_t>(FloatToBits(shifted) & 0xffu);
  }
  return amax / 127.0f;
}

// Where the rows of one tile start; see Activations.
struct Tile {
  int64_t base;  // in groups: multiply by the group for elements
  int rows;
};

inline Tile TileAt(const Activations& x, int64_t first) {
  const int64_t left = x.rows - first;
  return {first * x.groups, static_cast<int>(left < x.tile ? left : x.tile)};
}

}  // namespace
}  // namespace onnxcomp::hyper
