// HyperDecode and HyperGather on a GPU: codes back to weights, with integers as spec.md section 2
// has them.
#pragma once

#include "gpu/launch.h"
#include "gpu/prepare.h"
#include "hyper/gpu_codes.h"

namespace onnxcomp::hyper {

// w_t of spec.md section 2.
ONNXCOMP_DEVICE float Weigh(int t, int h, float scale) {
  return static_cast<float>(gpu::Negative(t) ? -h : h) * scale;
}

// The whole weight. A warp takes one group of one panel; four threads share a row, so that most of
// the transform stays inside a thread. Two weights t and t + kRun / 2 are one 32-bit integer, high
// * 2^16 + low: sums of such integers are the sums of their halves as long as these fit 16 bits,
// and up to the last stride they are below 127 * 128.
template <int K, int kRun, Lookup kLookup>
struct DecodeAll {
  static constexpr int kBlocks = 2;
  static constexpr int kPairs = kRun / 2;
  static constexpr int kMostParts = 2;

  using Codes = Decoder<K, kRun, kLookup>;

  GpuWeight weight;
  Codes decoder;
  gpu::Type type;
  void* out;       // (rows, length)
  int64_t blocks;  // of the grid

  // Pairs of one row's weights that a thread holds, of each part of 4 * kRun weights.
  struct Held {
    uint32_t pair[kMostParts][kPairs];
  };

  int64_t SharedBytes() const { return decoder.table.Bytes(); }

  ONNXCOMP_DEVICE void operator()(gpu::Block& block) const {
    block.EachThread([&](int thread) {
      decoder.table.Fill(thread, block.shared, [&](int entry) {
        return static_cast<uint32_t>(ValueOf<kLookup>(weight, entry));
      });
    });
    block.Sync();
    const int64_t pieces = weight.panels * weight.groups;
    const int64_t stride = blocks * gpu::kWarps;
    block.EachWarp([&](const gpu::Warp& warp) {
      for (int64_t piece = block.x * gpu::kWarps + warp.index; piece < pieces; piece += stride) {
        const int64_t panel = piece / weight.groups;
        for (int half = 0; half < 2; ++half) {
          Run(warp, panel, piece % weight.groups, half, block.shared);
        }
      }
    });
  }

 private:
  ONNXCOMP_DEVICE void Run(const gpu::Warp& warp, int64_t panel, int64_t g, int half,
                           const char* table) const {
    const int parts = weight.group / (4 * kRun);
    gpu::PerThread<Held> held;
    warp.EachLane([&](int thread) {
      Look(panel, g, half, parts, thread % gpu::kWarp, table, held[thread]);
    });
    for (int mask = 1; mask < 4; mask *= 2) {  // strides kRun and 2 kRun: the next threads
      gpu::PerThread<Held> others;
      warp.EachLane([&](int thread) { others[thread] = held[thread]; });
      Exchange(warp, mask, others);
      warp.EachLane([&](int thread) {
        Combine((thread & mask) != 0, others[thread], held[thread]);
      });
    }
    warp.EachLane([&](int thread) {
      if (parts == kMostParts) CombineParts(held[thread]);  // stride 4 kRun
      Write(panel, g, half, parts, thread % gpu::kWarp, held[thread]);
    });
  }

  // Decodes, and transforms over the strides 1 .. kRun / 4.
  ONNXCOMP_DEVICE void Look(int64_t panel, int64_t g, int half, int parts, int lane,
                            const char* table, Held& held) const {
    const int row = lane / 4 + 8 * half;
    ONNXCOMP_UNROLL
    for (int part = 0; part < kMostParts; ++part) {
      uint32_t* pair = held.pair[part];
      ONNXCOMP_UNROLL
      for (int i = 0; i < kPairs; ++i) pair[i] = 0;
      if (part >= parts) continue;
      Strings<K, kRun> strings;
      decoder.Load(weight, panel, g, row, (part * 4 + lane % 4) * kRun, strings.word[0]);
      ONNXCOMP_UNROLL
      for (int i = 0; i < kPairs; ++i) {
        pair[i] = decoder.Look(table, lane, strings.word[0], i) +
                  (decoder.Look(table, lane, strings.word[0], i + kPairs) << 16);
      }
      ONNXCOMP_UNROLL
      for (int stride = 1; stride < kPairs; stride *= 2) {
        ONNXCOMP_UNROLL
        for (int i = 0; i < kPairs; ++i) {
          if ((i & stride) == 0) Butterfly(pair[i], pair[i | stride]);
        }
      }
    }
  }

  static ONNXCOMP_DEVICE void Butterfly(uint32_t& low, uint32_t& high) {
    const uint32_t a = low;
    const uint32_t b = high;
    low = a + b;
    high = a - b;
  }

  static ONNXCOMP_DEVICE void Exchange(const gpu::Warp& warp, int mask,
                                       gpu::PerThread<Held>& held) {
#if ONNXCOMP_ON_GPU
    ONNXCOMP_UNROLL
    for (int part = 0; part < kMostParts; ++part) {
      ONNXCOMP_UNROLL
      for (int i = 0; i < kPairs; ++i) {
        uint32_t& value = held[0].pair[part][i];
        value = __shfl_xor_sync(0xffffffffu, value, mask);
      }
    }
#else
    warp.Exchange(held, mask);
#endif
  }

  static ONNXCOMP_DEVICE void Combine(bool high, const Held& other, Held& mine) {
    ONNXCOMP_UNROLL
    for (int part = 0; part < kMostParts; ++part) {
      ONNXCOMP_UNROLL
      for (int i = 0; i < kPairs; ++i) {
        const uint32_t a = mine.pair[part][i];
        const uint32_t b = other.pair[part][i];
        mine.pair[part][i] = high ? b - a : a + b;
      }
    }
  }

  static ONNXCOMP_DEVICE void CombineParts(Held& held) {
    ONNXCOMP_UNROLL
    for (int i = 0; i < kPairs; ++i) Butterfly(held.pair[0][i], held.pair[1][i]);
  }

  // Splits pairs, transforms over the stride kRun / 2, and writes what lies inside the weight.
  ONNXCOMP_DEVICE void Write(int64_t panel, int64_t g, int half, int parts, int lane,
                             const Held& held) const {
    const int row = lane / 4 + 8 * half;
    const int64_t line = panel * 16 + row;
    if (line >= weight.rows) return;
    const float scale = weight.ScaleOf(panel, g, row);
    ONNXCOMP_UNROLL
    for (int part = 0; part < kMostParts; ++part) {
      if (part >= parts) break;
      float values[kRun];
      const int begin = (part * 4 + lane % 4) * kRun;
      ONNXCOMP_UNROLL
      for (int i = 0; i < kPairs; ++i) {
        const int low = static_cast<int16_t>(held.pair[part][i] & 0xffffu);
        const int high = static_cast<int>(held.pair[part][i] - static_cast<uint32_t>(low)) >> 16;
        values[i] = Weigh(begin + i, low + high, scale);
        values[i + kPairs] = Weigh(begin + i + kPairs, low - high, scale);
      }
      gpu::StoreRun<kRun>(type, out, line * weight.length, g * weight.group + begin, weight.length,
                          values);
    }
  }
};

// Rows by index: a warp for each group of each row.
template <class Index>
struct GatherRows {
  static constexpr int kBlocks = 4;

  GpuWeight weight;
  const Index* indices;
  int64_t count;
  float* out;  // (count, length)

  ONNXCOMP_DEVICE void operator()(gpu::Block& block) const {
    block.EachWarp([&](const gpu::Warp& warp) {
      const int64_t piece = block.x * gpu::kWarps + warp.index;
      if (piece < count * weight.groups) Run(warp, piece / weight.groups, piece % weight.groups);
    });
  }

  ONNXCOMP_DEVICE void Run(const gpu::Warp& warp, int64_t i, int64_t g) const {
    const auto index = static_cast<int64_t>(indices[i]);
    const bool inside = index >= -weight.rows && index < weight.rows;
    const int64_t row = !inside ? 0 : index < 0 ? index + weight.rows : index;
    gpu::PerThread<gpu::Share<int>> shares;
    warp.EachLane([&](int thread) { Look(row, g, thread % gpu::kWarp, shares[thread]); });
    gpu::Rotate(warp, weight.group, shares);
    const float scale = inside ? weight.ScaleOf(row / 16, g, static_cast<int>(row % 16))
                               : gpu::FloatOfBits(0x7fc00000u);
    warp.EachLane([&](int thread) {
      ONNXCOMP_UNROLL
      for (int j = 0; j < gpu::kMaxGroup / gpu::kWarp; ++j) {
        const int t = j * gpu::kWarp + thread % gpu::kWarp;
        const int64_t column = g * weight.group + t;
        if (t >= weight.group || column >= weight.length) break;
        out[i * weight.length + column] = Weigh(t, shares[thread].value[j], scale);
      }
    });
  }

 private:
  ONNXCOMP_DEVICE void Look(int64_t row, int64_t g, int lane, gpu::Share<int>& share) const {
    const int bits = weight.dwords * 32 / weight.group;
    const uint32_t mask = (1u << weight.states) - 1u;
    ONNXCOMP_UNROLL
    for (int i = 0; i < gpu::kMaxGroup / gpu::kWarp; ++i) {
      const int t = i * gpu::kWarp + lane;
      share.value[i] = 0;
      if (t >= weight.group) continue;
      const int position = (t + 1) * bits - weight.states;
      const auto in_panel = static_cast<int>(row % 16);
      share.value[i] = weight.table[weight.BitsAt(row / 16, g, in_panel, position) & mask];
    }
  }
};

}  // namespace onnxcomp::hyper
