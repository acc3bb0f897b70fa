// Products with more than a few rows of activations on Hopper: which form of hyper/gpu_some_rows.h and
// hyper/gpu_many_rows.h a weight and a number of rows get.
//
// Compiled for sm_90a only, where a library is for it at all (gpu::kWithHopper).

#include "gpu/prepare_group.h"
#include "hyper/gpu_many_rows.h"
#include "hyper/gpu_some_rows.h"
#include "hyper/pairs.h"

namespace onnxcomp::hyper {
namespace {

constexpr PairForm kHalves = PairForm::kHalves;
constexpr PairForm kSingles = PairForm::kSingles;

constexpr int kSomeRows = 64;   // the most of SomeRows
constexpr int kNarrow = 128;    // columns of a tile of ManyRows
constexpr int kWide = 256;      // where so wide ones are enough for most multiprocessors
constexpr int kLeastGroups = 4;  // of a split

// The table of a product, with the copies that leave room for stages of kColumns columns.
template <int K, int L, int kColumns>
constexpr auto TableFor() {
  if constexpr (kColumns == kWide && L + K > 9) {
    return PairTable<kSingles, K, L, 5>{};
  } else {
    return PairTable<kHalves, K, L, K == 4 ? 4 : 5>{};
  }
}

template <int K, int L, int kColumns>
constexpr auto KernelFor() {
  using Table = decltype(TableFor<K, L, kColumns>());
  constexpr bool kLarge = Table::kBytes > 64 * 1024;
  if constexpr (kColumns > kSomeRows) {
    return ManyRows<Table, kColumns, 4, (kLarge && K == 4) ? 2 : 3>{};
  } else {
    constexpr int kStages = kColumns == kSomeRows && kLarge ? 3 : 4;
    return SomeRows<Table, kColumns, kStages, (K == 4 && kColumns > 8) ? 2 : 3>{};
  }
}

// What a product needs besides its tensors: offsets in the scratch memory, in bytes.
struct HopperPlan {
  int columns;  // rows of x in a block
  int64_t row_tiles, column_tiles;
  int splits;
  int64_t factors, counters, partial, bytes;
};

// Rows of the weight in a block.
int64_t RowsOf(int columns) { return columns > kSomeRows ? 128 : 256; }

int ColumnsFor(const PairTask& task, const gpu::Device& device) {
  const int64_t batch = task.batch;
  if (batch > kSomeRows) {
    const int64_t wide =
        gpu::DivideUp(task.weight.rows, RowsOf(kWide)) * gpu::DivideUp(batch, kWide);
    return batch > kNarrow && 4 * wide >= 3 * int64_t{device.processors} ? kWide : kNarrow;
  }
  return batch > 32 ? 64 : batch > 16 ? 32 : batch > 8 ? 16 : 8;
}

int64_t Align(int64_t bytes) { return gpu::DivideUp(bytes, 256) * 256; }

HopperPlan PlanOf(const PairTask& task, const gpu::Device& device) {
  const int columns = ColumnsFor(task, device);
  const int64_t rows = RowsOf(columns);
  HopperPlan plan{};
  plan.columns = columns;
  plan.row_tiles = gpu::DivideUp(task.weight.rows, rows);
  plan.column_tiles = gpu::DivideUp(task.batch, columns);
  const int64_t tiles = plan.row_tiles * plan.column_tiles;
  const int64_t most = std::max<int64_t>(1, task.weight.groups / kLeastGroups);
  plan.splits = static_cast<int>(std::clamp<int64_t>(device.processors / tiles, 1, most));
  const int64_t values = plan.column_tiles * columns * task.weight.groups * 256;
  plan.factors = Align(values);
  plan.counters = plan.factors + Align(task.batch * 4);
  plan.partial = plan.counters + Align(tiles * 4);
  plan.bytes = plan.partial + (plan.splits == 1 ? 0 : plan.splits * tiles * rows * columns * 4);
  return plan;
}

template <int K, int L, int kColumns>
void LaunchAll(const PairTask& task, const HopperPlan& plan, const void* x, void* y, char* scratch,
               cudaStream_t stream) {
  const PairWeight& weight = task.weight;
  auto* factors = reinterpret_cast<float*>(scratch + plan.factors);
  auto* counters = reinterpret_cast<int*>(scratch + plan.counters);
  const auto tiles = static_cast<int>(plan.row_tiles * plan.column_tiles);
  const bool aligned = reinterpret_cast<uintptr_t>(x) % 16 == 0 && weight.length % 8 == 0;
  const gpu::PrepareGroup<kColumns> prepare{task.type,     x,       task.batch, weight.length,
                                            weight.groups, aligned, scratch,    factors,
                                            counters,      tiles};
  gpu::Launch(stream, {plan.column_tiles * kColumns, 1, 1}, prepare.kSharedBytes, prepare,
              /*early=*/true);
  auto kernel = KernelFor<K, L, kColumns>();
  kernel.product = {weight, scratch, factors, {task.type, y, task.batch, weight.rows, 1.0f},
                    scratch + plan.partial, counters, plan.splits};
  gpu::Grid grid{plan.row_tiles, plan.splits, 1};
  if constexpr (kColumns > kSomeRows) {
    kernel.row_tiles = static_cast<int>(plan.row_tiles);
    grid.x = tiles;
  }
  gpu::Launch(stream, grid, kernel.kSharedBytes, kernel, /*early=*/true);
}

template <int K, int L>
void LaunchFor(const PairTask& task, const HopperPlan& plan, const void* x, void* y, char* scratch,
               cudaStream_t stream) {
  switch (plan.columns) {
    case 8: return LaunchAll<K, L, 8>(task, plan, x, y, scratch, stream);
    case 16: return LaunchAll<K, L, 16>(task, plan, x, y, scratch, stream);
    case 32: return LaunchAll<K, L, 32>(task, plan, x, y, scratch, stream);
    case 64: return LaunchAll<K, L, 64>(task, plan, x, y, scratch, stream);
    case kNarrow: return LaunchAll<K, L, kNarrow>(task, plan, x, y, scratch, stream);
    default: return LaunchAll<K, L, kWide>(task, plan, x, y, scratch, stream);
  }
}

// The part of a product that begins at a row of x.
PairTask Part(PairTask task, int64_t first) {
  task.batch = std::min(gpu::kBatchBlock, task.batch - first);
  return task;
}

}  // namespace

int64_t HopperScratch(const PairTask& task, const gpu::Device& device) {
  int64_t most = 0;
  for (int64_t rows : {std::min(task.batch, gpu::kBatchBlock), task.batch % gpu::kBatchBlock}) {
    PairTask part = task;
    part.batch = rows;
    if (rows > 0) most = std::max(most, PlanOf(part, device).bytes);
  }
  return most;
}

void MultiplyHopper(const PairTask& task, const void* x, void* y, const gpu::Device& device,
                    const gpu::Scratch& scratch, cudaStream_t stream) {
  const int64_t needed = HopperScratch(task, device);
  gpu::Require(scratch.bytes >= needed, "scratch has " + std::to_string(scratch.bytes) +
                                            " bytes, must have " + std::to_string(needed));
  for (int64_t first = 0; first < task.batch; first += gpu::kBatchBlock) {
    const PairTask part = Part(task, first);
    const HopperPlan plan = PlanOf(part, device);
    const auto* in = static_cast<const char*>(x) + first * task.weight.length * 2;
    auto* out = static_cast<char*>(y) + first * task.weight.rows * 2;
    switch (task.bits) {
      case 1: LaunchFor<1, 8>(part, plan, in, out, scratch.data, stream); break;
      case 2:
        if (task.weight.states <= 7) LaunchFor<2, 7>(part, plan, in, out, scratch.data, stream);
        else LaunchFor<2, 8>(part, plan, in, out, scratch.data, stream);
        break;
      case 3: LaunchFor<3, 7>(part, plan, in, out, scratch.data, stream); break;
      default: LaunchFor<4, 7>(part, plan, in, out, scratch.data, stream);
    }
  }
}

}  // namespace onnxcomp::hyper
