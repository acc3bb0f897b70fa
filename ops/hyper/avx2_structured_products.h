// Products of structured tables with int8 activations, AVX2. Included like avx2_kernels.h, by
// translation units that define Dot and kBias; where weights' bytes are signed in Dot, products of
// unsigned entries are summed here in 16 bits first.
//
// Few rows of activations: decode and multiply in registers while the codes stream in. More rows:
// decode a group of two panels into the first-level cache, then multiply tiles of four rows by it.
#pragma once

#include <limits>

#include "hyper/avx2_structured.h"

namespace onnxcomp::hyper {
namespace {

constexpr int kTile = 4;  // 4 rows times 16 lanes: 8 accumulators, of 16 registers
constexpr int kStreamRows = 4;  // up to here the streaming form is the faster one
constexpr bool kUnsignedDot = kBias != 0;

// Isa::bias: what the sum of the activations of a group is multiplied by, beside the product.
inline int32_t StructuredBias(const Weight& weight) {
  return weight.structure != nullptr ? weight.structure->beta : -128;
}

// sums + the sums of neighbours. The ones stay in memory: tiles leave no register for them. A sum that
// assembly has seen stays put: compilers would rather start many products at once, and spill.
inline __m256i AddWords(__m256i sums, __m256i words) {
  alignas(32) static constexpr int16_t kOnes[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
  asm("vpmaddwd %1, %0, %0" : "+x"(words) : "m"(kOnes));
  sums = _mm256_add_epi32(sums, words);
  asm volatile("" : "+x"(sums));
  return sums;
}

// sums + products of unsigned entries, four to a dword.
inline __m256i AddProducts(__m256i sums, __m256i entries, __m256i x) {
  Dot(sums, entries, x);
  return sums;
}

// y + float(product) * (scale of the weights * scale of the activations), each step rounded.
inline __m256 Accumulate(__m256 y, __m256i sums, int shift, int32_t bias, __m256 weights,
                         float x) {
  const __m256i whole = _mm256_add_epi32(_mm256_sll_epi32(sums, _mm_cvtsi32_si128(shift)),
                                         _mm256_set1_epi32(bias));
  const __m256 scale = _mm256_mul_ps(weights, _mm256_set1_ps(x));
  return _mm256_add_ps(y, _mm256_mul_ps(_mm256_cvtepi32_ps(whole), scale));
}

// Sums over one group for eight rows of weights and M of activations. Products are added in 16 bits
// before they are widened: `Joined` of them for one row; of two vectors for more, which leaves the
// registers to the sums. Inlined early, so that sums become registers.
template <int Joined, int M>
class Sums {
 public:
  // Adds vector V of entries; `x` is where the activations of vector 0 lie.
  template <int V>
  __attribute__((always_inline)) void Add(__m256i entries, const int8_t* x) {
    if constexpr (kUnsignedDot && M == 1 && V % 2 == 1) {
      words_ = AddProducts(words_, entries, At(x, V, 0));  // two chains hide the latency
    } else if constexpr (kUnsignedDot) {
#pragma GCC unroll 4
      for (int i = 0; i < M; ++i) sums_[i] = AddProducts(sums_[i], entries, At(x, V, i));
    } else if constexpr (M == 1) {
      const __m256i products = _mm256_maddubs_epi16(entries, At(x, V, 0));
      words_ = V % Joined == 0 ? products : _mm256_add_epi16(words_, products);
      if constexpr (V % Joined == Joined - 1) sums_[0] = AddWords(sums_[0], words_);
    } else if constexpr (V % 2 == 0) {
      words_ = entries;
    } else {
#pragma GCC unroll 4
      for (int i = 0; i < M; ++i) {
        const __m256i before = _mm256_maddubs_epi16(words_, At(x, V - 1, i));
        const __m256i now = _mm256_maddubs_epi16(entries, At(x, V, i));
        sums_[i] = AddWords(sums_[i], _mm256_add_epi16(before, now));
      }
    }
  }

  __m256i total(int i) const {
    return kUnsignedDot ? _mm256_add_epi32(sums_[i], words_) : sums_[i];
  }

 private:
  static __m256i At(const int8_t* x, int vector, int i) {
    return Broadcast(x + 4 * (vector * M + i));
  }

  __m256i sums_[M] = {};
  // Products of the vectors before, or their entries; with unsigned dot products a second sum.
  __m256i words_ = _mm256_setzero_si256();
};

// The sums over one group of a panel for one row of activations, which both halves of the panel read
// together. `Inner`: other codes follow those of the group, so that loads need not stop at its end,
// which takes 3 % of the time.
template <int K, int Back, int Joined, bool Inner, class Table>
inline void SumPanel(const Table& table, const uint8_t* codes, int group, const int8_t* x,
                     __m256i* totals) {
  using Cut = Windows<K, Back>;
  const uint8_t* last = codes + (group * K / 32 - 1) * kLine;
  Cut low_cut(last);
  Cut high_cut(last + 32);
  Sums<Joined, 1> low_sums;
  Sums<Joined, 1> high_sums;
  low_cut.Load(codes);
  for (int t = 0; t < group; t += 4 * Cut::kVectors) {
    Prefetch<Cut::kDwords>(codes + kAhead * kLine);
    high_cut.Load(codes + 32);
    low_cut.ForEach([&](auto v, __m256i newest, __m256i low) __attribute__((always_inline)) {
      low_sums.template Add<v()>(table.Find(newest, low), x);
    });
    codes = Inner ? codes + Cut::kDwords * kLine : NextCodes<Cut>(codes, last);
    low_cut.Load(codes);
    high_cut.ForEach([&](auto v, __m256i newest, __m256i low) __attribute__((always_inline)) {
      high_sums.template Add<v()>(table.Find(newest, low), x);
    });
    x += 4 * Cut::kVectors;
  }
  totals[0] = low_sums.total(0);
  totals[1] = high_sums.total(0);
}

// The sums over one group for eight rows of weights and M interleaved ones of activations. Rows are
// taken in halves of a panel because the sums of both do not fit the registers; the lines of a
// group are in the cache for the second half.
template <int K, int Back, int Joined, int M, class Table>
inline void SumGroup(const Table& table, const uint8_t* codes, int group, const int8_t* x,
                     bool ahead, __m256i* totals) {
  using Cut = Windows<K, Back>;
  Cut cut(codes + (group * K / 32 - 1) * kLine);
  Sums<Joined, M> sums;
  for (int t = 0; t < group; t += 4 * Cut::kVectors) {
    if (ahead) Prefetch<Cut::kDwords>(codes + kAhead * kLine);
    cut.Load(codes);
    cut.ForEach([&](auto v, __m256i newest, __m256i low) __attribute__((always_inline)) {
      sums.template Add<v()>(table.Find(newest, low), x);
    });
    codes += Cut::kDwords * kLine;
    x += 4 * Cut::kVectors * M;
  }
  for (int i = 0; i < M; ++i) totals[i] = sums.total(i);
}

// One panel, one tile of M rows of activations. A function of its own, with registers of its own.
// `Inner`: it is not the last panel.
template <int K, int Back, int Joined, int M, bool Inner, class Table>
__attribute__((noinline)) void StreamPanel(const Table table, const Weight& weight, const Activations& x,
                        int64_t panel, Tile tile, float* out) {
  const Format& format = weight.format;
  const int shift = weight.structure->shift;
  __m256 y[2][M];
  for (int i = 0; i < M; ++i) y[0][i] = y[1][i] = _mm256_setzero_ps();
  for (int64_t g = 0; g < format.groups; ++g) {
    const uint8_t* codes = weight.block(panel, g);
    const int64_t unit = tile.unit(g);
    const int8_t* values = x.codes + unit * format.group;
    const uint16_t* stored = weight.scale(panel, g);
    // With fewer bits or three tables both halves do not fit the registers.
    constexpr bool kTogether = M == 1 && K == 4 && Table::kTables < 3;
    __m256i both[2];
    if constexpr (kTogether) {
      SumPanel<K, Back, Joined, Inner>(table, codes, format.group, values, both);
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m256i totals[M];
      if constexpr (kTogether) {
        totals[0] = both[half];
      } else {
        SumGroup<K, Back, Joined, M>(table, codes + 32 * half, format.group, values, half == 0,
                                     totals);
      }
      const __m256 scales = LoadScales(stored + 8 * half);
      for (int i = 0; i < M; ++i) {
        y[half][i] = Accumulate(y[half][i], totals[i], shift, x.biases[unit + i], scales,
                                x.scales[unit + i]);
      }
    }
  }
  for (int i = 0; i < M; ++i, out += 2 * kLanes) {
    _mm256_storeu_ps(out, y[0][i]);
    _mm256_storeu_ps(out + 8, y[1][i]);
  }
}

template <int K, int Back, Structure::Kind Kind>
struct Stream {
  static void Run(const Weight& weight, const Activations& x, int64_t panel, int panels, Tile tile,
                  float* out) {
    // A dword of four bits has two vectors only, and unsigned dot products join all by themselves.
    constexpr bool kJoins = K < 4 && !kUnsignedDot;
    if (kJoins && weight.structure->narrow) {
      Panels<kJoins ? 4 : 2>(weight, x, panel, panels, tile, out);
    } else {
      Panels<2>(weight, x, panel, panels, tile, out);
    }
  }

 private:
  template <int Joined>
  static void Panels(const Weight& weight, const Activations& x, int64_t panel, int panels,
                     Tile tile, float* out) {
    const StructuredLookup<Kind, false> table(*weight.structure);
    for (int p = 0; p < panels; ++p, out += kLanes) {
      const bool inner = K == 4 && panel + p + 1 < weight.format.panels;
      switch (inner && tile.rows == 1 ? 0 : tile.rows) {
        case 0: StreamPanel<K, Back, Joined, 1, K == 4>(table, weight, x, panel + p, tile, out); break;
        case 1: StreamPanel<K, Back, Joined, 1, false>(table, weight, x, panel + p, tile, out); break;
        case 2: StreamPanel<K, Back, Joined, 2, false>(table, weight, x, panel + p, tile, out); break;
        case 3: StreamPanel<K, Back, Joined, 3, false>(table, weight, x, panel + p, tile, out); break;
        default: StreamPanel<K, Back, Joined, 4, false>(table, weight, x, panel + p, tile, out); break;
      }
    }
  }
};

template <int K, int Back, Structure::Kind Kind>
struct DecodeWhole {
  static void Run(const Weight& weight, int64_t panel, int64_t group, uint8_t* out) {
    const StructuredLookup<Kind, true> table(*weight.structure);
    DecodeStructured<K, Back>(table, weight.block(panel, group), weight.format.group,
                              kAhead * kLine, out);
  }
};

// One decoded group of one panel, and what goes with it for a tile of rows of activations.
struct GroupOfTile {
  const uint8_t* entries;
  int group;
  const int8_t* x;
  const int32_t* biases;
  const float* x_scales;
  const __m256* scales;
  int shift;
  float* out;

  // Adds row i's product, whose sums are those of both halves of the panel.
  void Add(int i, const __m256i* sums) const {
    float* y = out + i * 2 * kLanes;
    const int32_t bias = biases[i];
    const float x_scale = x_scales[i];
    const __m256 low = Accumulate(_mm256_loadu_ps(y), sums[0], shift, bias, scales[0], x_scale);
    const __m256 high = Accumulate(_mm256_loadu_ps(y + 8), sums[1], shift, bias, scales[1], x_scale);
    _mm256_storeu_ps(y, low);
    _mm256_storeu_ps(y + 8, high);
  }
};

// Eight weights of a panel: both halves of four, and of the next four.
struct EightEntries {
  __m256i first[2];
  __m256i next[2];

  explicit EightEntries(const uint8_t* w) {
    const auto* from = reinterpret_cast<const __m256i*>(w);
    for (int half = 0; half < 2; ++half) {
      first[half] = _mm256_load_si256(from + half);
      next[half] = _mm256_load_si256(from + 2 + half);
    }
  }
};

// One tile of M rows over one decoded group of one panel.
template <int M>
void MultiplySmall(const GroupOfTile& at) {
  __m256i sums[M][2];
#pragma GCC unroll 4
  for (int i = 0; i < M; ++i) sums[i][0] = sums[i][1] = _mm256_setzero_si256();
  const uint8_t* w = at.entries;
  const int8_t* x = at.x;
  for (int t = 0; t < at.group; t += 8, w += 2 * kLine, x += 8 * M) {
    const EightEntries entries(w);
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) {
      const __m256i a = Broadcast(x + 4 * i);
      const __m256i b = Broadcast(x + 4 * (M + i));
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        if constexpr (kUnsignedDot) {
          sums[i][half] = AddProducts(AddProducts(sums[i][half], entries.first[half], a),
                                      entries.next[half], b);
        } else {
          const __m256i words = _mm256_add_epi16(_mm256_maddubs_epi16(entries.first[half], a),
                                                 _mm256_maddubs_epi16(entries.next[half], b));
          sums[i][half] = AddWords(sums[i][half], words);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < M; ++i) at.Add(i, sums[i]);
}

// The same where 16 bits hold the products of four vectors, so that sums are widened half as often.
// Two rows at a time: their sums, those of 16 bits and the entries fill the registers. What assembly
// has seen is not loaded twice.
void MultiplyCalm(const GroupOfTile& at) {
#pragma GCC unroll 2
  for (int row = 0; row < kTile; row += 2) {
    __m256i sums[2][2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) sums[i][0] = sums[i][1] = _mm256_setzero_si256();
    const uint8_t* w = at.entries;
    const int8_t* x = at.x + 4 * row;
    for (int t = 0; t < at.group; t += 16) {
      __m256i words[2][2];
#pragma GCC unroll 2
      for (int part = 0; part < 2; ++part, w += 2 * kLine, x += 8 * kTile) {
        EightEntries entries(w);
        asm("" : "+x"(entries.first[0]), "+x"(entries.first[1]), "+x"(entries.next[0]),
                 "+x"(entries.next[1]));
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          const __m256i a = Broadcast(x + 4 * i);
          const __m256i b = Broadcast(x + 4 * (kTile + i));
#pragma GCC unroll 2
          for (int half = 0; half < 2; ++half) {
            const __m256i products = _mm256_maddubs_epi16(entries.first[half], a);
            words[i][half] = part == 0 ? products : _mm256_add_epi16(words[i][half], products);
          }
#pragma GCC unroll 2
          for (int half = 0; half < 2; ++half) {
            words[i][half] = _mm256_add_epi16(words[i][half],
                                              _mm256_maddubs_epi16(entries.next[half], b));
          }
          asm volatile("" : "+x"(words[i][0]), "+x"(words[i][1]));
        }
      }
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        sums[i][0] = AddWords(sums[i][0], words[i][0]);
        sums[i][1] = AddWords(sums[i][1], words[i][1]);
      }
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) at.Add(row + i, sums[i]);
  }
}

// Isa::calm: codes of one sign are summed up, as entries have none. Said of whole tiles only.
bool Calm(const int8_t* placed, int count, int group) {
  if (count != kTile) return false;
  const __m256i zero = _mm256_setzero_si256();
  const __m256i ones = _mm256_set1_epi8(1);
  __m256i largest = zero;
  for (int t = 0; t < group; t += 16, placed += 16 * kTile) {
    const auto* from = reinterpret_cast<const __m256i*>(placed);
    const __m256i x[2] = {_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)};
    __m256i above = zero;
    __m256i below = zero;
    for (const __m256i codes : x) {
      const __m256i plus = _mm256_max_epi8(codes, zero);
      const __m256i minus = _mm256_max_epi8(_mm256_sub_epi8(zero, codes), zero);
      above = _mm256_add_epi16(above, _mm256_maddubs_epi16(plus, ones));
      below = _mm256_add_epi16(below, _mm256_maddubs_epi16(minus, ones));
    }
    const __m256i sums = _mm256_add_epi16(_mm256_permute2x128_si256(above, below, 0x20),
                                          _mm256_permute2x128_si256(above, below, 0x31));
    largest = _mm256_max_epi16(largest, sums);
  }
  const __m256i most = _mm256_set1_epi16(std::numeric_limits<int16_t>::max() / kMaxEntry);
  return _mm256_movemask_epi8(_mm256_cmpgt_epi16(largest, most)) == 0;
}

// All rows over one group of up to two panels.
__attribute__((noinline)) void MultiplyGroup(const Weight& weight, const Activations& x, int64_t g, int64_t first,
                          int64_t rows, const uint8_t* w, const __m256 (*scales)[2], int panels,
                          float* out) {
  using Fn = void (*)(const GroupOfTile&);
  static constexpr Fn kByRows[kTile] = {MultiplySmall<1>, MultiplySmall<2>, MultiplySmall<3>,
                                        MultiplySmall<4>};
  const int group = weight.format.group;
  for (int64_t m = 0; m < rows; m += kTile) {
    const Tile tile = TileAt(x, first + m);
    const int64_t unit = tile.unit(g);
    Fn multiply = kByRows[tile.rows - 1];
    if (!kUnsignedDot && tile.rows == kTile && (weight.structure->narrow || x.calm[unit])) {
      multiply = MultiplyCalm;
    }
    for (int p = 0; p < panels; ++p) {
      multiply({w + p * kMaxGroup * kLanes, group, x.codes + unit * group, x.biases + unit,
                x.scales + unit, scales[p], weight.structure->shift,
                out + m * 2 * kLanes + p * kLanes});
    }
  }
}

// All rows over up to two panels, group by group.
template <int K, int Back, Structure::Kind Kind>
struct DecodeAndMultiply {
  static void Run(const Weight& weight, const Activations& x, int64_t panel, int panels,
                  int64_t first, int64_t rows, float* out) {
    const StructuredLookup<Kind, false> table(*weight.structure);
    alignas(64) uint8_t w[2 * kMaxGroup * kLanes];
    std::memset(out, 0, static_cast<size_t>(rows) * 2 * kLanes * sizeof(float));
    for (int64_t g = 0; g < weight.format.groups; ++g) {
      const int64_t ahead = PairAhead(weight.format, g);
      __m256 scales[2][2];
      for (int p = 0; p < panels; ++p) {
        DecodeStructured<K, Back>(table, weight.block(panel + p, g), weight.format.group, ahead,
                                  w + p * kMaxGroup * kLanes);
        const uint16_t* stored = weight.scale(panel + p, g);
        scales[p][0] = LoadScales(stored);
        scales[p][1] = LoadScales(stored + 8);
      }
      MultiplyGroup(weight, x, g, first, rows, w, scales, panels, out);
    }
  }
};

// Isa::product_int8 for structured tables.
inline void ProductStructured(const Weight& weight, const Activations& x, int64_t panel, int panels,
                              int64_t first, int64_t rows, float* out) {
  if (rows > kStreamRows) {
    return DispatchStructured<DecodeAndMultiply>(weight, weight, x, panel, panels, first, rows, out);
  }
  const Tile tile = TileAt(x, first);
  DispatchStructured<Stream>(weight, weight, x, panel, panels, tile, out);
}

}  // namespace
}  // namespace onnxcomp::hyper
