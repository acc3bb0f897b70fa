// HashDecode, HashGather, and HashMatMul of a float32 memory, without tensor cores.
#pragma once

#include "gpu/launch.h"
#include "gpu/product.h"
#include "hash/gpu_places.h"

namespace onnxcomp::hash {

// The whole weight: a block for 8 tiles of a panel, turned in shared memory.
template <class Memory>
struct DecodeAll {
  static constexpr int kBlocks = 4;
  static constexpr int kColumns = 128;
  static constexpr int kStride = kColumns + 1;  // of a row in shared memory: free of bank conflicts

  GpuWeight weight;
  gpu::Type type;
  void* out;  // (rows, length)

  static constexpr int64_t kSharedBytes = 16 * kStride * 4;

  ONNXCOMP_DEVICE void operator()(gpu::Block& block) const {
    auto* columns = reinterpret_cast<float*>(block.shared);
    const int64_t spans = gpu::DivideUp(weight.length, kColumns);
    const int64_t panel = block.x / spans;
    const int64_t first = block.x % spans * kColumns;
    block.EachThread([&](int thread) { Look(thread, panel, first, columns); });
    block.Sync();
    block.EachThread([&](int thread) {
      const int64_t column = first + thread % kColumns;
      if (column >= weight.length) return;
      for (int row = thread / kColumns; row < 16; row += gpu::kThreads / kColumns) {
        const int64_t line = panel * 16 + row;
        if (line >= weight.rows) return;
        const float value = columns[row * kStride + thread % kColumns] * weight.scale;
        gpu::StoreElement(type, out, line * weight.length + column, value);
      }
    });
  }

 private:
  // Four elements at a time: chunks have at least four.
  ONNXCOMP_DEVICE void Look(int thread, int64_t panel, int64_t first, float* columns) const {
    const auto* memory = static_cast<const typename Memory::Element*>(weight.memory);
    for (int i = thread; i < kColumns * 16 / 4; i += gpu::kThreads) {
      const int64_t block = first / 16 + i / (kGpuTile / 4);
      const int element = i % (kGpuTile / 4) * 4;
      if (block >= weight.blocks) return;
      const Place place =
          PlaceOf(weight, panel * weight.blocks + block, element / weight.chunk);
      const int64_t at = place.slot * weight.chunk + element % weight.chunk;
      float* out = columns + i / (kGpuTile / 4) * 16 + element / 16;
      ONNXCOMP_UNROLL
      for (int j = 0; j < 4; ++j) {
        const float value = Memory::Float(memory[at + j]);
        out[(element % 16 + j) * kStride] = place.minus ? -value : value;
      }
    }
  }
};

// Rows by index: a thread for each element.
template <class Memory, class Index>
struct GatherRows {
  static constexpr int kBlocks = 4;

  GpuWeight weight;
  const Index* indices;
  int64_t count;
  float* out;  // (count, length)

  ONNXCOMP_DEVICE void operator()(gpu::Block& block) const {
    const int64_t spans = gpu::DivideUp(weight.length, gpu::kThreads);
    const int64_t i = block.x / spans;
    const auto index = static_cast<int64_t>(indices[i]);
    const bool inside = index >= -weight.rows && index < weight.rows;
    const int64_t row = index < 0 ? index + weight.rows : index;
    block.EachThread([&](int thread) {
      const int64_t column = block.x % spans * gpu::kThreads + thread;
      if (column >= weight.length) return;
      float value = gpu::FloatOfBits(0x7fc00000u);
      if (inside) {
        const int64_t tile = row / 16 * weight.blocks + column / 16;
        const auto element = static_cast<int>(column % 16 * 16 + row % 16);
        value = WeightAt<Memory>(weight, tile, element) * weight.scale;
      }
      out[i * weight.length + column] = value;
    });
  }
};

// y = x W^T in float32 arithmetic. A block has one panel and up to 8 rows of activations; its warps
// share the tiles. Half a warp takes the even columns of a tile, the other half the odd ones.
struct PlainProduct {
  static constexpr int kBlocks = 3;
  static constexpr int kBatch = 8;
  static constexpr int64_t kSharedBytes = int64_t{gpu::kWarps} * kBatch * gpu::kPanel * 4;

  GpuWeight weight;
  const void* x;  // (batch, length)
  gpu::Output y;

  struct Share {
    float value[kBatch];
  };

  ONNXCOMP_DEVICE void operator()(gpu::Block& block) const {
    auto* partial = reinterpret_cast<float*>(block.shared);
    const int64_t first = block.y * kBatch;
    block.EachWarp([&](const gpu::Warp& warp) { Sum(warp, block.x, first, partial); });
    block.Sync();
    block.EachThread([&](int thread) {
      if (thread >= kBatch * gpu::kPanel) return;
      float sum = 0.0f;
      for (int warp = 0; warp < gpu::kWarps; ++warp) {
        sum += partial[warp * kBatch * gpu::kPanel + thread];
      }
      y.Store(first + thread / gpu::kPanel, block.x * gpu::kPanel + thread % gpu::kPanel, sum);
    });
  }

 private:
  ONNXCOMP_DEVICE void Sum(const gpu::Warp& warp, int64_t panel, int64_t first,
                           float* partial) const {
    gpu::PerThread<Share> sums;
    warp.EachLane([&](int thread) {
      sums[thread] = Share{};
      for (int64_t b = warp.index; b < weight.blocks; b += gpu::kWarps) {
        for (int j = thread % gpu::kWarp / 16; j < 16; j += 2) {
          Add(panel * weight.blocks + b, j * 16 + thread % 16, b * 16 + j, first, sums[thread]);
        }
      }
    });
    ONNXCOMP_UNROLL
    for (int m = 0; m < kBatch; ++m) {
      gpu::PerThread<float> others;
      warp.EachLane([&](int thread) { others[thread] = sums[thread].value[m]; });
      warp.Exchange(others, 16);
      warp.EachLane([&](int thread) {
        if (thread % gpu::kWarp >= 16) return;
        partial[(warp.index * kBatch + m) * gpu::kPanel + thread % gpu::kWarp] =
            sums[thread].value[m] + others[thread];
      });
    }
  }

  // The product of one weight, which is element `element` of its tile, with a column of x.
  ONNXCOMP_DEVICE void Add(int64_t tile, int element, int64_t column, int64_t first,
                           Share& sums) const {
    if (column >= weight.length) return;
    const float value = WeightAt<Floats>(weight, tile, element);
    ONNXCOMP_UNROLL
    for (int m = 0; m < kBatch; ++m) {
      if (first + m >= y.batch) break;
      sums.value[m] +=
          value * gpu::LoadElement(y.type, x, (first + m) * weight.length + column);
    }
  }
};

}  // namespace onnxcomp::hash
