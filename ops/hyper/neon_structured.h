// Structured tables with NEON: see structure.h. The same windows as with AVX2 (avx2_structured.h),
// for four rows at a time; entries are the table's own, so that products are those of any table.
//
// Internal linkage throughout: two translation units with different instruction sets include this.
#pragma once

#include <arm_neon.h>

#include <type_traits>

#include "hyper/neon_decode.h"
#include "hyper/structure.h"

namespace onnxcomp::hyper {
namespace {

// Tables of 16 bytes in registers; P[c] = c with `Level`. Windows have four bits and nothing above them.
template <bool Level>
class StructuredLookup {
 public:
  explicit StructuredLookup(const Structure& structure)
      : cells_(vld1q_u8(structure.whole_cells)),
        steps_(vld1q_u8(structure.whole_steps)),
        turns_(vld1q_u8(structure.turns)) {}

  uint8x16_t Find(uint8x16_t newest, uint8x16_t low) const {
    const uint8x16_t turn = Level ? low : vqtbl1q_u8(turns_, low);
    const uint8x16_t cell = vandq_u8(vaddq_u8(newest, turn), vdupq_n_u8(15));
    return vaddq_u8(vqtbl1q_u8(cells_, cell), vqtbl1q_u8(steps_, low));
  }

 private:
  uint8x16_t cells_;
  uint8x16_t steps_;
  uint8x16_t turns_;
};

template <int Shift>
inline uint8x16_t Nibble(uint8x16_t bytes) {
  if constexpr (Shift == 4) return vshrq_n_u8(bytes, 4);
  return vandq_u8(vshrq_n_u8(bytes, Shift), vdupq_n_u8(15));
}

inline uint8x16_t LowNibble(uint8x16_t bytes) { return vandq_u8(bytes, vdupq_n_u8(15)); }

// Every row's string moved up by `Bits` bits, below them the last ones of the dwords before.
template <int Bits>
inline uint8x16_t MovedUp(uint8x16_t now, uint8x16_t before) {
  const uint32x4_t low = vshrq_n_u32(vreinterpretq_u32_u8(before), 32 - Bits);
  return vreinterpretq_u8_u32(vsliq_n_u32(low, vreinterpretq_u32_u8(now), Bits));
}

template <int V>
using Vector = std::integral_constant<int, V>;

// The windows of four rows, dword by dword. Step calls visit(Vector<V>(), newest, low) for
// V = 0 .. kVectors - 1 with the windows N and c of four weights of each row; c is the window of
// `Back` weights before. `StructuredPosition` says which weights they are.
template <int K, int Back>
class Windows;

template <>
class Windows<4, 1> {
 public:
  static constexpr int kDwords = 1;
  static constexpr int kVectors = 2;

  explicit Windows(const uint8_t* last) : before_(Nibble<4>(vld1q_u8(last))) {}

  template <class Visit>
  void Step(const uint8_t* codes, Visit visit) {
    const uint8x16_t dword = vld1q_u8(codes);
    const uint8x16_t even = LowNibble(dword);
    const uint8x16_t odd = Nibble<4>(dword);
    visit(Vector<0>(), even, MovedUp<8>(odd, before_));
    visit(Vector<1>(), odd, even);
    before_ = odd;
  }

 private:
  uint8x16_t before_;
};

template <int Back>
class Windows<2, Back> {
 public:
  static constexpr int kDwords = 1;
  static constexpr int kVectors = 4;

  explicit Windows(const uint8_t* last) : before_(vld1q_u8(last)) {}

  template <class Visit>
  void Step(const uint8_t* codes, Visit visit) {
    const uint8x16_t dword = vld1q_u8(codes);
    const uint8x16_t across = MovedUp<4>(dword, before_);
    const uint8x16_t w0 = Nibble<2>(across);
    const uint8x16_t w1 = LowNibble(dword);
    const uint8x16_t w2 = Nibble<2>(dword);
    const uint8x16_t w3 = Nibble<4>(dword);
    const uint8x16_t last = LowNibble(across);  // w3 of the byte before
    if constexpr (Back == 1) {
      visit(Vector<0>(), w0, last);
      visit(Vector<1>(), w1, w0);
      visit(Vector<2>(), w2, w1);
      visit(Vector<3>(), w3, w2);
    } else {
      visit(Vector<0>(), w0, MovedUp<8>(w2, Nibble<2>(before_)));
      visit(Vector<1>(), w1, last);
      visit(Vector<2>(), w2, w0);
      visit(Vector<3>(), w3, w1);
    }
    before_ = dword;
  }

 private:
  uint8x16_t before_;
};

// Three dwords are four units of three bytes and eight weights; see avx2_structured.h.
template <int Back>
class Windows<3, Back> {
 public:
  static constexpr int kDwords = 3;
  static constexpr int kVectors = 8;

  explicit Windows(const uint8_t* last) : before_(vld1q_u8(last)) {}

  template <class Visit>
  void Step(const uint8_t* codes, Visit visit) {
    const uint8x16_t d0 = vld1q_u8(codes);
    const uint8x16_t d1 = vld1q_u8(codes + kLine);
    const uint8x16_t d2 = vld1q_u8(codes + 2 * kLine);
    const uint8x16_t first = Merge(d0, d1, d2);
    const uint8x16_t second = Turned<8>(Merge(d1, d2, d0));
    const uint8x16_t loose = Merge(d2, d0, d1);  // in the order of units 2 1 0 3
    const uint8x16_t third = Turned<16>(loose);
    const uint8x16_t before = MovedUp<8>(loose, before_);  // the third byte of the unit before
    before_ = d2;
    // Windows w of the unit, from two of the unit before on. Across bytes they are the lower one's top
    // bits and the upper one's low bits above them.
    uint8x16_t w[10];
    w[0] = Nibble<1>(before);
    w[1] = Nibble<4>(before);
    w[2] = LowNibble(vsliq_n_u8(vshrq_n_u8(before, 7), first, 1));
    visit(Vector<0>(), w[2], w[2 - Back]);
    w[3] = Nibble<2>(first);
    visit(Vector<1>(), w[3], w[3 - Back]);
    w[4] = LowNibble(vsliq_n_u8(vshrq_n_u8(first, 5), second, 3));
    visit(Vector<2>(), w[4], w[4 - Back]);
    w[5] = LowNibble(second);
    visit(Vector<3>(), w[5], w[5 - Back]);
    w[6] = Nibble<3>(second);
    visit(Vector<4>(), w[6], w[6 - Back]);
    w[7] = LowNibble(vsliq_n_u8(vshrq_n_u8(second, 6), third, 2));
    visit(Vector<5>(), w[7], w[7 - Back]);
    w[8] = Nibble<1>(third);
    visit(Vector<6>(), w[8], w[8 - Back]);
    w[9] = Nibble<4>(third);
    visit(Vector<7>(), w[9], w[9 - Back]);
  }

 private:
  // Bytes 0 and 3 of a, 2 of b and 1 of c.
  static uint8x16_t Merge(uint8x16_t a, uint8x16_t b, uint8x16_t c) {
    const uint8x16_t inner = vbslq_u8(Bytes(0xffff0000u), b, c);
    return vbslq_u8(Bytes(0xff0000ffu), a, inner);
  }

  static uint8x16_t Bytes(uint32_t dword) { return vreinterpretq_u8_u32(vdupq_n_u32(dword)); }

  // The bits of every dword turned down.
  template <int Bits>
  static uint8x16_t Turned(uint8x16_t bytes) {
    const uint32x4_t dwords = vreinterpretq_u32_u8(bytes);
    return vreinterpretq_u8_u32(vsliq_n_u32(vshrq_n_u32(dwords, Bits), dwords, 32 - Bits));
  }

  uint8x16_t before_;
};

// Isa::position for structured tables.
inline int StructuredPosition(const Format& format, int t) {
  if (format.bits != 3) return CutPosition(format, t);
  const int unit = t % 32 / 8;
  return t - t % 32 + t % 8 * 4 + (4 - unit) % 4;
}

// One panel's group: out[(t' / 4) * 64 + lane * 4 + t' mod 4].
template <int K, int Back, bool Level>
void DecodeStructured(const Weight& weight, const uint8_t* codes, uint8_t* out) {
  using Cut = Windows<K, Back>;
  const StructuredLookup<Level> table(*weight.structure);
  const int group = weight.format.group;
  const uint8_t* last = codes + (group * K / 32 - 1) * kLine;
  Cut cuts[kQuarters] = {Cut(last), Cut(last + 16), Cut(last + 32), Cut(last + 48)};
  for (int t = 0; t < group; t += 4 * Cut::kVectors) {
    for (int d = 0; d < Cut::kDwords; ++d) __builtin_prefetch(codes + (kAhead + d) * kLine);
#pragma GCC unroll 4
    for (int i = 0; i < kQuarters; ++i) {
      cuts[i].Step(codes + 16 * i, [&](auto v, uint8x16_t newest, uint8x16_t low) {
        vst1q_u8(out + v() * kLine + 16 * i, table.Find(newest, low));
      });
    }
    codes += Cut::kDwords * kLine;
    out += Cut::kVectors * kLine;
  }
}

// The bytes of one panel's group in the order of StructuredPosition.
inline void DecodeStructuredBytes(const Weight& weight, int64_t panel, int64_t group,
                                  uint8_t* out) {
  using Fn = void (*)(const Weight&, const uint8_t*, uint8_t*);
  // By sizes and whether P[c] = c; G is looked up in any case.
  static constexpr Fn kBySizes[3][2][2] = {
      {{DecodeStructured<2, 1, true>, DecodeStructured<2, 1, false>},
       {DecodeStructured<2, 2, true>, DecodeStructured<2, 2, false>}},
      {{DecodeStructured<3, 1, true>, DecodeStructured<3, 1, false>},
       {DecodeStructured<3, 2, true>}},
      {{DecodeStructured<4, 1, true>, DecodeStructured<4, 1, false>}, {}}};
  const Format& format = weight.format;
  const int back = (format.states - 4) / format.bits;
  const Structure::Kind kind = weight.structure->kind;
  const bool level = kind == Structure::kFalling || kind == Structure::kSloped;
  kBySizes[format.bits - 2][back - 1][level ? 0 : 1](weight, weight.block(panel, group), out);
}

}  // namespace
}  // namespace onnxcomp::hyper
