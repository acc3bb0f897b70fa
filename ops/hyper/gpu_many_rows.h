// y = x W^T for more than 64 rows of activations, on Hopper.
//
// A block has 128 rows of the weight and kColumns rows of x. Two warpgroups of 64 rows decode and
// multiply; of a third one, which gives most of its registers to them, one thread keeps the ring of
// activations full. A stage is half a group, 64 terms. Scales go into the weights as float16, so that
// sums of all groups stay in the tensor cores' registers; a power of two for each row of the weight
// keeps them in float16's range.
#pragma once

#include "gpu/launch.h"
#include "gpu/wgmma.h"
#include "hyper/gpu_ring.h"
#include "hyper/gpu_splits.h"

namespace onnxcomp::hyper {

template <class TableOf, int kColumnsOf, int kStagesOf, int kCodeStagesOf>
struct ManyRows {
  using Table = TableOf;
  static constexpr int K = Table::kBits;
  static constexpr int kColumns = kColumnsOf;
  static constexpr int kStages = kStagesOf;
  static constexpr int kConsumers = 8;  // warps that multiply
  static constexpr int kConsuming = kConsumers * gpu::kWarp;
  static constexpr int kBlockThreads = kConsuming + gpu::kWarpgroup;
  static constexpr int kBlocks = 1;
  static constexpr int kSums = kColumns / 2;
  static constexpr int kConsumerBarrier = 1;
  // Registers of a thread: the compiler's 168 for each of 384 threads, shared out anew.
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = 232;
  using Ring = CodeRing<K, 1, kCodeStagesOf>;
  using Words = typename Ring::Words;

  static constexpr int kStageBytes = kColumns * 128;
  static constexpr int kStagesAt = (Table::kBytes + 1023) / 1024 * 1024;
  static constexpr int kRingsAt = kStagesAt + kStages * kStageBytes;
  static constexpr int kBarriersAt = (kRingsAt + kConsumers * Ring::kBytes + 15) / 16 * 16;
  static constexpr int kStagedAt = kBarriersAt + kStages * 16;
  static constexpr int kLastAt = kStagedAt + Table::kStaged;
  static constexpr int kSharedBytes = kLastAt + 16;

  PreparedProduct product;
  int row_tiles;  // of 128 rows

  // block.x counts row tiles, then tiles of columns.
  ONNXCOMP_THREAD void operator()(gpu::Block& block) const {
    const int warp = gpu::ThreadIndex() / gpu::kWarp;
    const PairWeight& weight = product.weight;
    const SplitRange range(weight.groups, block.y, product.splits);
    const auto row_tile = static_cast<int>(block.x) % row_tiles;
    const auto column_tile = static_cast<int>(block.x) / row_tiles;
    auto* full = reinterpret_cast<gpu::CopyBarrier*>(block.shared + kBarriersAt);
    auto* empty = full + kStages;
    if (gpu::ThreadIndex() == 0) {
      for (int i = 0; i < kStages; ++i) {
        full[i].Start(1);
        empty[i].Start(kConsumers);
      }
      gpu::FenceBarriers();
    }
    auto* staged = reinterpret_cast<int8_t*>(block.shared + kStagedAt);
    Table::Stage(weight, staged, gpu::ThreadIndex(), kBlockThreads);
    block.Sync();
    Table::Fill(weight, staged, block.shared, gpu::ThreadIndex(), kBlockThreads);
    block.Sync();
    const int64_t panel = int64_t{row_tile} * kConsumers + warp;
    const int64_t real = panel < weight.panels ? panel : weight.panels - 1;
    const Powers powers(weight.scales + (real * weight.groups + range.first) * 32, range.count);
    gpu::AwaitPreviousGrid();
    if (warp >= kConsumers) {
      gpu::GiveRegisters<kProducerRegisters>();
      if (gpu::ThreadIndex() == kConsuming) {
        const int64_t first = int64_t{column_tile} * weight.groups + range.first;
        Produce(product.values + first * 2 * kStageBytes, 2 * range.count,
                block.shared + kStagesAt, full, empty);
      }
    } else {
      gpu::TakeRegisters<kConsumerRegisters>();
      Consume(block, warp, range, panel, column_tile, powers, full, empty);
    }
  }

 private:
  // Powers of two for the lane's two rows of a panel, which bring the greatest scale to 2^7 .. 2^8,
  // so that scales times 127 are float16; and their inverses.
  struct Powers {
    float up[2], down[2];

    ONNXCOMP_THREAD Powers(const char* scales, int groups) {
      const int lane = gpu::ThreadIndex() % gpu::kWarp;
      const auto* row = reinterpret_cast<const uint16_t*>(scales) + lane % gpu::kPanel;
      uint32_t most = 0;
      for (int g = lane / gpu::kPanel; g < groups; g += 2) {
        const uint32_t bits = row[g * gpu::kPanel] & 0x7fffu;
        most = bits > most ? bits : most;
      }
      const uint32_t other = gpu::ShuffleXor(most, gpu::kPanel);
      most = other > most ? other : most;
      ONNXCOMP_UNROLL
      for (int half = 0; half < 2; ++half) {
        const uint32_t bits = gpu::Shuffle(most, lane / 4 + 8 * half);
        const uint32_t exponent =
            gpu::BitsOfFloat(gpu::FloatOfHalf(static_cast<uint16_t>(bits))) >> 23;
        const uint32_t least = exponent < 103u ? 103u : exponent;  // float16 ends at 2^-24
        up[half] = gpu::FloatOfBits((261u - least) << 23);
        down[half] = gpu::FloatOfBits((least - 7u) << 23);
      }
    }
  };

  static ONNXCOMP_THREAD void Produce(const char* values, int stages, char* shared,
                                      gpu::CopyBarrier* full, gpu::CopyBarrier* empty) {
    uint32_t parity = 1;
    int stage = 0;
    for (int i = 0; i < stages; ++i) {
      empty[stage].Await(parity);
      full[stage].Copy(shared + stage * kStageBytes, values, kStageBytes);
      values += kStageBytes;
      if (++stage == kStages) {
        stage = 0;
        parity ^= 1;
      }
    }
  }

  // What a warp of consumers has of the stages.
  struct State {
    char* shared;
    uint32_t copy;
    gpu::CopyBarrier* full;
    gpu::CopyBarrier* empty;
    int stage = 0;
    int running = -1;  // the stage whose products may still run
    uint32_t parity = 0;

    ONNXCOMP_THREAD void Release(int lane) const {
      if (lane == 0 && running >= 0) empty[running].Arrive();
    }
  };

  ONNXCOMP_THREAD void Consume(gpu::Block& block, int warp, const SplitRange& range, int64_t panel,
                               int column_tile, const Powers& powers, gpu::CopyBarrier* full,
                               gpu::CopyBarrier* empty) const {
    const int lane = gpu::ThreadIndex() % gpu::kWarp;
    const PairWeight& weight = product.weight;
    const int64_t real = panel < weight.panels ? panel : weight.panels - 1;
    const Ring ring(block.shared + kRingsAt + warp * Ring::kBytes, lane, 0);
    const char* codes = weight.codes + (real * weight.groups + range.first) * Ring::kPanelBytes;
    const char* scales = weight.scales + (real * weight.groups + range.first) * 32;
    int left = range.count;
    const auto copy = [&](uint32_t stage) {
      if (left > 0) {
        ring.Copy(stage, codes, scales, true, lane, 0);
        codes += Ring::kPanelBytes;
        scales += 32;
        --left;
      }
      gpu::CloseCopies();
    };
    ONNXCOMP_UNROLL
    for (int i = 0; i < kCodeStagesOf - 1; ++i) copy(static_cast<uint32_t>(i * Ring::kUnitBytes));
    State state{block.shared, Table::Copy(lane), full, empty};
    gpu::Pin(state.copy);
    float sums[kSums] = {};
    uint32_t a[2][8];
    uint32_t stage = 0;
    uint32_t next = (kCodeStagesOf - 1) * Ring::kUnitBytes;
    for (int g = 0; g < range.count; ++g) {
      gpu::AwaitCopies<kCodeStagesOf - 2>();
      gpu::SyncWarp();
      copy(next);
      next += Ring::kUnitBytes;
      if (next == Ring::kBytes) next = 0;
      Words words;
      ring.Read(stage, words);
      Add(state, lane, words, powers, a, sums);
      gpu::SyncWarp();
      stage += Ring::kUnitBytes;
      if (stage == Ring::kBytes) stage = 0;
    }
    gpu::AwaitGroup<0>();
    state.Release(lane);
    ONNXCOMP_UNROLL
    for (int j = 0; j < kSums; ++j) sums[j] *= powers.down[j / 2 % 2];
    const bool last = AddSplits(
        product, static_cast<int>(block.x), row_tiles * Tiles(), static_cast<int>(block.y),
        gpu::ThreadIndex(), kConsuming, reinterpret_cast<int*>(block.shared + kLastAt),
        [] { gpu::SyncNamed(kConsumerBarrier, kConsuming); }, sums);
    if (!last) return;
    StoreSums(product, int64_t{column_tile} * kColumns + lane % 4 * 2,
              panel * gpu::kPanel + lane / 4, sums);
  }

  ONNXCOMP_DEVICE int Tiles() const {
    return static_cast<int>(gpu::DivideUp(product.y.batch, kColumns));
  }

  // One group, in four batches of two steps; while one is decoded, the one before runs.
  ONNXCOMP_THREAD void Add(State& state, int lane, const Words& words, const Powers& powers,
                           uint32_t (&a)[2][8], float (&sums)[kSums]) const {
    uint32_t scale[2];
    ONNXCOMP_UNROLL
    for (int half = 0; half < 2; ++half) {
      const auto bits = static_cast<uint16_t>(words.scale[0][half]);
      const float value = gpu::FloatOfHalf(bits) * powers.up[half];
      scale[half] = gpu::PackHalves(value, value);
    }
    ONNXCOMP_UNROLL
    for (int batch = 0; batch < 4; ++batch) {
      uint32_t* set = a[batch & 1];
      gpu::AwaitGroup<1>();  // the batch before the last is done: its registers are free
      if (batch % 2 == 1) state.Release(lane);
      ONNXCOMP_UNROLL
      for (int i = 0; i < 8; ++i) {
        const int pair = 2 * (2 * batch + i / 4) + i % 4 / 2;
        const uint32_t weights = Table::Pair(state.shared, state.copy, words.word[0][i % 2], pair);
        set[i] = gpu::MultiplyHalves(weights, scale[i % 2]);
      }
      if (batch % 2 == 0) state.full[state.stage].Await(state.parity);
      const gpu::GroupMatrix x(state.shared + kStagesAt + state.stage * kStageBytes);
      gpu::FenceGroup();
      ONNXCOMP_UNROLL
      for (int s = 0; s < 2; ++s) {
        gpu::MultiplyGroup<kColumns>(sums, set + 4 * s, x.At((2 * (batch & 1) + s) * 32), true);
      }
      gpu::CloseGroup();
      if (batch % 2 == 0) continue;
      state.running = state.stage;
      if (++state.stage == kStages) {
        state.stage = 0;
        state.parity ^= 1;
      }
    }
  }
};

}  // namespace onnxcomp::hyper
