// Codes of spec.md on a GPU: from the dwords of memory to weights.
#pragma once

#include "gpu/simt.h"

namespace onnxcomp::hyper {

using gpu::Funnel;
using gpu::kThreads;
using gpu::Vector;

// How a kernel finds the value of a state.
enum class Lookup {
  kTwice,    // in the table, which lies in shared memory twice: up to 128 states
  kDirect,   // in the table
  kLeveled,  // in 256 levels, which a multiplication finds; see levels.h
  kPairs,    // two weights at a time: windows of L + k bits
};

// A weight in device memory.
struct GpuWeight {
  int64_t rows, length, panels, groups;
  int group;   // weights of a group
  int dwords;  // of one row of one group
  int states;  // L
  const uint8_t* codes;
  const uint16_t* scales;
  const int8_t* table;
  uint32_t multiplier;  // of the levels, for windows at the low end of a word
  uint32_t offset;
  bool leveled;
  int8_t levels[256];
  int copy_bits;  // log2 of the most copies of a table in shared memory: 5, or 4 where it is scarce

  // The dwords of row `lane` of a panel in one group: 16 words apart from each other.
  ONNXCOMP_DEVICE const uint32_t* Row(int64_t panel, int64_t g, int lane) const {
    return reinterpret_cast<const uint32_t*>(codes) + (panel * groups + g) * (dwords * 16) + lane;
  }

  // Bits [position, position + 32) of a row's cyclic string; position is above -32.
  ONNXCOMP_DEVICE uint32_t BitsAt(int64_t panel, int64_t g, int lane, int position) const {
    if (position < 0) position += dwords * 32;
    const int d = position / 32;
    const uint32_t* row = Row(panel, g, lane);
    return Funnel(row[d * 16], row[(d + 1 == dwords ? 0 : d + 1) * 16], position % 32);
  }

  ONNXCOMP_DEVICE float ScaleOf(int64_t panel, int64_t g, int lane) const {
    // The factor 2^-12 of spec.md section 2.
    return gpu::FloatOfHalf(scales[(panel * groups + g) * 16 + lane]) * (1.0f / 4096.0f);
  }
};

// k of spec.md.
inline int BitsOf(const GpuWeight& weight) { return weight.dwords * 32 / weight.group; }

// A table in shared memory, at most 32 times and as often as 32 KB (or 16) hold it, so that threads
// of a warp rarely or never ask the same bank for different words. Entry e is words e * copies .. e
// * copies + copies - 1. Small tables lie there twice, for weights that go to the low half of a
// word and to the high one.
struct SharedTable {
  int entry_bits;  // log2 of the entries
  int copy_bits;   // log2 of the copies
  bool twice;

  static SharedTable For(Lookup lookup, const GpuWeight& weight, int bits) {
    const int states = weight.states;
    const int most = weight.copy_bits;
    if (lookup == Lookup::kPairs) return {states + bits, most, false};
    if (lookup == Lookup::kLeveled) return {8, most, false};
    if (lookup == Lookup::kTwice) return {states, most, true};
    return {states, states <= 8 ? most : most + 8 - states, false};
  }

  // Of one table.
  ONNXCOMP_DEVICE int Size() const { return 4 << (entry_bits + copy_bits); }
  ONNXCOMP_DEVICE int64_t Bytes() const { return int64_t{Size()} * (twice ? 2 : 1); }

  // Where windows begin in a word so that the bits below them count the bytes of an entry.
  ONNXCOMP_DEVICE int Shift() const { return copy_bits + 2; }

  // Writes this thread's share of one table; `word(entry)` is what an entry holds.
  template <class WordOf>
  ONNXCOMP_DEVICE void Fill(int thread, char* table, const WordOf& word) const {
    auto* vectors = reinterpret_cast<Vector*>(table);
    const int count = Size() / 16;
    for (int i = thread; i < count; i += kThreads) {
      Vector vector;
      const uint32_t first = word(i * 4 >> copy_bits);
      ONNXCOMP_UNROLL
      for (int j = 0; j < 4; ++j) {
        vector.word[j] = copy_bits >= 2 ? first : word((i * 4 + j) >> copy_bits);
      }
      vectors[i] = vector;
    }
  }
};

// The strings that a thread decodes in one step: kRun weights of its two rows, kRun = 32 or 8.
//
// For 32 weights these are the K dwords that hold them and the one before, as they are in memory.
// For 8 weights they are words that begin `Lead` bits before the weights.
template <int K, int kRun>
struct Strings {
  static constexpr int kWords = kRun == 32 ? K + 1 : (kRun * K + 31) / 32 + 1;
  uint32_t word[2][kWords];
};

// Decodes windows. `lead` is L where windows are brought to the low end of a word (kLeveled), else
// L plus the bits that count the bytes of an entry.
template <int K, int kRun, Lookup kLookup>
struct Decoder {
  SharedTable table;
  int lead;
  uint32_t mask;       // of a window in place
  uint32_t copy_mask;  // of a thread's number: its copy
  uint32_t multiplier, offset;

  explicit Decoder(const GpuWeight& weight)
      : table(SharedTable::For(kLookup, weight, K)),
        lead(weight.states + (kLookup == Lookup::kLeveled ? 0 : table.Shift())),
        mask(((1u << table.entry_bits) - 1u) << table.Shift()),
        copy_mask((1u << table.copy_bits) - 1u),
        multiplier(weight.multiplier),
        offset(weight.offset) {}

  // Quarter `quarter` of unit `part` of a group: weights ((part * 4 + quarter) * kRun ...).
  ONNXCOMP_DEVICE void Load(const GpuWeight& weight, int64_t panel, int64_t g, int row, int begin,
                            uint32_t* words) const {
    using Words = Strings<K, kRun>;
    if constexpr (kRun == 32) {
      const int first = begin * K / 32;
      const uint32_t* dwords = weight.Row(panel, g, row);
      words[0] = dwords[(first == 0 ? weight.dwords - 1 : first - 1) * 16];
      ONNXCOMP_UNROLL
      for (int i = 0; i < K; ++i) words[i + 1] = dwords[(first + i) * 16];
    } else {
      ONNXCOMP_UNROLL
      for (int i = 0; i < Words::kWords; ++i) {
        const int position = begin * K - lead + 32 * i;
        words[i] = weight.BitsAt(panel, g, row, position % (weight.dwords * 32));
      }
    }
  }

  // Bits [32 i - lead, 32 i + 32 - lead) of the string, counted from the run's first weight.
  ONNXCOMP_DEVICE uint32_t Led(const uint32_t* words, int i) const {
    if constexpr (kRun != 32) return words[i];
    if (i == K) return words[K] >> (32 - lead);
    return Funnel(words[i], words[i + 1], 32 - lead);
  }

  // 32 bits from the beginning of the window of weight t on (or, but for kLeveled, from Shift()
  // before).
  ONNXCOMP_DEVICE uint32_t Window(const uint32_t* words, int t) const {
    const int position = (t + 1) * K;
    const uint32_t low = Led(words, position / 32);
    if (position % 32 == 0) return low;
    return Funnel(low, Led(words, position / 32 + 1), position % 32);
  }

  // The table's word for weight t, or for kPairs, for weights t and t + 1.
  ONNXCOMP_DEVICE uint32_t Look(const char* shared, int lane, const uint32_t* words, int t) const {
    const uint32_t window = Window(words, t);
    const uint32_t copy = (static_cast<uint32_t>(lane) & copy_mask) * 4u;
    uint32_t place;
    if constexpr (kLookup == Lookup::kLeveled) {
      // The product's highest byte is the level, whatever stands above the window.
      place = ((window * multiplier + offset) >> (24 - table.Shift()) & mask) | copy;
    } else {
      place = (window & mask) | copy;
    }
    return *reinterpret_cast<const uint32_t*>(shared + place);
  }
};

// The value of a table's entry: a state, or a level.
template <Lookup kLookup>
ONNXCOMP_DEVICE int ValueOf(const GpuWeight& weight, int entry) {
  if constexpr (kLookup == Lookup::kLeveled) return weight.levels[entry];
  return weight.table[entry];
}

}  // namespace onnxcomp::hyper
