// y = x W^T for 5 to 64 rows of activations, on Hopper.
//
// A block has 256 rows of the weight, a panel for each of its 16 warps, and all rows of x; blocks
// share the groups of 128 columns (gpu_splits.h). Weights are decoded into the registers that wgmma
// takes as its left matrix, while the products before still run: two sets of registers take turns.
// Activations of one group are a stage in shared memory, filled by bulk copies; codes come by a ring
// for each warp and are in registers one group ahead. Scales are applied to the sums of each group.
#pragma once

#include "gpu/launch.h"
#include "gpu/wgmma.h"
#include "hyper/gpu_ring.h"
#include "hyper/gpu_splits.h"

namespace onnxcomp::hyper {

template <class TableOf, int kColumnsOf, int kStagesOf, int kCodeStagesOf>
struct SomeRows {
  using Table = TableOf;
  static constexpr int K = Table::kBits;
  static constexpr int kColumns = kColumnsOf;
  static constexpr int kStages = kStagesOf;
  static constexpr int kWarpCount = 16;
  static constexpr int kBlockThreads = kWarpCount * gpu::kWarp;
  static constexpr int kBlocks = 1;
  static constexpr int kSums = kColumns / 2;
  // With few columns there are registers to add a group's sums while the next one's come.
  static constexpr bool kTwoSums = kColumns <= 32;
  using Ring = CodeRing<K, 1, kCodeStagesOf>;
  using Words = typename Ring::Words;

  // Shared memory, in bytes from its beginning.
  static constexpr int kStageBytes = kColumns * 256;
  static constexpr int kStagesAt = (Table::kBytes + 1023) / 1024 * 1024;
  static constexpr int kRingsAt = kStagesAt + kStages * kStageBytes;
  static constexpr int kBarriersAt = (kRingsAt + kWarpCount * Ring::kBytes + 15) / 16 * 16;
  static constexpr int kStagedAt = kBarriersAt + kStages * 16;
  static constexpr int kLastAt = kStagedAt + Table::kStaged;
  // More than half of a multiprocessor's: two blocks on one would leave others idle.
  static constexpr int kSharedBytes = kLastAt + 16 > 120000 ? kLastAt + 16 : 120000;

  PreparedProduct product;

  ONNXCOMP_THREAD void operator()(gpu::Block& block) const {
    const int warp = gpu::ThreadIndex() / gpu::kWarp;
    const int lane = gpu::ThreadIndex() % gpu::kWarp;
    const PairWeight& weight = product.weight;
    const SplitRange range(weight.groups, block.y, product.splits);
    const int64_t panel = block.x * kWarpCount + warp;
    const int64_t real = panel < weight.panels ? panel : weight.panels - 1;
    Reader reader(block.shared + kRingsAt + warp * Ring::kBytes, lane,
                  weight.codes + (real * weight.groups + range.first) * Ring::kPanelBytes,
                  weight.scales + (real * weight.groups + range.first) * 32, range.count);
    auto* full = reinterpret_cast<gpu::CopyBarrier*>(block.shared + kBarriersAt);
    auto* empty = full + kStages;
    if (gpu::ThreadIndex() == 0) {
      for (int i = 0; i < kStages; ++i) {
        full[i].Start(1);
        empty[i].Start(kWarpCount);
      }
      gpu::FenceBarriers();
    }
    auto* staged = reinterpret_cast<int8_t*>(block.shared + kStagedAt);
    Table::Stage(weight, staged, gpu::ThreadIndex(), kBlockThreads);
    ONNXCOMP_UNROLL
    for (int i = 0; i < kCodeStagesOf; ++i) reader.Copy(static_cast<uint32_t>(i * Ring::kUnitBytes));
    block.Sync();
    Table::Fill(weight, staged, block.shared, gpu::ThreadIndex(), kBlockThreads);
    block.Sync();
    gpu::AwaitPreviousGrid();
    float sums[kSums] = {};
    State state{block.shared, Table::Copy(lane), full, empty,
                product.values + static_cast<int64_t>(range.first) * kStageBytes, range.count};
    gpu::Pin(state.copy);
    Sum(reader, state, lane, sums);
    // Not earlier: the activations of the next product would be prepared on the few idle
    // multiprocessors.
    gpu::StartNextGrid();
    const auto tile = static_cast<int>(block.x);
    const auto tiles = static_cast<int>(gpu::DivideUp(weight.panels, kWarpCount));
    const bool last = AddSplits(
        product, tile, tiles, static_cast<int>(block.y), gpu::ThreadIndex(), kBlockThreads,
        reinterpret_cast<int*>(block.shared + kLastAt), [&] { block.Sync(); }, sums);
    if (last) StoreSums(product, lane % 4 * 2, panel * gpu::kPanel + lane / 4, sums);
  }

 private:
  // Brings the units of one panel.
  struct Reader {
    Ring ring;
    const char* codes;
    const char* scales;
    int left, lane;

    ONNXCOMP_THREAD Reader(char* at, int lane_in, const char* codes_in, const char* scales_in,
                           int count)
        : ring(at, lane_in, 0), codes(codes_in), scales(scales_in), left(count), lane(lane_in) {}

    ONNXCOMP_THREAD void Copy(uint32_t stage) {
      if (left > 0) {
        ring.Copy(stage, codes, scales, true, lane, 0);
        codes += Ring::kPanelBytes;
        scales += 32;
        --left;
      }
      gpu::CloseCopies();
    }
  };

  struct State {
    char* shared;
    uint32_t copy;
    gpu::CopyBarrier* full;
    gpu::CopyBarrier* empty;
    const char* values;  // of the split's first group
    int groups;
    uint32_t code_stage = 0;
    int stage = 0, before = 0;  // of the group, of the one before
    uint32_t parity = 0;
    int refilled = 0;
    uint32_t refill_parity = 0;
  };

  ONNXCOMP_THREAD void Sum(Reader& reader, State& state, int lane, float (&sums)[kSums]) const {
    if (gpu::ThreadIndex() == 0) {
      for (int i = 0; i < kStages && i < state.groups; ++i) Refill(state, i, i);
    }
    Words even, odd;
    float first[kSums] = {};
    float second[kTwoSums ? kSums : 1] = {};
    uint32_t a[2][8];
    gpu::AwaitCopies<kCodeStagesOf - 1>();
    gpu::SyncWarp();
    reader.ring.Read(0, even);
    gpu::SyncWarp();
    for (int g = 0;;) {
      if constexpr (kTwoSums) {
        Add(reader, state, g, lane, even, odd, first, second, sums, a);
        if (++g >= state.groups) return Last(state, lane, even, first, sums);
        Add(reader, state, g, lane, odd, even, second, first, sums, a);
        if (++g >= state.groups) return Last(state, lane, odd, second, sums);
      } else {
        Add(reader, state, g, lane, even, odd, first, first, sums, a);
        if (++g >= state.groups) return;
        Add(reader, state, g, lane, odd, even, first, first, sums, a);
        if (++g >= state.groups) return;
      }
    }
  }

  static ONNXCOMP_THREAD void Refill(const State& state, int stage, int group) {
    state.full[stage].Copy(state.shared + kStagesAt + stage * kStageBytes,
                           state.values + static_cast<int64_t>(group) * kStageBytes, kStageBytes);
  }

  // One group. Its codes are in `words`; those of the next one go to `next`, once the scales of the
  // group before, which are there, were used.
  template <class Before>
  ONNXCOMP_THREAD void Add(Reader& reader, State& state, int g, int lane, const Words& words,
                           Words& next, float (&unit)[kSums], Before& before, float (&sums)[kSums],
                           uint32_t (&a)[2][8]) const {
    reader.Copy(state.code_stage);
    state.code_stage += Ring::kUnitBytes;
    if (state.code_stage == Ring::kBytes) state.code_stage = 0;
    if (gpu::ThreadIndex() == 0 && g > 1) RefillNext(state, g - 2 + kStages);
    gpu::SyncWarp();
    const gpu::GroupMatrix x(state.shared + kStagesAt + state.stage * kStageBytes);
    ONNXCOMP_UNROLL
    for (int batch = 0; batch < 4; ++batch) {
      uint32_t* set = a[batch & 1];
      gpu::AwaitGroup<1>();
      if (batch == 1) {
        if constexpr (kTwoSums) {
          if (g > 0) Finish(state, state.before, lane, next, before, sums);
        }
        gpu::AwaitCopies<kCodeStagesOf - 1>();
        gpu::SyncWarp();
        reader.ring.Read(state.code_stage, next);
      }
      ONNXCOMP_UNROLL
      for (int i = 0; i < 8; ++i) {
        const int pair = 2 * (2 * batch + i / 4) + i % 4 / 2;
        set[i] = Table::Pair(state.shared, state.copy, words.word[0][i % 2], pair);
      }
      if (batch == 0) state.full[state.stage].Await(state.parity);
      gpu::FenceGroup();
      ONNXCOMP_UNROLL
      for (int s = 0; s < 2; ++s) {
        const int step = 2 * batch + s;
        const int bytes = step / 4 * (kColumns * 128) + step % 4 * 32;
        gpu::MultiplyGroup<kColumns>(unit, set + 4 * s, x.At(bytes), step > 0);
      }
      gpu::CloseGroup();
    }
    if constexpr (!kTwoSums) {
      gpu::AwaitGroup<0>();
      Finish(state, state.stage, lane, words, unit, sums);
    }
    state.before = state.stage;
    if (++state.stage == kStages) {
      state.stage = 0;
      state.parity ^= 1;
    }
    gpu::SyncWarp();
  }

  // By one thread: the stage of the group before the last one, once all warps are done with it.
  static ONNXCOMP_THREAD void RefillNext(State& state, int group) {
    if (group < state.groups) {
      state.empty[state.refilled].Await(state.refill_parity);
      Refill(state, state.refilled, group);
    }
    if (++state.refilled == kStages) {
      state.refilled = 0;
      state.refill_parity ^= 1;
    }
  }

  // Takes the sums of a group whose products are done.
  template <class Unit>
  static ONNXCOMP_THREAD void Finish(State& state, int stage, int lane, const Words& words,
                                     const Unit& unit, float (&sums)[kSums]) {
    if (lane == 0) state.empty[stage].Arrive();
    const float scale[2] = {gpu::FloatOfHalf(static_cast<uint16_t>(words.scale[0][0])),
                            gpu::FloatOfHalf(static_cast<uint16_t>(words.scale[0][1]))};
    ONNXCOMP_UNROLL
    for (int j = 0; j < kSums; ++j) sums[j] += unit[j] * scale[j / 2 % 2];
  }

  template <class Unit>
  static ONNXCOMP_THREAD void Last(State& state, int lane, const Words& words, const Unit& unit,
                                   float (&sums)[kSums]) {
    gpu::AwaitGroup<0>();
    Finish(state, state.before, lane, words, unit, sums);
  }
};

}  // namespace onnxcomp::hyper
