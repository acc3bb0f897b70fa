#include "gpu/call.h"

#include "gpu/onnxcomp_cuda.h"

#if !defined(ONNXCOMP_CUDA_ARCHITECTURES)
#define ONNXCOMP_CUDA_ARCHITECTURES "emulated"
#endif

namespace onnxcomp::gpu {
namespace {

// Scratch memory begins each of its parts here.
constexpr int64_t kAlignment = 256;

int64_t Align(int64_t bytes) { return DivideUp(bytes, kAlignment) * kAlignment; }

int64_t StageBytes(int tiles, int steps) {
  return 2 * int64_t{8} * tiles * (steps * 4 * int64_t{sizeof(Vector)} + int64_t{sizeof(float)});
}

// The widest block that the columns fill and shared memory holds.
int TilesFor(int64_t columns, const SourceSize& size, const Device& device) {
  if (columns <= 8) return 1;
  if (size.few_forms) return 8;
  if (columns <= 16) return 2;
  if (columns <= 64) return 8;
  return size.table_bytes + StageBytes(16, size.steps) <= device.shared ? 16 : 8;
}

// As many blocks as run at once, as far as each has four units left: one more would begin when the
// others end.
int64_t SplitsFor(const Task& task, int tiles, int64_t columns, const Device& device) {
  if (tiles == 1) return 1;
  const int64_t blocks = DivideUp(task.panels, kWarps) * DivideUp(columns, 8 * int64_t{tiles});
  const int64_t resident = int64_t{device.processors} * BlocksOf(tiles);
  const int64_t wanted = std::max<int64_t>(resident / blocks, 1);
  const int64_t splits = std::clamp<int64_t>(task.units / 4, 1, wanted);
  // No split without units: DivideUp(units, splits) units for each may leave the last ones none.
  return DivideUp(task.units, DivideUp(task.units, splits));
}

// Where a device gets kernels of its own; hyper/pairs.h has the rules for weights.
std::string KernelsOf(const Device& device) {
  std::string text = std::to_string(device.capability / 10) + "." +
                     std::to_string(device.capability % 10) + ": ";
  if (device.compiled < 80) return text + "one weight by each look-up, for all rows";
  text += "few rows and decoding by pairs, more rows ";
  text += device.hopper ? "by wgmma" : "by mma";
  if (device.compiled < device.capability) {
    text += " (compiled from PTX for " + std::to_string(device.compiled / 10) + "." +
            std::to_string(device.compiled % 10) + ")";
  }
  return text;
}

}  // namespace

#if defined(__CUDACC__)
namespace {

struct Probe {
  static constexpr int kBlocks = 1;
  ONNXCOMP_DEVICE void operator()(Block&) const {}
};

Device ReadDevice(int id) {
  int values[4] = {};
  const cudaDeviceAttr wanted[4] = {
      cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin,
      cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor};
  for (int i = 0; i < 4; ++i) CheckCuda(cudaDeviceGetAttribute(values + i, wanted[i], id));
  cudaFuncAttributes code{};
  CheckCuda(cudaFuncGetAttributes(&code, Enter<Probe>));
  const int capability = values[2] * 10 + values[3];
  const bool hopper = kWithHopper && capability == 90 && code.ptxVersion == 90;
  return {values[0], values[1], capability, code.ptxVersion, hopper};
}

}  // namespace

Device CurrentDevice() {
  thread_local int known = -1;
  thread_local Device device{};
  int id = 0;
  CheckCuda(cudaGetDevice(&id));
  if (id != known) device = ReadDevice(id);
  known = id;
  return device;
}
#endif

std::string& LastError() {
  thread_local std::string text;
  return text;
}

Type ReadType(int32_t type) {
  Require(type == 1 || type == 10 || type == 16,
          "element type " + std::to_string(type) +
              " is not 1 (float32), 10 (float16) or 16 (bfloat16)");
  return static_cast<Type>(type);
}

Plan PlanFor(const Task& task, const SourceSize& size, const Device& device) {
  Plan plan{};
  plan.parts = PartsOf(task.type, task.batch);
  const int64_t columns = task.batch * plan.parts;
  plan.tiles = TilesFor(columns, size, device);
  plan.splits = SplitsFor(task, plan.tiles, columns, device);
  const int64_t padded = task.cut.groups * task.cut.group;
  plan.room = std::max<int64_t>(columns, plan.tiles == 1 ? kFewColumns : 0);
  plan.factors = Align(plan.room * padded * 2);
  plan.partial = plan.factors + Align(plan.room * task.cut.groups * 4);
  const int64_t partial = plan.splits == 1 ? 0 : plan.splits * task.batch * task.rows * 4;
  plan.bytes = plan.partial + Align(partial);
  return plan;
}

int64_t ScratchFor(Task task, int64_t batch, const SourceSize& size) {
  const Device device = CurrentDevice();
  int64_t most = 0;
  for (int64_t rows : {std::min(batch, kBatchBlock), batch % kBatchBlock}) {
    task.batch = rows;
    if (rows > 0) most = std::max(most, PlanFor(task, size, device).bytes);
  }
  return most;
}

Columns PrepareColumns(const Task& task, const Plan& plan, const void* x, char* scratch,
                       cudaStream_t stream) {
  auto* values = reinterpret_cast<uint16_t*>(scratch);
  auto* factors = reinterpret_cast<float*>(scratch + plan.factors);
  const Cut& cut = task.cut;
  const Prepare kernel{task.type,   x,             task.batch, cut.length, cut.groups, cut.group,
                       cut.rotated, cut.placement, plan.parts, plan.room,  values,    factors};
  Launch(stream, {DivideUp(task.batch * cut.groups, kWarps), 1, 1}, 0, kernel);
  return {reinterpret_cast<const Vector*>(values), factors, task.batch * plan.parts, plan.room,
          plan.parts};
}

}  // namespace onnxcomp::gpu

extern "C" const char* onnxcomp_cuda_error(void) { return onnxcomp::gpu::LastError().c_str(); }

extern "C" const char* onnxcomp_cuda_architectures(void) { return ONNXCOMP_CUDA_ARCHITECTURES; }

extern "C" int onnxcomp_cuda_kernels(const char** text) {
  return onnxcomp::gpu::Report([&] {
    thread_local std::string kernels;
    kernels = onnxcomp::gpu::KernelsOf(onnxcomp::gpu::CurrentDevice());
    *text = kernels.c_str();
  });
}

extern "C" int onnxcomp_cuda_copy_to_host(const void* from, void* to, size_t bytes) {
  return onnxcomp::gpu::Report([&] { onnxcomp::gpu::CopyToHost(from, to, bytes); });
}
