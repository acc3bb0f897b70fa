// Decoding with AVX-512 VBMI: 16 rows times 8 weights at a time.
//
// 64 bytes of codes are one dword of 16 rows. Interleaving it with the dword before gives every
// row a qword in which all windows that end in the dword lie whole; `vpmultishiftqb` cuts eight
// windows out of each qword, and byte permutations look them up. 32 weights of a row are k dwords
// and four units of eight weights, whatever k is.
//
// Internal linkage throughout; only for translation units compiled with AVX-512 flags.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <type_traits>

#include "hyper/format.h"
#include "hyper/prefetch.h"

namespace onnxcomp::hyper {
namespace {

constexpr int kStep = 32;          // weights of a row that are decoded together

// The windows of one unit of eight weights: where each starts, in the interleaved qwords.
struct Cut {
  int pair;         // dword that is the upper half of the first qword
  uint64_t low;     // bit offsets of the windows, one byte each
  int next;         // dword that is the upper half of the second qword, -1 if it is not needed
  uint64_t high;    // offsets in the second qword
  uint8_t chosen;   // windows taken from the second qword
};

// Windows of `width` bits that end `back` bits before the end of each weight's symbol.
constexpr Cut CutOf(int bits, int unit, int width, int back) {
  int end[8] = {};
  int start[8] = {};
  for (int w = 0; w < 8; ++w) {
    end[w] = bits * (8 * unit + w + 1);
    start[w] = end[w] - back - width;
  }
  const int last = (end[7] - 1) / 32;
  Cut cut{last, 0, -1, 0, 0};
  if (start[0] < 32 * (last - 1)) cut = Cut{(end[0] - 1) / 32, 0, last, 0, 0};
  for (int w = 0; w < 8; ++w) {
    const uint64_t shift = 8 * static_cast<uint64_t>(w);
    if (start[w] < 32 * (last - 1)) {
      cut.low |= static_cast<uint64_t>(start[w] - 32 * (cut.pair - 1)) << shift;
    } else if (cut.next < 0) {
      cut.low |= static_cast<uint64_t>(start[w] - 32 * (last - 1)) << shift;
    } else {
      cut.high |= static_cast<uint64_t>(start[w] - 32 * (last - 1)) << shift;
      cut.chosen = static_cast<uint8_t>(cut.chosen | (1 << w));
    }
  }
  return cut;
}

// The windows of every second weight of a unit, from weight `parity` on, with 16 bits each.
constexpr uint64_t Doubled(uint64_t eight, int parity) {
  uint64_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint64_t offset = (eight >> (8 * (2 * i + parity))) & 0xff;
    result |= (offset | ((offset + 8) & 63) << 8) << (16 * i);
  }
  return result;
}

inline __m512i Offsets(uint64_t eight) { return _mm512_set1_epi64(static_cast<int64_t>(eight)); }

// Eight windows of every qword; `pairs[d]` has dword d as its upper half.
template <int K, int U, int Width, int Back>
inline __m512i CutWindows(const __m512i* pairs) {
  constexpr Cut kCut = CutOf(K, U, Width, Back);
  const __m512i windows = _mm512_multishift_epi64_epi8(Offsets(kCut.low), pairs[kCut.pair]);
  if constexpr (kCut.next < 0) {
    return windows;
  } else {
    const __mmask64 chosen = 0x0101010101010101ull * kCut.chosen;
    return _mm512_mask_multishift_epi64_epi8(windows, chosen, Offsets(kCut.high),
                                             pairs[kCut.next]);
  }
}

// Four windows of every qword in words, with rubbish above their L bits.
template <int K, int U, int L, int Parity>
inline __m512i CutWords(const __m512i* pairs) {
  constexpr Cut kCut = CutOf(K, U, L, 0);
  const __m512i windows =
      _mm512_multishift_epi64_epi8(Offsets(Doubled(kCut.low, Parity)), pairs[kCut.pair]);
  if constexpr (kCut.next < 0) {
    return windows;
  } else {
    const uint64_t every = 0x0101010101010101ull * (kCut.chosen >> Parity & 0x55);
    return _mm512_mask_multishift_epi64_epi8(windows, every * 3,
                                             Offsets(Doubled(kCut.high, Parity)),
                                             pairs[kCut.next]);
  }
}

// Sixteen rows times eight weights: `lo` has rows 0 1 4 5 8 9 12 13, `hi` the others, a qword each.
struct Unit {
  __m512i lo;
  __m512i hi;
};

// The table as the look-ups read it: entries xored with 0x80 when they are to be unsigned.
struct Entries {
  alignas(64) int8_t biased[1 << 12];
  const int8_t* data;
  bool odd;  // table[2^L - 1 - s] = -table[s]

  Entries(const Weight& weight, bool bias) : data(weight.table), odd(true) {
    const bool large = weight.format.states > 8;
    if (large && (weight.levels != nullptr || weight.structure != nullptr)) return;  // read otherwise
    const int size = 1 << weight.format.states;
    if (large) {
      for (int s = 0; s < size / 2; ++s) odd &= data[size - 1 - s] == -data[s];
    }
    if (!bias) return;
    for (int i = 0; i < size; ++i) biased[i] = static_cast<int8_t>(data[i] ^ -128);
    data = biased;
  }
};

// Look-up of up to 256 entries, held in registers.
template <int L, bool Odd>
class Lookup {
 public:
  explicit Lookup(const int8_t* entries) {
    for (int i = 0; i < kParts; ++i) parts_[i] = _mm512_loadu_si512(entries + 64 * i);
  }

  // The entries of eight windows per qword; permutations ignore the bits above their index.
  __m512i Find(__m512i windows, __m512i) const {
    if constexpr (L == 6) {
      return _mm512_permutexvar_epi8(windows, parts_[0]);
    } else if constexpr (L == 7) {
      return _mm512_permutex2var_epi8(parts_[0], windows, parts_[1]);
    } else {
      const __m512i a = _mm512_permutex2var_epi8(parts_[0], windows, parts_[1]);
      const __m512i b = _mm512_permutex2var_epi8(parts_[2], windows, parts_[3]);
      return _mm512_mask_blend_epi8(_mm512_movepi8_mask(windows), a, b);
    }
  }

  template <int K, int U>
  Unit Decode(const __m512i* lo, const __m512i* hi) const {
    const __m512i a = CutWindows<K, U, L, 0>(lo);
    const __m512i b = CutWindows<K, U, L, 0>(hi);
    return {Find(a, a), Find(b, b)};
  }

 private:
  static constexpr int kParts = (1 << L) / 64;
  __m512i parts_[kParts];
};

// Look-up of 1024 or 4096 entries, read from the first-level cache 128 at a time and chosen from by
// a tree of blends. With an odd table only the first half is read.
template <int L, bool Odd>
class LargeLookup {
 public:
  explicit LargeLookup(const int8_t* entries) : entries_(entries) {}

  // `low` holds the states' low bits, `high` their top bits from bit 7 down; both ignore the rest.
  __m512i Find(__m512i low, __m512i high) const {
    Index index = Prepare(low, high);
    return Finish(index, Select<0, 0, kParts>(index));
  }

  template <int K, int U>
  Unit Decode(const __m512i* lo, const __m512i* hi) const {
    const Index a = Prepare(CutWindows<K, U, 8, L - 8>(lo), CutWindows<K, U, 8, 0>(lo));
    const Index b = Prepare(CutWindows<K, U, 8, L - 8>(hi), CutWindows<K, U, 8, 0>(hi));
    return {Finish(a, Select<0, 0, kParts>(a)), Finish(b, Select<0, 0, kParts>(b))};
  }

 private:
  static constexpr int kParts = (1 << L) / (Odd ? 256 : 128);
  static constexpr int kChoices = L - (Odd ? 8 : 7);

  struct Index {
    __m512i low;
    __mmask64 upper;  // odd tables: the state was complemented, its entry is negated
    __mmask64 choices[kChoices];
  };

  static Index Prepare(__m512i low, __m512i high) {
    Index index{low, 0, {}};
    if constexpr (Odd) {
      const __m512i ones = _mm512_set1_epi8(-1);
      index.upper = _mm512_movepi8_mask(high);
      index.low = _mm512_mask_sub_epi8(low, index.upper, ones, low);
      high = _mm512_mask_sub_epi8(high, index.upper, ones, high);
      high = _mm512_add_epi8(high, high);
    }
    for (int i = 0; i < kChoices; ++i) {
      index.choices[i] = _mm512_movepi8_mask(high);
      high = _mm512_add_epi8(high, high);
    }
    return index;
  }

  static __m512i Finish(const Index& index, __m512i value) {
    if constexpr (!Odd) return value;
    // Also right for unsigned entries: 128 - q = 256 - (128 + q).
    return _mm512_mask_sub_epi8(value, index.upper, _mm512_setzero_si512(), value);
  }

  template <int Depth, int Begin, int Count>
  __m512i Select(const Index& index) const {
    if constexpr (Count == 1) {
      const int8_t* part = entries_ + 128 * Begin;
      return _mm512_permutex2var_epi8(_mm512_loadu_si512(part), index.low,
                                      _mm512_loadu_si512(part + 64));
    } else {
      const __m512i a = Select<Depth + 1, Begin, Count / 2>(index);
      const __m512i b = Select<Depth + 1, Begin + Count / 2, Count / 2>(index);
      return _mm512_mask_blend_epi8(index.choices[Depth], a, b);
    }
  }

  const int8_t* entries_;
};

// Look-up of tables of 256 levels.
template <int L>
class LevelLookup {
 public:
  explicit LevelLookup(const Levels& levels, uint8_t bias)
      : multiplier_(_mm512_set1_epi16(static_cast<int16_t>(levels.multiplier))),
        offset_(_mm512_set1_epi16(static_cast<int16_t>(levels.offset))) {
    const __m512i flip = _mm512_set1_epi8(static_cast<char>(bias));
    low_ = _mm512_xor_si512(_mm512_loadu_si512(levels.values), flip);
    high_ = _mm512_xor_si512(_mm512_loadu_si512(levels.values + 64), flip);
  }

  template <int K, int U>
  Unit Decode(const __m512i* lo, const __m512i* hi) const {
    return {Find(CutWords<K, U, L, 0>(lo), CutWords<K, U, L, 1>(lo)),
            Find(CutWords<K, U, L, 0>(hi), CutWords<K, U, L, 1>(hi))};
  }

 private:
  // Levels are the high bytes of the products.
  __m512i Find(__m512i even, __m512i odd) const {
    even = _mm512_add_epi16(_mm512_mullo_epi16(even, multiplier_), offset_);
    odd = _mm512_add_epi16(_mm512_mullo_epi16(odd, multiplier_), offset_);
    __m512i level =
        _mm512_mask_blend_epi8(0xaaaaaaaaaaaaaaaaull, _mm512_srli_epi16(even, 8), odd);
    // In the upper half the level is complemented and the value negated, which is also right for
    // unsigned values: 128 - q = 256 - (128 + q).
    const __mmask64 upper = _mm512_movepi8_mask(level);
    level = _mm512_mask_sub_epi8(level, upper, _mm512_set1_epi8(-1), level);
    const __m512i value = _mm512_permutex2var_epi8(low_, level, high_);
    return _mm512_mask_sub_epi8(value, upper, _mm512_setzero_si512(), value);
  }

  __m512i multiplier_;
  __m512i offset_;
  __m512i low_;
  __m512i high_;
};

// Whether a weight with this format may have a structured table that is too large for registers.
template <int K, int L>
constexpr bool kLargeStructures = K == 3 && L == 10;

// Look-up of such tables, which are falling, with a shift of one: structure.h. Windows are cut with one
// bit below them, so that c comes doubled, as it is subtracted.
template <int L>
class StructuredLookup {
 public:
  explicit StructuredLookup(const Structure& structure, uint8_t bias) {
    const __m128i cells = _mm_xor_si128(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(structure.whole_cells)),
        _mm_set1_epi8(static_cast<char>(bias)));
    // Every entry twice, and all of them again: permutations ignore the bits below and above.
    const __m256i twice =
        _mm256_set_m128i(_mm_unpackhi_epi8(cells, cells), _mm_unpacklo_epi8(cells, cells));
    cells_ = _mm512_broadcast_i64x4(twice);
  }

  template <int K, int U>
  Unit Decode(const __m512i* lo, const __m512i* hi) const {
    return {Find(CutWindows<K, U, 5, 0>(lo), CutWindows<K, U, 5, L - 4>(lo)),
            Find(CutWindows<K, U, 5, 0>(hi), CutWindows<K, U, 5, L - 4>(hi))};
  }

 private:
  __m512i Find(__m512i newest, __m512i low) const {
    low = _mm512_and_si512(low, _mm512_set1_epi8(0x1e));
    const __m512i cell = _mm512_permutexvar_epi8(_mm512_add_epi8(newest, low), cells_);
    return _mm512_sub_epi8(cell, low);
  }

  __m512i cells_;
};

template <int L, bool Odd>
using LookupOf = std::conditional_t<(L <= 8), Lookup<L, Odd>, LargeLookup<L, Odd>>;

// Interleaves k dwords of 16 rows with the dwords before them.
template <int K>
inline void LoadPairs(const uint8_t* codes, __m512i& before, __m512i* lo, __m512i* hi) {
#pragma GCC unroll 8
  for (int d = 0; d < K; ++d) {
    const __m512i now = _mm512_loadu_si512(codes + d * kLine);
    lo[d] = _mm512_unpacklo_epi32(before, now);
    hi[d] = _mm512_unpackhi_epi32(before, now);
    before = now;
  }
}

// Asks for K lines that will be needed later. Into the second level: it has more outstanding misses
// than the first, whose own prefetcher does the rest (measured: 1.2 to 1.3 times the bandwidth at
// 4 bits). Addresses past the end do no harm. Compilers leave the loads that follow where they are: moved
// among the prefetches they cost 4 % of the speed at one row of 4 bits.
template <int K>
inline void Prefetch(const uint8_t* codes) {
#pragma GCC unroll 8
  for (int d = 0; d < K; ++d) {
    _mm_prefetch(reinterpret_cast<const char*>(codes + d * kLine), _MM_HINT_T1);
  }
  asm volatile("" ::: "memory");
}

// Decodes 32 weights of 16 rows; `before` is the dword before `codes` and becomes the last one.
template <int K, class Table>
inline void DecodeStep(const Table& lookup, const uint8_t* codes, __m512i& before, Unit* out) {
  __m512i lo[K];
  __m512i hi[K];
  LoadPairs<K>(codes, before, lo, hi);
  out[0] = lookup.template Decode<K, 0>(lo, hi);
  out[1] = lookup.template Decode<K, 1>(lo, hi);
  out[2] = lookup.template Decode<K, 2>(lo, hi);
  out[3] = lookup.template Decode<K, 3>(lo, hi);
}

// Weights 0..3 of a unit, rows in order, a dword each.
inline __m512i FirstHalf(const Unit& unit) {
  return _mm512_castps_si512(_mm512_shuffle_ps(_mm512_castsi512_ps(unit.lo),
                                               _mm512_castsi512_ps(unit.hi), 0x88));
}

// Weights 4..7 of a unit.
inline __m512i SecondHalf(const Unit& unit) {
  return _mm512_castps_si512(_mm512_shuffle_ps(_mm512_castsi512_ps(unit.lo),
                                               _mm512_castsi512_ps(unit.hi), 0xdd));
}

// The dword before a group's first one is its last one: windows are cyclic.
inline __m512i LastDword(const uint8_t* block, int dwords) {
  return _mm512_loadu_si512(block + (dwords - 1) * kLine);
}

// Scales of 16 rows times 2^-12, exact.
inline __m512 LoadScales(const uint16_t* scales) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales));
  return _mm512_mul_ps(_mm512_cvtph_ps(halves), _mm512_set1_ps(0x1p-12f));
}

// Calls F<K, L>::Run(args...) for the bits and states of a format; L >= k + 2.
template <template <int, int> class F, int L, class... Args>
inline void DispatchBits(int bits, Args&&... args) {
  switch (bits) {
    case 1: return F<1, L>::Run(args...);
    case 2: return F<2, L>::Run(args...);
    case 3: return F<3, L>::Run(args...);
    case 4: return F<4, L>::Run(args...);
    case 5: return F<L >= 7 ? 5 : 4, L>::Run(args...);
    default: return F<L >= 8 ? 6 : 4, L>::Run(args...);
  }
}

// The tables that fit registers.
template <template <int, int> class F, class... Args>
inline void DispatchSmall(const Format& format, Args&&... args) {
  switch (format.states) {
    case 6: return DispatchBits<F, 6>(format.bits, args...);
    case 7: return DispatchBits<F, 7>(format.bits, args...);
    default: return DispatchBits<F, 8>(format.bits, args...);
  }
}

template <template <int, int> class F, class... Args>
inline void Dispatch(const Format& format, Args&&... args) {
  switch (format.states) {
    case 10: return DispatchBits<F, 10>(format.bits, args...);
    case 12: return DispatchBits<F, 12>(format.bits, args...);
    default: return DispatchSmall<F>(format, args...);
  }
}

// Decodes one group of up to two panels in the form that `To` says: its elements, how far panels and
// units of eight weights lie apart, what is added to entries, and how a unit is stored.
template <int K, int L, class To>
struct DecodeBlock {
  using Element = typename To::Element;

  static void Run(const Weight& weight, const Entries& entries, int64_t panel, int panels,
                  int64_t g, Element* w) {
    const int64_t ahead = PairAhead(weight.format, g);
    for (int p = 0; p < panels; ++p, w += To::kPanel) {
      const uint8_t* codes = weight.block(panel + p, g);
      if constexpr (kLargeStructures<K, L>) {
        if (weight.structure != nullptr) {
          const StructuredLookup<L> lookup(*weight.structure, To::kBias);
          Panel(lookup, weight.format, codes, ahead, w);
          continue;
        }
      }
      if (L > 8 && weight.levels != nullptr) {
        const LevelLookup<(L > 8 ? L : 10)> lookup(*weight.levels, To::kBias);
        Panel(lookup, weight.format, codes, ahead, w);
      } else if (L > 8 && entries.odd) {
        Panel(LookupOf<L, (L > 8)>(entries.data), weight.format, codes, ahead, w);
      } else {
        Panel(LookupOf<L, false>(entries.data), weight.format, codes, ahead, w);
      }
    }
  }

 private:
  template <class Table>
  static void Panel(const Table lookup, const Format& format, const uint8_t* codes,
                    int64_t ahead, Element* out) {
    __m512i before = LastDword(codes, format.dwords);
    for (int t = 0; t < format.group; t += kStep, codes += K * kLine) {
      Unit units[4];
      Prefetch<K>(codes + ahead);
      DecodeStep<K>(lookup, codes, before, units);
      for (int u = 0; u < 4; ++u, out += To::kUnit) To::Store(units[u], out);
    }
  }
};

}  // namespace
}  // namespace onnxcomp::hyper
