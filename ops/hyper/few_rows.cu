// Products with one to eight rows of activations: which form of hyper/gpu_few_rows.h a weight and a
// device get.

#include "hyper/gpu_few_rows.h"
#include "hyper/pairs.h"

namespace onnxcomp::hyper {
namespace {

constexpr PairForm kHalves = PairForm::kHalves;

// Table, warps, panels of a tile, stages, parts: what was fastest on an H200. Forms of one panel
// leave room for longer weights and for more rows of activations; the last form of each number of
// bits is for GPUs with less shared memory.
using Four = FewRows<PairTable<PairForm::kBytes, 4, 7, 5>, 20, 1, 2, 2>;
using FourSingles = FewRows<PairTable<PairForm::kSingles, 4, 7, 5>, 16, 1, 2, 1>;
using Three = FewRows<PairTable<kHalves, 3, 7, 5>, 16, 2, 2, 1>;
using ThreeLong = FewRows<PairTable<kHalves, 3, 7, 5>, 24, 1, 2, 1>;
using ThreeSingles = FewRows<PairTable<PairForm::kSingles, 3, 7, 5>, 16, 1, 2, 1>;
using Two = FewRows<PairTable<kHalves, 2, 7, 5>, 16, 2, 3, 1>;
using TwoLong = FewRows<PairTable<kHalves, 2, 7, 5>, 16, 1, 2, 1>;
using TwoSingles = FewRows<PairTable<PairForm::kSingles, 2, 7, 5>, 16, 1, 2, 1>;
using TwoMore = FewRows<PairTable<kHalves, 2, 8, 5>, 16, 2, 2, 1>;
using TwoMoreSingles = FewRows<PairTable<PairForm::kSingles, 2, 8, 5>, 16, 1, 2, 1>;
using One = FewRows<PairTable<kHalves, 1, 8, 5>, 16, 2, 3, 1>;
using OneLong = FewRows<PairTable<kHalves, 1, 8, 5>, 16, 1, 2, 1>;

// The kernel with as many blocks as run at once or, where the sums of their tiles do not fit shared
// memory beside the rest, a multiple of them; false where even the sums of one tile do not fit.
template <class Kernel>
bool Make(const PairTask& task, const gpu::Device& device, Kernel& kernel) {
  kernel.weight = task.weight;
  kernel.y = {task.type, nullptr, task.batch, task.weight.rows, 1.0f};
  kernel.tiles = static_cast<int>(gpu::DivideUp(task.weight.panels, Kernel::kPanels));
  for (int waves = 1;; ++waves) {
    kernel.blocks = std::min(kernel.tiles, waves * device.processors);
    if (kernel.Place().bytes <= device.shared) return true;
    if (kernel.blocks == kernel.tiles) return false;
  }
}

// Calls body(kernel) with the first form that fits the device; false where none does.
template <class Kernel, class... Others, class Body>
bool WithForm(const PairTask& task, const gpu::Device& device, const Body& body) {
  if (task.weight.states <= Kernel::Table::kStates && task.batch * Kernel::kParts <= 8) {
    Kernel kernel{};
    if (Make(task, device, kernel)) {
      body(kernel);
      return true;
    }
  }
  if constexpr (sizeof...(Others) > 0) return WithForm<Others...>(task, device, body);
  return false;
}

template <class Body>
bool WithKernel(const PairTask& task, const gpu::Device& device, const Body& body) {
  switch (task.bits) {
    case 1: return WithForm<One, OneLong>(task, device, body);
    case 2: return WithForm<Two, TwoLong, TwoSingles, TwoMore, TwoMoreSingles>(task, device, body);
    case 3: return WithForm<Three, ThreeLong, ThreeSingles>(task, device, body);
    default: return WithForm<Four, FourSingles>(task, device, body);
  }
}

bool Aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

bool ReadPairWeight(const GpuWeight& weight, PairWeight& pairs) {
  constexpr int64_t kMostGroups = 1 << 16;  // 8 M columns: offsets stay below 2^31
  constexpr int64_t kMostPanels = 1 << 24;
  const int bits = BitsOf(weight);
  const auto* codes = reinterpret_cast<const char*>(weight.codes);
  const auto* scales = reinterpret_cast<const char*>(weight.scales);
  pairs = {codes,         scales,        weight.table, weight.rows,
           weight.length, weight.panels, static_cast<int>(weight.groups), weight.states};
  return weight.group == kPairGroup && bits <= 4 && weight.states <= (bits <= 2 ? 8 : 7) &&
         weight.groups <= kMostGroups && weight.panels <= kMostPanels && Aligned(codes) &&
         Aligned(scales);
}

bool ReadPairTask(const GpuWeight& weight, gpu::Type type, int64_t batch, PairTask& task) {
  task.bits = BitsOf(weight);
  task.type = type;
  task.batch = batch;
  return ReadPairWeight(weight, task.weight) && type != gpu::Type::kFloat32 && batch >= 1;
}

bool ServesFewRows(const PairTask& task, const gpu::Device& device) {
  if (device.compiled < 80 || task.batch > 8) return false;
  return WithKernel(task, device, [](const auto&) {});
}

void MultiplyFewRows(const PairTask& task, const void* x, void* y, const gpu::Device& device,
                     cudaStream_t stream) {
  WithKernel(task, device, [&](auto kernel) {
    kernel.x = x;
    kernel.aligned = Aligned(x) && task.weight.length % 8 == 0;
    kernel.y.data = y;
    gpu::Launch(stream, {kernel.blocks, 1, 1}, kernel.Place().bytes, kernel, /*early=*/true);
  });
}

}  // namespace onnxcomp::hyper
