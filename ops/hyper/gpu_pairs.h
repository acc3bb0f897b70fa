// Two weights by one look-up in shared memory, for groups of 128 weights.
//
// A window of L + k bits holds two weights. Tables of pairs lie in shared memory 32 times, word
// e * 32 + copy, so that every lane reads its own bank: with 16 copies a look-up takes twice as
// long, with 8 or fewer three times. So many copies of a table with 2^10 entries are 128 KB, all
// that a block of Hopper has room for, and what 2^11 entries need is found another way.
#pragma once

#include "gpu/bits.h"
#include "hyper/gpu_codes.h"

namespace onnxcomp::hyper {

using gpu::AndOr;
using gpu::Permute;

constexpr int kPairGroup = 128;  // weights of a group
constexpr int kRunWeights = 32;  // consecutive weights of a row that a lane decodes

// What an entry of the table is.
enum class PairForm {
  kHalves,   // two float16, by L + k bits
  kSingles,  // one float16, by L bits; a second table has it in the high half
  kBytes,    // int8: two candidates of two weights, by L + k - 1 bits; the last bit of the window,
             // which is that of the second weight, chooses
};

// A weight as the kernels of this file's tables take it.
struct PairWeight {
  const char* codes;
  const char* scales;
  const int8_t* table;
  int64_t rows, length, panels;
  int groups;
  int states;  // of the table in memory, at most those of the kernel's
};

// K bits for each weight and L of a state. A table of fewer states is a table of 2^L whose lowest
// bits do not matter, since a window ends with its weight's bits.
template <PairForm kForm, int K, int L, int kCopyBits>
struct PairTable {
  static constexpr PairForm kKind = kForm;
  static constexpr int kBits = K;
  static constexpr int kStates = L;
  static constexpr bool kInteger = kForm == PairForm::kBytes;
  static constexpr int kShift = 2 + kCopyBits;  // where windows begin in a word: bytes of an entry
  static constexpr int kEntryBits = kForm == PairForm::kSingles ? L : kInteger ? L + K - 1 : L + K;
  static constexpr int kSize = 4 << (kEntryBits + kCopyBits);
  static constexpr int kBytes = kForm == PairForm::kSingles ? 2 * kSize : kSize;
  static constexpr uint32_t kMask = ((1u << kEntryBits) - 1u) << kShift;
  static constexpr int kStaged = 1 << L;  // bytes of the model's table in shared memory
  static_assert(!kInteger || K == 4, "two weights of 4 bits end with a byte");

  // The bits of a lane's copy in the address of an entry.
  static ONNXCOMP_DEVICE uint32_t Copy(int lane) {
    return (static_cast<uint32_t>(lane) & ((1u << kCopyBits) - 1u)) * 4u;
  }

  // Brings the model's table to shared memory, by `count` threads.
  static ONNXCOMP_THREAD void Stage(const PairWeight& weight, int8_t* staged, int thread,
                                    int count) {
    for (int i = thread; i < 1 << weight.states; i += count) staged[i] = weight.table[i];
  }

  // Fills the table from the staged one. The 16-byte stores of eight lanes go to eight different
  // groups of banks.
  static ONNXCOMP_THREAD void Fill(const PairWeight& weight, const int8_t* staged, char* table,
                                   int thread, int count) {
    constexpr int kVectors = (1 << kCopyBits) / 4;
    const int spare = L - weight.states;
    ONNXCOMP_UNROLL_TWICE
    for (int entry = thread; entry < 1 << kEntryBits; entry += count) {
      const uint32_t word = Word(staged, spare, entry);
      Vector* to = reinterpret_cast<Vector*>(table) + entry * kVectors;
      const int turn = thread / (8 / kVectors);
      ONNXCOMP_UNROLL
      for (int i = 0; i < kVectors; ++i) {
        to[(i + turn) & (kVectors - 1)] = {{word, word, word, word}};
      }
      if constexpr (kForm == PairForm::kSingles) {
        const uint32_t high = word << 16;
        to += kSize / 16;
        ONNXCOMP_UNROLL
        for (int i = 0; i < kVectors; ++i) {
          to[(i + turn) & (kVectors - 1)] = {{high, high, high, high}};
        }
      }
    }
  }

  // Weights 2 pair and 2 pair + 1 of a run as float16. `words` are the dword before the run and its
  // K own ones.
  static ONNXCOMP_THREAD uint32_t Pair(const char* table, uint32_t copy, const uint32_t* words,
                                       int pair) {
    const int first = (2 * pair + 1) * K - L;
    if constexpr (kForm == PairForm::kHalves) return Look(table, copy, words, first);
    return Look(table, copy, words, first) + Look(table + kSize, copy, words, first + K);
  }

  // Weights 8 step .. 8 step + 7 as bytes: the first four, the last four.
  static ONNXCOMP_THREAD void Eight(const char* table, uint32_t copy, const uint32_t* words,
                                    int step, uint32_t& low, uint32_t& high) {
    // The last bit of pair j is the top bit of byte j of the dword of these eight weights. It makes
    // of selectors 5410 (the first candidates of two words) 7632.
    const uint32_t tops = Permute(words[step + 1], 0u, 0xba98u) & 0x22222222u;
    const uint32_t first = tops ^ 0x54105410u;
    const int begin = (8 * step + 1) * K - L;
    const uint32_t a = Look(table, copy, words, begin);
    const uint32_t b = Look(table, copy, words, begin + 2 * K);
    const uint32_t c = Look(table, copy, words, begin + 4 * K);
    const uint32_t d = Look(table, copy, words, begin + 6 * K);
    low = Permute(a, b, first);
    high = Permute(c, d, first >> 16);
  }

 private:
  static ONNXCOMP_THREAD uint32_t Look(const char* table, uint32_t copy, const uint32_t* words,
                                       int begin) {
    const uint32_t place = AndOr(Window(words, begin), kMask, copy);
    return *reinterpret_cast<const uint32_t*>(table + place);
  }

  // The window that begins at bit `begin` of the run, shifted to kShift.
  static ONNXCOMP_THREAD uint32_t Window(const uint32_t* words, int begin) {
    const int position = begin - kShift + 32;
    const int i = position >> 5;
    const int bit = position & 31;
    if (bit == 0) return words[i];
    if (bit + kShift + kEntryBits <= 32) return words[i] >> bit;
    if (bit + kShift >= 32) return words[i + 1] << (32 - bit);
    return Funnel(words[i], words[i + 1], bit);
  }

  static ONNXCOMP_THREAD uint32_t Word(const int8_t* staged, int spare, int entry) {
    constexpr int kLast = (1 << L) - 1;
    const auto byte = [&](int state) {
      return static_cast<uint32_t>(static_cast<uint8_t>(staged[(state & kLast) >> spare]));
    };
    if constexpr (kInteger) {
      const int other = entry | 1 << kEntryBits;
      return byte(entry) | byte(entry >> K) << 8 | byte(other) << 16 | byte(other >> K) << 24;
    }
    const auto half = [&](int state) {
      return static_cast<float>(staged[(state & kLast) >> spare]);
    };
    return gpu::PackHalves(half(entry), kForm == PairForm::kSingles ? 0.0f : half(entry >> K));
  }
};

}  // namespace onnxcomp::hyper
