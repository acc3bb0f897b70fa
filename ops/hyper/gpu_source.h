// A weight of the codec hyper as a source of gpu/product.h.
#pragma once

#include "gpu/mma.h"
#include "gpu/prepare.h"
#include "hyper/gpu_codes.h"

namespace onnxcomp::hyper {

// K bits for each weight, kRunLength weights of a row at a time: 32 for groups of 128 and 256, else
// 8.
template <int K, int kRunLength, Lookup kLookup>
struct Source {
  static constexpr int kRun = kRunLength;
  static constexpr bool kFewForms = kRun == 8 || (kLookup == Lookup::kDirect && K <= 5);  // rare

  GpuWeight weight;
  Decoder<K, kRun, kLookup> decoder;
  int64_t panels, units;
  int unit_bits;

  explicit Source(const GpuWeight& weight_in)
      : weight(weight_in),
        decoder(weight_in),
        panels(weight_in.panels),
        units(weight_in.groups * (weight_in.group / (4 * kRun))),
        unit_bits(weight_in.group == 8 * kRun ? 1 : 0) {}

  struct Raw {
    Strings<K, kRun> strings;
    float scale[2];
  };

  ONNXCOMP_DEVICE int64_t TableBytes() const { return decoder.table.Bytes(); }

  ONNXCOMP_DEVICE void Fill(int thread, char* table) const {
    decoder.table.Fill(thread, table, [&](int entry) { return Word(entry); });
    if (!decoder.table.twice) return;
    decoder.table.Fill(thread, table + decoder.table.Size(),
                       [&](int entry) { return HalfOf(entry) << 16; });
  }

  ONNXCOMP_DEVICE Raw Load(int64_t panel, int64_t unit, int lane) const {
    const int64_t g = unit >> unit_bits;
    const int part = static_cast<int>(unit) & ((1 << unit_bits) - 1);
    const int begin = (part * 4 + lane % 4) * kRun;
    Raw raw;
    ONNXCOMP_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = lane / 4 + 8 * half;
      decoder.Load(weight, panel, g, row, begin, raw.strings.word[half]);
      raw.scale[half] = weight.ScaleOf(panel, g, row);
    }
    return raw;
  }

  ONNXCOMP_DEVICE void Share(const gpu::Warp&, gpu::PerThread<Raw>&) const {}

  // Weights 8 step .. 8 step + 7 of the thread's two rows.
  ONNXCOMP_DEVICE void Decode(const Raw& raw, int step, int lane, const char* table,
                              gpu::Fragment& a, gpu::Fragment& b) const {
    ONNXCOMP_UNROLL
    for (int half = 0; half < 2; ++half) {
      uint32_t pairs[4];
      ONNXCOMP_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int t = step * gpu::kPerVector + 2 * i;
        pairs[i] = Pair(table, lane, raw.strings.word[half], t);
      }
      a.word[half] = pairs[0];
      a.word[2 + half] = pairs[1];
      b.word[half] = pairs[2];
      b.word[2 + half] = pairs[3];
    }
  }

  ONNXCOMP_DEVICE float Scale(const Raw& raw, int half) const { return raw.scale[half]; }

  ONNXCOMP_DEVICE int Row(int row) const { return row; }

 private:
  // Weights t and t + 1 as float16.
  ONNXCOMP_DEVICE uint32_t Pair(const char* table, int lane, const uint32_t* words, int t) const {
    const uint32_t low = decoder.Look(table, lane, words, t);
    if constexpr (kLookup == Lookup::kPairs) return low;
    if constexpr (kLookup == Lookup::kTwice) {
      return low + decoder.Look(table + decoder.table.Size(), lane, words, t + 1);
    }
    return gpu::PackLow(low, decoder.Look(table, lane, words, t + 1));
  }

  ONNXCOMP_DEVICE uint32_t HalfOf(int entry) const {
    return gpu::HalfOfFloat(static_cast<float>(ValueOf<kLookup>(weight, entry)));
  }

  ONNXCOMP_DEVICE uint32_t Word(int entry) const {
    if (kLookup != Lookup::kPairs) return HalfOf(entry);
    return HalfOf(entry & ((1 << weight.states) - 1)) | HalfOf(entry >> K) << 16;
  }
};

}  // namespace onnxcomp::hyper
