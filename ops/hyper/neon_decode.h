// Decoding with NEON: four rows times four weights at a time.
//
// 16 bytes of codes are one dword of four rows. Shifts put four windows of each row into the bytes
// of a dword, and table instructions over 64 entries look them up. Where k divides 8, windows 8
// bits apart are taken together, so that one shift cuts four of them; the activations are permuted
// to match (CutPosition).
//
// Internal linkage throughout: two translation units with different instruction sets include this.
#pragma once

#include <arm_neon.h>

#include <type_traits>

#include "hyper/plain.h"

namespace onnxcomp::hyper {
namespace {

constexpr int kStep = 32;      // weights of a row that are decoded together: k dwords
constexpr int kQuarters = 4;   // registers of a line: four rows each
constexpr int kAhead = 32;     // prefetch distance in lines

// Bits [Start, Start + 32) of the string whose dword 0 is dwords[1]; Start may be negative.
template <int Start, int Needed>
inline uint32x4_t Funnel(const uint32x4_t* dwords) {
  constexpr int kFirst = (Start + 32) / 32;
  constexpr int kShift = (Start + 32) % 32;
  if constexpr (kShift == 0) {
    return dwords[kFirst];
  } else {
    const uint32x4_t low = vshrq_n_u32(dwords[kFirst], kShift);
    if constexpr (kShift + Needed <= 32) {
      return low;
    } else {
      return vsliq_n_u32(low, dwords[kFirst + 1], 32 - kShift);
    }
  }
}

// Vector V of a step: a window in the low L bits of every byte, rubbish above. dwords[0] is the one
// before the step.
template <int K, int L, int V>
inline uint8x16_t CutFour(const uint32x4_t* dwords) {
  if constexpr (8 % K == 0) {
    constexpr int kApart = 8 / K;  // vectors of a dword
    constexpr int kStart = 32 * (V / kApart) + K * (V % kApart + 1) - L;
    return vreinterpretq_u8_u32(Funnel<kStart, 24 + L>(dwords));
  } else {
    // Four windows K bits apart: first spread pairs to 16 bits, then each pair to two bytes.
    const uint32x4_t four = Funnel<K * (4 * V + 1) - L, 3 * K + L>(dwords);
    const uint32x4_t pairs = vbslq_u32(vdupq_n_u32(0xffff), four, vshlq_n_u32(four, 16 - 2 * K));
    const uint32x4_t spread =
        vbslq_u32(vdupq_n_u32(0x00ff00ff), pairs, vshlq_n_u32(pairs, 8 - K));
    return vreinterpretq_u8_u32(spread);
  }
}

// Windows of every second of the four weights of vector V, from weight `Parity` on, as 16 bits with
// rubbish above their L bits.
template <int K, int L, int V, int Parity>
inline uint16x8_t CutWords(const uint32x4_t* dwords) {
  const uint32x4_t two = Funnel<K * (4 * V + Parity + 1) - L, 2 * K + L>(dwords);
  return vreinterpretq_u16_u32(
      vbslq_u32(vdupq_n_u32(0xffff), two, vshlq_n_u32(two, 16 - 2 * K)));
}

// Look-up of 2^L entries of one byte, L <= 8.
template <int L>
class Lookup {
 public:
  explicit Lookup(const Weight& weight) : Lookup(weight.table) {}
  explicit Lookup(const int8_t* table) {
    const auto* entries = reinterpret_cast<const uint8_t*>(table);
    for (int i = 0; i < kParts; ++i) parts_[i] = vld1q_u8_x4(entries + 64 * i);
  }

  // Table instructions leave bytes alone whose index is out of their range.
  uint8x16_t Find(uint8x16_t windows) const {
    const uint8x16_t states = vandq_u8(windows, vdupq_n_u8((1 << L) - 1));
    uint8x16_t value = vqtbl4q_u8(parts_[0], states);
#pragma GCC unroll 4
    for (int i = 1; i < kParts; ++i) {
      value = vqtbx4q_u8(value, parts_[i], vsubq_u8(states, vdupq_n_u8(64 * i)));
    }
    return value;
  }

 private:
  static constexpr int kParts = (1 << L) / 64;
  uint8x16x4_t parts_[kParts];
};

// Look-up of tables of 256 levels.
class LevelLookup {
 public:
  explicit LevelLookup(const Weight& weight)
      : multiplier_(vdupq_n_u16(weight.levels->multiplier)),
        offset_(vdupq_n_u16(weight.levels->offset)),
        values_(weight.levels->values) {}

  // Levels are the high bytes of the products.
  uint8x16_t Find(uint16x8_t even, uint16x8_t odd) const {
    even = vmlaq_u16(offset_, even, multiplier_);
    odd = vmlaq_u16(offset_, odd, multiplier_);
    return values_.Find(vtrn2q_u8(vreinterpretq_u8_u16(even), vreinterpretq_u8_u16(odd)));
  }

 private:
  uint16x8_t multiplier_;
  uint16x8_t offset_;
  Lookup<8> values_;
};

template <int L>
using LookupOf = std::conditional_t<(L <= 8), Lookup<L <= 8 ? L : 8>, LevelLookup>;

// Entries of vector V of a step.
template <int K, int L, int V>
inline uint8x16_t DecodeFour(const LookupOf<L>& lookup, const uint32x4_t* dwords) {
  if constexpr (L <= 8) {
    return lookup.Find(CutFour<K, L, V>(dwords));
  } else {
    return lookup.Find(CutWords<K, L, V, 0>(dwords), CutWords<K, L, V, 1>(dwords));
  }
}

template <int K, int L, int V>
inline void DecodeVectors(const LookupOf<L>& lookup, const uint32x4_t* dwords, uint8_t* out) {
  vst1q_u8(out + V * kLine, (DecodeFour<K, L, V>(lookup, dwords)));  // a macro in clang
  if constexpr (V + 1 < 8) DecodeVectors<K, L, V + 1>(lookup, dwords, out);
}

inline uint32x4_t LoadDword(const uint8_t* codes) {
  return vreinterpretq_u32_u8(vld1q_u8(codes));
}

// One panel's group: out[(t' / 4) * 64 + lane * 4 + t' mod 4].
template <int K, int L>
void DecodeVector(const Weight& weight, const uint8_t* codes, int group, uint8_t* out) {
  const LookupOf<L> lookup(weight);
  const uint8_t* last = codes + (group * K / 32 - 1) * kLine;
  uint32x4_t before[kQuarters];
  for (int i = 0; i < kQuarters; ++i) before[i] = LoadDword(last + 16 * i);
  for (int t = 0; t < group; t += kStep, codes += K * kLine, out += 8 * kLine) {
    for (int d = 0; d < K; ++d) __builtin_prefetch(codes + (kAhead + d) * kLine);
    for (int i = 0; i < kQuarters; ++i) {
      uint32x4_t dwords[K + 1];
      dwords[0] = before[i];
#pragma GCC unroll 8
      for (int d = 0; d < K; ++d) dwords[d + 1] = LoadDword(codes + d * kLine + 16 * i);
      before[i] = dwords[K];
      DecodeVectors<K, L, 0>(lookup, dwords, out + 16 * i);
    }
  }
}

// The bytes of one panel's group in the order of CutPosition.
inline void DecodeBytes(const Weight& weight, int64_t panel, int64_t group, uint8_t* out) {
  using Fn = void (*)(const Weight&, const uint8_t*, int, uint8_t*);
  static constexpr Fn kByFormat[6][5] = {
      {DecodeVector<1, 6>, DecodeVector<1, 7>, DecodeVector<1, 8>, DecodeVector<1, 10>, DecodeVector<1, 12>},
      {DecodeVector<2, 6>, DecodeVector<2, 7>, DecodeVector<2, 8>, DecodeVector<2, 10>, DecodeVector<2, 12>},
      {DecodeVector<3, 6>, DecodeVector<3, 7>, DecodeVector<3, 8>, DecodeVector<3, 10>, DecodeVector<3, 12>},
      {DecodeVector<4, 6>, DecodeVector<4, 7>, DecodeVector<4, 8>, DecodeVector<4, 10>, DecodeVector<4, 12>},
      {nullptr, DecodeVector<5, 7>, DecodeVector<5, 8>, DecodeVector<5, 10>, DecodeVector<5, 12>},
      {nullptr, nullptr, DecodeVector<6, 8>, DecodeVector<6, 10>, DecodeVector<6, 12>}};
  const Format& format = weight.format;
  const uint8_t* codes = weight.block(panel, group);
  if (format.states > 8 && weight.levels == nullptr) {
    return DecodeScalar(format, weight.table, codes, 0, out);
  }
  kByFormat[format.bits - 1][StatesIndex(format)](weight, codes, format.group, out);
}

}  // namespace
}  // namespace onnxcomp::hyper
