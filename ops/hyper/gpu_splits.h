// Blocks of Hopper that share the groups of a product, and how their sums come together.
#pragma once

#include "gpu/product.h"
#include "gpu/wgmma.h"
#include "hyper/gpu_pairs.h"

namespace onnxcomp::hyper {

// A product whose activations PrepareGroup has written.
struct PreparedProduct {
  PairWeight weight;
  const char* values;    // of x
  const float* factors;  // of its rows
  gpu::Output y;
  char* partial;  // sums of each split; where there is one, nothing
  int* counters;  // of each tile, zero
  int splits;
};

// Adds the sums of all splits of a tile, in their order, in the block that is done last; false in
// the others. `sums` are those of a thread, `place` its number among `threads`.
template <int kSums, class Sync>
ONNXCOMP_THREAD bool AddSplits(const PreparedProduct& product, int tile, int tiles, int split,
                               int place, int threads, int* last, const Sync& sync,
                               float (&sums)[kSums]) {
  if (product.splits == 1) return true;
  auto* partial = reinterpret_cast<Vector*>(product.partial);
  const auto at = [&](int of, int j) {
    return partial + ((static_cast<int64_t>(of) * tiles + tile) * (kSums / 4) + j) * threads + place;
  };
  ONNXCOMP_UNROLL
  for (int j = 0; j < kSums / 4; ++j) {
    const float* four = sums + 4 * j;
    gpu::StoreForOthers(at(split, j), {{gpu::BitsOfFloat(four[0]), gpu::BitsOfFloat(four[1]),
                                        gpu::BitsOfFloat(four[2]), gpu::BitsOfFloat(four[3])}});
  }
  gpu::Fence();
  sync();
  if (place == 0) *last = gpu::Increment(product.counters + tile) == product.splits - 1 ? 1 : 0;
  sync();
  if (*last == 0) return false;
  gpu::Fence();
  ONNXCOMP_UNROLL
  for (int j = 0; j < kSums; ++j) sums[j] = 0.0f;
  for (int of = 0; of < product.splits; ++of) {
    ONNXCOMP_UNROLL
    for (int j = 0; j < kSums / 4; ++j) {
      const Vector four = gpu::LoadFresh(at(of, j));
      ONNXCOMP_UNROLL
      for (int i = 0; i < 4; ++i) sums[4 * j + i] += gpu::FloatOfBits(four.word[i]);
    }
  }
  return true;
}

// Groups first .. last - 1 of a split.
struct SplitRange {
  int first, count;

  ONNXCOMP_DEVICE SplitRange(int groups, int64_t split, int splits)
      : first(static_cast<int>(groups * split / splits)),
        count(static_cast<int>(groups * (split + 1) / splits) - first) {}
};

// Stores a thread's sums of a warpgroup's product: columns of x from `column` on, `row` the first of
// the lane's two rows of the weight.
template <int kSums>
ONNXCOMP_THREAD void StoreSums(const PreparedProduct& product, int64_t column, int64_t row,
                               const float (&sums)[kSums]) {
  const gpu::Output& y = product.y;
  const auto store = [&](auto convert) {
    ONNXCOMP_UNROLL
    for (int j = 0; j < kSums; j += 4) {
      ONNXCOMP_UNROLL
      for (int e = 0; e < 2; ++e) {
        const int64_t m = column + j / 4 * 8 + e;
        if (m >= y.batch) return;
        const float factor = product.factors[m];
        uint16_t* out = static_cast<uint16_t*>(y.data) + m * y.rows + row;
        if (row < y.rows) out[0] = convert(sums[j + e] * factor);
        if (row + 8 < y.rows) out[8] = convert(sums[j + 2 + e] * factor);
      }
    }
  };
  if (y.type == gpu::Type::kBfloat16) {
    store([](float value) { return gpu::BrainOfFloat(value); });
  } else {
    store([](float value) { return gpu::HalfOfFloat(value); });
  }
}

}  // namespace onnxcomp::hyper
