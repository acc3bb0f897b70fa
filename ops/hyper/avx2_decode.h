// Decoding with AVX2: eight rows times four weights at a time.
//
// 32 bytes of codes are one dword of eight rows. Shifts put four windows of each row into the bytes
// of a dword; byte shuffles over 16 entries, chained by differences, look them up. Where k divides
// 8, windows 8 bits apart are taken together, so that one shift cuts four of them; the activations
// are permuted to match.
//
// Internal linkage throughout; only for translation units compiled with AVX2 flags.
#pragma once

#include <immintrin.h>

#include "hyper/plain.h"
#include "hyper/prefetch.h"

namespace onnxcomp::hyper {
namespace {

constexpr int kStep = 32;  // weights of a row that are decoded together: k dwords

inline __m256i LoadDword(const uint8_t* codes) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
}

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

// Bits [Start, Start + 32) of the string whose dword 0 is dwords[1]; Start may be negative.
template <int Start, int Needed>
inline __m256i Funnel(const __m256i* dwords) {
  constexpr int kFirst = (Start + 32) / 32;
  constexpr int kShift = (Start + 32) % 32;
  if constexpr (kShift == 0) {
    return dwords[kFirst];
  } else {
    const __m256i low = _mm256_srli_epi32(dwords[kFirst], kShift);
    if constexpr (kShift + Needed <= 32) {
      return low;
    } else {
      return _mm256_or_si256(low, _mm256_slli_epi32(dwords[kFirst + 1], 32 - kShift));
    }
  }
}

// Vector V of a step: a window in the low L bits of every byte, rubbish above. dwords[0] is the one
// before the step.
template <int K, int L, int V>
inline __m256i CutFour(const __m256i* dwords) {
  if constexpr (8 % K == 0) {
    constexpr int kApart = 8 / K;  // vectors of a dword
    constexpr int kStart = 32 * (V / kApart) + K * (V % kApart + 1) - L;
    return Funnel<kStart, 24 + L>(dwords);
  } else {
    // Four windows K bits apart: first spread pairs to 16 bits, then each pair to two bytes.
    const __m256i four = Funnel<K * (4 * V + 1) - L, 3 * K + L>(dwords);
    const __m256i pairs =
        _mm256_blend_epi16(four, _mm256_slli_epi32(four, 16 - 2 * K), 0xaa);
    const __m256i high = _mm256_and_si256(_mm256_slli_epi16(pairs, 8 - K),
                                          _mm256_set1_epi16(static_cast<int16_t>(0xff00)));
    return _mm256_or_si256(_mm256_and_si256(pairs, _mm256_set1_epi16(0xff)), high);
  }
}

// A table of at most 256 entries as registers of 16, prepared once for many groups.
struct Entries {
  __m256i parts[16];
  bool odd;  // table[2^L - 1 - s] = -table[s]: half the entries and a sign do
  uint16_t multiplier = 0;  // of Levels, whose values are the entries then
  uint16_t offset = 0;

  explicit Entries(const Weight& weight) : Entries(weight.table, weight.format.states) {
    if (weight.levels == nullptr) return;
    *this = Entries(weight.levels->values, 8);
    multiplier = weight.levels->multiplier;
    offset = weight.levels->offset;
  }

  Entries(const int8_t* table, int states) : odd(states > 6 && states <= 8) {
    if (states > 8) return;
    const int size = 1 << states;
    for (int s = 0; s < size; ++s) odd = odd && table[size - 1 - s] == -table[s];
    for (int i = 0; i < size / 16; ++i) {
      const __m128i part = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table + 16 * i));
      parts[i] = _mm256_broadcastsi128_si256(part);
    }
    // Differences within each half of 128 entries, which is what one chain covers.
    for (int i = size / 16 - 1; i > 0; --i) {
      if (i % 8 != 0) parts[i] = _mm256_xor_si256(parts[i], parts[i - 1]);
    }
  }
};

// Windows of every second of the four weights of vector V, from weight `Parity` on, as 16 bits with
// rubbish above their L bits.
template <int K, int L, int V, int Parity>
inline __m256i CutWords(const __m256i* dwords) {
  const __m256i two = Funnel<K * (4 * V + Parity + 1) - L, 2 * K + L>(dwords);
  return _mm256_blend_epi16(two, _mm256_slli_epi32(two, 16 - 2 * K), 0xaa);
}

// Look-up of 2^L entries of one byte, L <= 8, xored with `Bias`.
template <int L, bool Odd, int Bias>
class Lookup {
 public:
  explicit Lookup(const Entries& entries) {
    for (int i = 0; i < kParts; ++i) parts_[i] = entries.parts[i];
  }

  __m256i Find(__m256i windows) const {
    const __m256i mask = _mm256_set1_epi8(static_cast<char>((1 << L) - 1));
    __m256i value;
    if constexpr (Odd) {
      // In the upper half the state is complemented and the entry negated.
      const __m256i upper = UpperHalf(windows);
      const __m256i states = _mm256_and_si256(_mm256_xor_si256(windows, upper), mask);
      const __m256i entry = Chain<0, kParts>(states);
      value = _mm256_sub_epi8(_mm256_xor_si256(entry, upper), upper);  // -v = ~v + 1
    } else if constexpr (L == 8) {
      const __m256i low = _mm256_and_si256(windows, _mm256_set1_epi8(0x7f));
      value = _mm256_blendv_epi8(Chain<0, 8>(low), Chain<8, 16>(low), windows);
    } else {
      value = Chain<0, kParts>(_mm256_and_si256(windows, mask));
    }
    return Bias == 0 ? value
                     : _mm256_xor_si256(value, _mm256_set1_epi8(static_cast<char>(Bias)));
  }

 private:
  static constexpr int kParts = (1 << L) / (Odd ? 32 : 16);

  // All ones where bit L - 1 of the byte is set.
  static __m256i UpperHalf(__m256i windows) {
    const __m256i top = _mm256_slli_epi16(windows, 8 - L);
    return _mm256_cmpgt_epi8(_mm256_setzero_si256(), top);
  }

  // A shuffle gives zero for a negative index: parts above the state's own add nothing, and the
  // differences up to it add up to its entry.
  template <int Begin, int End>
  __m256i Chain(__m256i states) const {
    __m256i value = _mm256_shuffle_epi8(parts_[Begin], states);
#pragma GCC unroll 8
    for (int i = Begin + 1; i < End; ++i) {
      const __m256i moved =
          _mm256_sub_epi8(states, _mm256_set1_epi8(static_cast<char>(16 * (i - Begin))));
      value = _mm256_xor_si256(value, _mm256_shuffle_epi8(parts_[i], moved));
    }
    return value;
  }

  __m256i parts_[kParts];
};

// Look-up of tables of 256 levels, xored with `Bias`.
template <int Bias>
class LevelLookup {
 public:
  explicit LevelLookup(const Entries& entries)
      : multiplier_(_mm256_set1_epi16(static_cast<int16_t>(entries.multiplier))),
        offset_(_mm256_set1_epi16(static_cast<int16_t>(entries.offset))),
        values_(entries) {}

  // Levels are the high bytes of the products.
  __m256i Find(__m256i even, __m256i odd) const {
    even = _mm256_add_epi16(_mm256_mullo_epi16(even, multiplier_), offset_);
    odd = _mm256_add_epi16(_mm256_mullo_epi16(odd, multiplier_), offset_);
    const __m256i upper = _mm256_set1_epi16(static_cast<int16_t>(0xff00));
    return values_.Find(_mm256_or_si256(_mm256_srli_epi16(even, 8), _mm256_and_si256(odd, upper)));
  }

 private:
  __m256i multiplier_;
  __m256i offset_;
  Lookup<8, true, Bias> values_;
};

// Entries of vector V of a step.
template <int K, int L, int V, class Table>
inline __m256i DecodeFour(const Table& lookup, const __m256i* dwords) {
  if constexpr (L <= 8) {
    return lookup.Find(CutFour<K, L, V>(dwords));
  } else {
    return lookup.Find(CutWords<K, L, V, 0>(dwords), CutWords<K, L, V, 1>(dwords));
  }
}

template <int K, int L, int V, class Table>
inline void DecodeVectors(const Table& lookup, const __m256i* dwords, uint8_t* out) {
  const __m256i entries = DecodeFour<K, L, V>(lookup, dwords);
  _mm256_store_si256(reinterpret_cast<__m256i*>(out + V * kLine), entries);
  if constexpr (V + 1 < 8) DecodeVectors<K, L, V + 1>(lookup, dwords, out);
}

// One panel's group: out[(t' / 4) * 64 + lane * 4 + t' mod 4].
template <int K, int L, class Table>
inline void DecodeHalves(const Table lookup, const uint8_t* codes, int group, uint8_t* out) {
  const int count = group * K / 32;
  __m256i before[2] = {LoadDword(codes + (count - 1) * kLine),
                       LoadDword(codes + (count - 1) * kLine + 32)};
  for (int t = 0; t < group; t += kStep, codes += K * kLine, out += 8 * kLine) {
    for (int half = 0; half < 2; ++half) {
      __m256i dwords[K + 1];
      dwords[0] = before[half];
#pragma GCC unroll 8
      for (int d = 0; d < K; ++d) dwords[d + 1] = LoadDword(codes + d * kLine + 32 * half);
      before[half] = dwords[K];
      DecodeVectors<K, L, 0>(lookup, dwords, out + 32 * half);
    }
#pragma GCC unroll 8
    for (int d = 0; d < K; ++d) {
      _mm_prefetch(reinterpret_cast<const char*>(codes + (kAhead + d) * kLine), _MM_HINT_T1);
    }
  }
}

template <int K, int L, int Bias>
void DecodeVector(const Entries& entries, const uint8_t* codes, int group, uint8_t* out) {
  if constexpr (L > 8) {
    DecodeHalves<K, L>(LevelLookup<Bias>(entries), codes, group, out);
  } else if (entries.odd) {
    DecodeHalves<K, L>(Lookup<L, true, Bias>(entries), codes, group, out);
  } else {
    DecodeHalves<K, L>(Lookup<L, false, Bias>(entries), codes, group, out);
  }
}

// The bytes of one panel's group, xored with `Bias`, in the order of CutPosition.
template <int Bias>
inline void DecodeBytes(const Weight& weight, const Entries& entries, int64_t panel, int64_t group,
                        uint8_t* out) {
  using Fn = void (*)(const Entries&, const uint8_t*, int, uint8_t*);
  static constexpr Fn kByFormat[6][5] = {
      {DecodeVector<1, 6, Bias>, DecodeVector<1, 7, Bias>, DecodeVector<1, 8, Bias>,
       DecodeVector<1, 10, Bias>, DecodeVector<1, 12, Bias>},
      {DecodeVector<2, 6, Bias>, DecodeVector<2, 7, Bias>, DecodeVector<2, 8, Bias>,
       DecodeVector<2, 10, Bias>, DecodeVector<2, 12, Bias>},
      {DecodeVector<3, 6, Bias>, DecodeVector<3, 7, Bias>, DecodeVector<3, 8, Bias>,
       DecodeVector<3, 10, Bias>, DecodeVector<3, 12, Bias>},
      {DecodeVector<4, 6, Bias>, DecodeVector<4, 7, Bias>, DecodeVector<4, 8, Bias>,
       DecodeVector<4, 10, Bias>, DecodeVector<4, 12, Bias>},
      {nullptr, DecodeVector<5, 7, Bias>, DecodeVector<5, 8, Bias>, DecodeVector<5, 10, Bias>,
       DecodeVector<5, 12, Bias>},
      {nullptr, nullptr, DecodeVector<6, 8, Bias>, DecodeVector<6, 10, Bias>,
       DecodeVector<6, 12, Bias>}};
  const Format& format = weight.format;
  const uint8_t* codes = weight.block(panel, group);
  if (format.states > 8 && weight.levels == nullptr) {
    return DecodeScalar(format, weight.table, codes, Bias, out);
  }
  kByFormat[format.bits - 1][StatesIndex(format)](entries, codes, format.group, out);
}

}  // namespace
}  // namespace onnxcomp::hyper
