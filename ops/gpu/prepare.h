// Activations made ready for a product on tensor cores.
//
// Each group of a row is rotated (codec hyper) or not (codec hash) in float32, and brought to 2^14
// .. 2^15 by a power of two, its factor. What is left is float16: one part, within 2^-11; or two
// parts whose sum is within 2^-22, as two columns of the product.
#pragma once

#include "gpu/simt.h"

namespace onnxcomp::gpu {

constexpr int kMaxGroup = 256;
constexpr int kPerVector = 8;  // halves of a vector: what a thread takes at a time

// Which place the weights' kernel gives to weight t of a group. Four neighbouring threads share a
// row: a `quarter` each, 8 weights at a time, `step` by `step`. Rotated groups give `run` weights
// in order to each quarter; tiles of 16 columns give 4 of each of two tiles.
struct Placement {
  int run;  // 8 or 32; 0 for tiles

  struct Place {
    int step, quarter, slot;
  };

  ONNXCOMP_DEVICE Place At(int t) const {
    if (run == 0) return {t / 32, t % 16 / 4, t % 32 / 16 * 4 + t % 4};
    return {t / run / 4 * (run / kPerVector) + t % run / kPerVector, t / run % 4, t % kPerVector};
  }
};

// Columns of SmallProduct: there is room for all of them, so that kernels know where each one lies.
constexpr int kFewColumns = 8;

// The columns of a product: M rows of activations in `parts` parts each, and their factors.
struct Columns {
  const Vector* values;  // ((group * steps + step) * room + column) * 4 + quarter
  const float* factors;  // (groups, room)
  int64_t count;         // M * parts
  int64_t room;          // count, or kFewColumns if that is more
  int parts;
};

// sign_t of ops/hyper/spec.md: a set bit of either word is -1.
ONNXCOMP_DEVICE bool Negative(int t) {
  constexpr uint32_t kBent = 0x7888u;  // entries 3, 7, 11, 12, 13, 14
  return (((kBent >> (t / 16)) ^ (kBent >> (t % 16))) & 1u) != 0;
}

// A group in a warp: thread l holds weights l, 32 + l, 64 + l, ...
template <class T>
struct Share {
  T value[kMaxGroup / kWarp];
};

template <class T>
ONNXCOMP_DEVICE void ExchangeShares(const Warp& warp, int mask, PerThread<Share<T>>& shares) {
#if ONNXCOMP_ON_GPU
  (void)warp;
  ONNXCOMP_UNROLL
  for (int i = 0; i < kMaxGroup / kWarp; ++i) {
    T& value = shares[0].value[i];
    value = __shfl_xor_sync(0xffffffffu, value, mask);
  }
#else
  warp.Exchange(shares, mask);  // at once, which is faster here
#endif
}

// The strides of 32 and more, inside one thread; `count` values of eight are in use.
template <class T>
ONNXCOMP_DEVICE void RotateAcross(int count, T* values) {
  ONNXCOMP_UNROLL
  for (int stride = 1; stride < kMaxGroup / kWarp; stride *= 2) {
    if (stride >= count) break;
    ONNXCOMP_UNROLL
    for (int i = 0; i < kMaxGroup / kWarp; ++i) {
      if ((i & stride) != 0) continue;
      const T a = values[i];
      const T b = values[i | stride];
      values[i] = a + b;
      values[i | stride] = a - b;
    }
  }
}

// H applied to groups spread over a warp, strides 1, 2, 4, ... in this order.
template <class T>
ONNXCOMP_DEVICE void Rotate(const Warp& warp, int group, PerThread<Share<T>>& shares) {
  for (int mask = 1; mask < kWarp; mask *= 2) {
    PerThread<Share<T>> others;
    warp.EachLane([&](int thread) { others[thread] = shares[thread]; });
    ExchangeShares(warp, mask, others);
    warp.EachLane([&](int thread) {
      const bool high = (thread & mask) != 0;
      ONNXCOMP_UNROLL
      for (int i = 0; i < kMaxGroup / kWarp; ++i) {
        T& mine = shares[thread].value[i];
        const T other = others[thread].value[i];
        mine = high ? other - mine : mine + other;
      }
    });
  }
  warp.EachLane([&](int thread) { RotateAcross(group / kWarp, shares[thread].value); });
}

// One warp for each group of each row of x.
struct Prepare {
  static constexpr int kBlocks = 4;

  Type type;
  const void* x;  // (batch, length)
  int64_t batch, length, groups;
  int group;
  bool rotated;
  Placement placement;
  int parts;
  int64_t room;
  uint16_t* values;  // as in Columns
  float* factors;

  ONNXCOMP_DEVICE void operator()(Block& block) const {
    block.EachWarp([&](const Warp& warp) {
      const int64_t piece = block.x * kWarps + warp.index;
      if (piece < batch * groups) Run(warp, piece / groups, piece % groups);
    });
  }

  ONNXCOMP_DEVICE void Run(const Warp& warp, int64_t row, int64_t g) const {
    PerThread<Share<float>> shares;
    warp.EachLane([&](int thread) { Load(row, g, thread % kWarp, shares[thread]); });
    if (rotated) Rotate(warp, group, shares);
    // Bits of magnitudes are in the order of the magnitudes, those of NaN above all.
    PerThread<uint32_t> most;
    warp.EachLane([&](int thread) {
      most[thread] = 0;
      ONNXCOMP_UNROLL
      for (int i = 0; i < kMaxGroup / kWarp; ++i) {
        const uint32_t bits = BitsOfFloat(shares[thread].value[i]) & 0x7fffffffu;
        if (i * kWarp < group && bits > most[thread]) most[thread] = bits;
      }
    });
    for (int mask = 1; mask < kWarp; mask *= 2) {
      PerThread<uint32_t> others;
      warp.EachLane([&](int thread) { others[thread] = most[thread]; });
      warp.Exchange(others, mask);
      warp.EachLane([&](int thread) {
        if (others[thread] > most[thread]) most[thread] = others[thread];
      });
    }
    warp.EachLane([&](int thread) {
      Write(row, g, thread % kWarp, most[thread], shares[thread]);
    });
  }

  ONNXCOMP_DEVICE void Load(int64_t row, int64_t g, int lane, Share<float>& share) const {
    ONNXCOMP_UNROLL
    for (int i = 0; i < kMaxGroup / kWarp; ++i) {
      const int t = i * kWarp + lane;
      const int64_t column = g * group + t;
      float value = 0.0f;
      if (t < group && column < length) value = LoadElement(type, x, row * length + column);
      share.value[i] = rotated && Negative(t % kMaxGroup) ? -value : value;
    }
  }

  // `most`: bits of the greatest magnitude of the group.
  ONNXCOMP_DEVICE void Write(int64_t row, int64_t g, int lane, uint32_t most,
                             const Share<float>& share) const {
    const int64_t column = row * parts;
    const bool finite = most < 0x7f800000u;
    const uint32_t exponent = most >> 23 < 27u ? 27u : most >> 23;  // 2^-100 at least
    const float factor = FloatOfBits(finite ? (exponent - 14u) << 23 : 0x7fc00000u);
    const float inverse = FloatOfBits((268u - exponent) << 23);
    if (lane < parts) factors[g * room + column + lane] = factor;
    ONNXCOMP_UNROLL
    for (int i = 0; i < kMaxGroup / kWarp; ++i) {
      const int t = i * kWarp + lane;
      if (t >= group) break;
      const Placement::Place place = placement.At(t);
      const int64_t vector = (g * (group / kWarp) + place.step) * room + column;
      uint16_t* out = values + (vector * 4 + place.quarter) * kPerVector + place.slot;
      const float value = finite ? share.value[i] * inverse : 0.0f;
      const uint16_t high = HalfOfFloat(value);
      out[0] = high;
      if (parts == 2) out[4 * kPerVector] = HalfOfFloat(value - FloatOfHalf(high));
    }
  }
};

}  // namespace onnxcomp::gpu
