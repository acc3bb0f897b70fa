// Structured tables with AVX2: see structure.h.
//
// Windows of four bits are cut for eight rows times four weights at a time; byte shuffles look 16
// entries up and ignore bits 4 to 6 of an index, so that the sum of two windows needs no mask.
// Entries are unsigned and small: they meet the activations in `vpmaddubsw` as they are, and sums of
// two or four products fit 16 bits.
//
// Internal linkage throughout; only for translation units compiled with AVX2 flags.
#pragma once

#include <immintrin.h>

#include <type_traits>

#include "hyper/avx2_decode.h"
#include "hyper/structure.h"

namespace onnxcomp::hyper {
namespace {

// The tables of a structure in registers. Look-ups give u, or with `Exact` the table's own entries,
// which are sums modulo 256 as well.
template <Structure::Kind Kind, bool Exact>
class StructuredLookup {
 public:
  static constexpr bool kLevel = Kind == Structure::kFalling || Kind == Structure::kSloped;
  static constexpr bool kTied =
      !Exact && (Kind == Structure::kFalling || Kind == Structure::kTwisted);
  static constexpr int kTables = 1 + !kLevel + !kTied;

  explicit StructuredLookup(const Structure& structure)
      : cells_(Table(Exact ? structure.whole_cells : structure.cells)),
        steps_(Table(Exact ? structure.whole_steps : structure.steps)),
        turns_(Table(structure.turns)) {}

  // Windows have four bits and nothing above them.
  __m256i Find(__m256i newest, __m256i low) const {
    const __m256i turn = kLevel ? low : _mm256_shuffle_epi8(turns_, low);
    const __m256i cell = _mm256_shuffle_epi8(cells_, _mm256_add_epi8(newest, turn));
    if constexpr (kTied) return _mm256_sub_epi8(cell, turn);
    return _mm256_add_epi8(cell, _mm256_shuffle_epi8(steps_, low));
  }

 private:
  static __m256i Table(const uint8_t* entries) {
    return _mm256_broadcastsi128_si256(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(entries)));
  }

  __m256i cells_;
  __m256i steps_;
  __m256i turns_;
};

inline __m256i Nibble(__m256i bytes, int shift) {
  return _mm256_and_si256(_mm256_srli_epi16(bytes, shift), _mm256_set1_epi8(15));
}

// The byte before every byte of a row's string: dwords moved up by one byte, below them the last
// byte of the dwords before.
inline __m256i ByteBefore(__m256i now, __m256i before) {
  return _mm256_or_si256(_mm256_slli_epi32(now, 8), _mm256_srli_epi32(before, 24));
}

template <int V>
using Vector = std::integral_constant<int, V>;

// The windows of eight rows, kDwords dwords at a time. Load takes the next ones, which have to be
// there; ForEach calls visit(Vector<V>(), newest, low) for V = 0 .. kVectors - 1 with the windows N and
// c of four weights of each row; c is the window of `Back` weights before. `StructuredPosition` says
// which weights they are. Between the two there may be other work: products of one half of a panel
// gain 7 % where the codes of the other one are loaded before (4 bits).
template <int K, int Back>
class Windows;

template <>
class Windows<4, 1> {
 public:
  static constexpr int kDwords = 1;
  static constexpr int kVectors = 2;

  explicit Windows(const uint8_t* last) : before_(TurnedUp(Nibble(LoadDword(last), 4))) {}

  void Load(const uint8_t* codes) {
    const __m256i dword = LoadDword(codes);
    even_ = _mm256_and_si256(dword, _mm256_set1_epi8(15));
    odd_ = Nibble(dword, 4);
  }

  template <class Visit>
  __attribute__((always_inline)) void ForEach(Visit visit) {
    const __m256i turned = TurnedUp(odd_);
    visit(Vector<0>(), even_, Carried(turned));
    visit(Vector<1>(), odd_, even_);
    before_ = turned;
  }

 private:
  // Blends are one operation for processors that this form is for; those with 256-bit VNNI take three.
  static constexpr bool kBlends = kBias == 0;

  // The bytes of every dword turned up by one, where they are blended. No register is left for their
  // order: compilers would keep it in one and spill another.
  static __m256i TurnedUp(__m256i bytes) {
    alignas(32) static constexpr uint8_t kOrder[32] = {
        3, 0, 1, 2, 7, 4, 5, 6, 11, 8, 9, 10, 15, 12, 13, 14,
        3, 0, 1, 2, 7, 4, 5, 6, 11, 8, 9, 10, 15, 12, 13, 14};
    if constexpr (kBlends) asm("vpshufb %1, %0, %0" : "+x"(bytes) : "m"(kOrder));
    return bytes;
  }

  // The upper window of the byte before every byte.
  __m256i Carried(__m256i turned) const {
    if constexpr (!kBlends) return ByteBefore(turned, before_);
    return _mm256_blendv_epi8(turned, before_, _mm256_set1_epi32(255));
  }

  __m256i even_ = _mm256_setzero_si256();
  __m256i odd_ = _mm256_setzero_si256();
  __m256i before_;
};

template <int Back>
class Windows<2, Back> {
 public:
  static constexpr int kDwords = 1;
  static constexpr int kVectors = 4;

  explicit Windows(const uint8_t* last) : before_(LoadDword(last)) {}

  void Load(const uint8_t* codes) { codes_ = codes; }

  template <class Visit>
  __attribute__((always_inline)) void ForEach(Visit visit) {
    const __m256i dword = LoadDword(codes_);
    // Every byte's upper half comes from its own byte, its lower half from the one before.
    const __m256i across =
        _mm256_or_si256(_mm256_slli_epi32(dword, 4), _mm256_srli_epi32(before_, 28));
    const __m256i w0 = Nibble(across, 2);
    const __m256i w1 = _mm256_and_si256(dword, _mm256_set1_epi8(15));
    const __m256i w2 = Nibble(dword, 2);
    const __m256i w3 = Nibble(dword, 4);
    const __m256i last = _mm256_and_si256(across, _mm256_set1_epi8(15));  // w3 of the byte before
    if constexpr (Back == 1) {
      visit(Vector<0>(), w0, last);
      visit(Vector<1>(), w1, w0);
      visit(Vector<2>(), w2, w1);
      visit(Vector<3>(), w3, w2);
    } else {
      const __m256i carried = _mm256_srli_epi32(before_, 26);  // w2 of the byte before, and two bits
      const __m256i second = _mm256_or_si256(
          _mm256_slli_epi32(w2, 8), _mm256_and_si256(carried, _mm256_set1_epi8(15)));
      visit(Vector<0>(), w0, second);
      visit(Vector<1>(), w1, last);
      visit(Vector<2>(), w2, w0);
      visit(Vector<3>(), w3, w1);
    }
    before_ = dword;
  }

 private:
  const uint8_t* codes_ = nullptr;
  __m256i before_;
};

// Three dwords are four units of three bytes and eight weights. Their first, second and third bytes
// are gathered, in the order of units 0 3 2 1; windows then lie in one of these or in neighbours.
template <int Back>
class Windows<3, Back> {
 public:
  static constexpr int kDwords = 3;
  static constexpr int kVectors = 8;

  explicit Windows(const uint8_t* last) : before_(LoadDword(last)) {}

  void Load(const uint8_t* codes) { codes_ = codes; }

  template <class Visit>
  __attribute__((always_inline)) void ForEach(Visit visit) {
    const __m256i d0 = LoadDword(codes_);
    const __m256i d1 = LoadDword(codes_ + kLine);
    const __m256i d2 = LoadDword(codes_ + 2 * kLine);
    const __m256i first = Merge(d0, d1, d2);
    const __m256i second = _mm256_shuffle_epi8(Merge(d1, d2, d0), Rotation(1));
    const __m256i loose = Merge(d2, d0, d1);  // in the order of units 2 1 0 3
    const __m256i third = _mm256_shuffle_epi8(loose, Rotation(2));
    const __m256i before = ByteBefore(loose, before_);  // the third byte of the unit before
    before_ = d2;
    // Windows w of the unit, from two of the unit before on.
    __m256i w[10];
    w[0] = Nibble(before, 1);
    w[1] = Nibble(before, 4);
    const __m256i top = _mm256_cmpgt_epi8(_mm256_setzero_si256(), before);  // -1 for a top bit
    w[2] = Low(_mm256_sub_epi8(_mm256_add_epi8(first, first), top));
    visit(Vector<0>(), w[2], w[2 - Back]);
    w[3] = Nibble(first, 2);
    visit(Vector<1>(), w[3], w[3 - Back]);
    w[4] = Across(_mm256_srli_epi16(first, 5), 7, _mm256_slli_epi16(second, 3));
    visit(Vector<2>(), w[4], w[4 - Back]);
    w[5] = Low(second);
    visit(Vector<3>(), w[5], w[5 - Back]);
    w[6] = Nibble(second, 3);
    visit(Vector<4>(), w[6], w[6 - Back]);
    w[7] = Across(_mm256_srli_epi16(second, 6), 3, _mm256_slli_epi16(third, 2));
    visit(Vector<5>(), w[7], w[7 - Back]);
    w[8] = Nibble(third, 1);
    visit(Vector<6>(), w[8], w[8 - Back]);
    w[9] = Nibble(third, 4);
    visit(Vector<7>(), w[9], w[9 - Back]);
  }

 private:
  static __m256i Low(__m256i bytes) { return _mm256_and_si256(bytes, _mm256_set1_epi8(15)); }

  // Bytes 0 and 3 of a, 2 of b and 1 of c.
  static __m256i Merge(__m256i a, __m256i b, __m256i c) {
    const __m256i inner = _mm256_blend_epi16(c, b, 0xaa);
    return _mm256_blendv_epi8(inner, a, _mm256_set1_epi32(static_cast<int>(0xff0000ff)));
  }

  // Turns the bytes of every dword down by so many.
  static __m256i Rotation(int bytes) {
    const __m256i once = _mm256_setr_epi8(1, 2, 3, 0, 5, 6, 7, 4, 9, 10, 11, 8, 13, 14, 15, 12,
                                          1, 2, 3, 0, 5, 6, 7, 4, 9, 10, 11, 8, 13, 14, 15, 12);
    const __m256i twice = _mm256_setr_epi8(2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13,
                                           2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    return bytes == 1 ? once : twice;
  }

  // A window whose bits in `mask` come from `low`, the others from `high`.
  static __m256i Across(__m256i low, int mask, __m256i high) {
    return _mm256_or_si256(
        _mm256_and_si256(low, _mm256_set1_epi8(static_cast<char>(mask))),
        _mm256_and_si256(high, _mm256_set1_epi8(static_cast<char>(15 & ~mask))));
  }

  const uint8_t* codes_ = nullptr;
  __m256i before_;
};

// Isa::position for structured tables.
inline int StructuredPosition(const Format& format, int t) {
  if (format.bits != 3) return CutPosition(format, t);
  const int unit = t % 32 / 8;
  return t - t % 32 + t % 8 * 4 + (4 - unit) % 4;
}

template <int Lines>
inline void Prefetch(const uint8_t* codes) {
#pragma GCC unroll 4
  for (int d = 0; d < Lines; ++d) {
    _mm_prefetch(reinterpret_cast<const char*>(codes + d * kLine), _MM_HINT_T1);
  }
}

// What follows the dwords at `codes`, or they themselves where the group ends.
template <class Cut>
inline const uint8_t* NextCodes(const uint8_t* codes, const uint8_t* last) {
  const uint8_t* next = codes + Cut::kDwords * kLine;
  return next > last ? codes : next;
}

// One panel's group: out[(t' / 4) * 64 + lane * 4 + t' mod 4]. Asks for the codes `ahead` bytes later.
template <int K, int Back, class Table>
inline void DecodeStructured(const Table table, const uint8_t* codes, int group, int64_t ahead,
                             uint8_t* out) {
  using Cut = Windows<K, Back>;
  const uint8_t* last = codes + (group * K / 32 - 1) * kLine;
  Cut low(last);
  Cut high(last + 32);
  low.Load(codes);
  for (int t = 0; t < group; t += 4 * Cut::kVectors) {
    Prefetch<Cut::kDwords>(codes + ahead);
    high.Load(codes + 32);
    low.ForEach([&](auto v, __m256i newest, __m256i before) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(out + v * kLine), table.Find(newest, before));
    });
    codes = NextCodes<Cut>(codes, last);
    low.Load(codes);
    high.ForEach([&](auto v, __m256i newest, __m256i before) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(out + v * kLine + 32),
                         table.Find(newest, before));
    });
    out += Cut::kVectors * kLine;
  }
}

// Calls F<K, Back, Kind>::Run(args...) for a weight with a structured table. Where N and c overlap,
// with fewer than eight state bits, no table counts as falling.
template <template <int, int, Structure::Kind> class F, int K, int Back, class... Args>
inline void DispatchKind(Structure::Kind kind, Args&&... args) {
  if constexpr (K * Back > 4) {
    F<K, Back, Structure::kFalling>::Run(args...);  // no others are found
  } else {
    if constexpr (K * Back == 4) {
      if (kind == Structure::kFalling) return F<K, Back, Structure::kFalling>::Run(args...);
    }
    switch (kind) {
      case Structure::kTwisted: return F<K, Back, Structure::kTwisted>::Run(args...);
      case Structure::kTurned: return F<K, Back, Structure::kTurned>::Run(args...);
      default: return F<K, Back, Structure::kSloped>::Run(args...);
    }
  }
}

template <template <int, int, Structure::Kind> class F, class... Args>
inline void DispatchStructured(const Weight& weight, Args&&... args) {
  const Structure::Kind kind = weight.structure->kind;
  const bool newer = weight.format.states - 4 == weight.format.bits;  // c is the window before N
  switch (weight.format.bits) {
    case 4: return DispatchKind<F, 4, 1>(kind, args...);
    case 3: return newer ? DispatchKind<F, 3, 1>(kind, args...) : DispatchKind<F, 3, 2>(kind, args...);
    default: return newer ? DispatchKind<F, 2, 1>(kind, args...) : DispatchKind<F, 2, 2>(kind, args...);
  }
}

}  // namespace
}  // namespace onnxcomp::hyper
