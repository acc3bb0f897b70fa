// HashMatMul, HashGather and HashDecode on NVIDIA GPUs, as plain C functions.
//
// Any C++ compiler compiles this file, too, for an emulation on CPUs (gpu/simt.h).

#include "gpu/call.h"
#include "gpu/onnxcomp_cuda.h"
#include "hash/gpu_one_row.h"
#include "hash/gpu_rows.h"
#include "hash/gpu_source.h"

namespace onnxcomp::hash {
namespace {

using gpu::Require;
using Given = OnnxcompHashWeight;

constexpr int32_t kFloats = 1;
constexpr int32_t kBytes = 3;
constexpr int32_t kHalves = 10;
constexpr int64_t kMost = int64_t{1} << 31;

void Check(const Given& given) {
  Require(given.rows >= 1 && given.length >= 1, "rows and length must be at least 1");
  Require(given.slots >= 1 && given.slots < kMost, "slots must be 1 .. 2^31 - 1");
  const int32_t chunk = given.chunk;
  Require(chunk >= 4 && chunk <= kGpuTile && (chunk & (chunk - 1)) == 0,
          "chunk must be a power of two from 4 to 256");
  const int32_t type = given.memory_type;
  Require(type == kFloats || type == kBytes || type == kHalves,
          "memory_type must be 1 (float32), 3 (int8) or 10 (float16)");
  Require(given.memory != nullptr, "memory is null");
  for (int i = 0; i < 6; ++i) {
    const bool inside = given.map[i] >= (i == 1 ? 1 : 0) && given.map[i] < (i == 5 ? 2 : kMost);
    Require(inside, "map[" + std::to_string(i) + "] is " + std::to_string(given.map[i]));
  }
  const int64_t tiles = gpu::DivideUp(given.rows, 16);
  Require(tiles <= kMost / gpu::DivideUp(given.length, 16), "more than 2^31 tiles");
}

GpuWeight Read(const Given& given) {
  Check(given);
  GpuWeight weight{};
  weight.rows = given.rows;
  weight.length = given.length;
  weight.panels = gpu::DivideUp(given.rows, 16);
  weight.blocks = gpu::DivideUp(given.length, 16);
  weight.slots = given.slots;
  weight.chunk = given.chunk;
  weight.memory = given.memory;
  weight.codes = static_cast<const uint8_t*>(given.codes);
  weight.scale = given.scale;
  weight.base = given.map[0];
  weight.run = given.map[1];
  weight.stride = given.map[2];
  weight.rotate = given.map[3];
  weight.sign = given.map[4];
  weight.is_signed = given.map[5] != 0;
  return weight;
}

// Calls body(Memory) with the type of the weight's memory.
template <class Body>
void WithMemory(const Given& given, const Body& body) {
  if (given.memory_type == kHalves) return body(Halves{});
  if (given.memory_type == kBytes) return body(Bytes{});
  body(Floats{});
}

// Calls body(Source) where tensor cores serve the weight's memory.
template <class Memory, class Body>
void WithSource(const GpuWeight& weight, Memory, const Body& body) {
  const bool whole = weight.chunk == kGpuTile && weight.codes == nullptr;
  if (whole) return body(Source<Memory, true>(weight));
  body(Source<Memory, false>(weight));
}

template <class Source>
gpu::Task TaskFor(const Source& source, gpu::Type type) {
  const GpuWeight& weight = source.weight;
  gpu::Task task{};
  task.cut = {weight.length, source.units, 128, false, gpu::Placement{0}};
  task.rows = weight.rows;
  task.panels = source.panels;
  task.units = source.units;
  task.type = type;
  return task;
}

void MultiplyPlain(const GpuWeight& weight, const void* x, void* y, int64_t batch, gpu::Type type,
                   cudaStream_t stream) {
  Require(batch >= 0, "batch is negative");
  const int64_t size = type == gpu::Type::kFloat32 ? 4 : 2;
  constexpr int64_t kMostRows = 65535 * PlainProduct::kBatch;  // of one grid
  for (int64_t first = 0; first < batch; first += kMostRows) {
    const int64_t rows = std::min(kMostRows, batch - first);
    char* out = static_cast<char*>(y) + first * weight.rows * size;
    const PlainProduct kernel{weight, static_cast<const char*>(x) + first * weight.length * size,
                              {type, out, rows, weight.rows, weight.scale}};
    gpu::Launch(stream, {weight.panels, gpu::DivideUp(rows, PlainProduct::kBatch), 1},
                PlainProduct::kSharedBytes, kernel);
  }
}

bool Aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// The kernel for one row of x, where one serves: tiles that are slots, in a memory whose lanes can
// be read as vectors.
bool ServesOneRow(const GpuWeight& weight, int64_t batch) {
  return batch == 1 && weight.chunk == kGpuTile && weight.codes == nullptr &&
         Aligned(weight.memory) && weight.panels * weight.blocks < kMost &&
         weight.slots < kMost / 2 && gpu::CurrentDevice().compiled >= 80;
}

OneRowHalves OneRowKernel(const GpuWeight& weight, gpu::Type type, Halves) {
  OneRowHalves kernel{};
  kernel.weight = weight;
  kernel.y = {type, nullptr, 1, weight.rows, weight.scale};
  return kernel;
}

// As many panels to a block as leave a block for each multiprocessor.
OneRowBytes OneRowKernel(const GpuWeight& weight, gpu::Type type, Bytes) {
  OneRowBytes kernel{};
  kernel.weight = weight;
  kernel.y = {type, nullptr, 1, weight.rows, weight.scale};
  kernel.panels = 1;
  const int64_t wanted = gpu::DivideUp(weight.panels, gpu::CurrentDevice().processors);
  while (kernel.panels < wanted && kernel.panels < OneRowBytes::kWarpCount) kernel.panels *= 2;
  return kernel;
}

int64_t BlocksOf(const OneRowHalves& kernel) { return kernel.weight.panels; }
int64_t BlocksOf(const OneRowBytes& kernel) {
  return gpu::DivideUp(kernel.weight.panels, kernel.panels);
}

// Calls body(kernel) where one serves; int8 keeps 16 bits of x, which float32 wants more of.
template <class Memory, class Body>
bool WithOneRow(const GpuWeight& weight, int64_t batch, gpu::Type type, Memory memory,
                const Body& body) {
  constexpr bool kBytesOf = std::is_same_v<Memory, Bytes>;
  if (!ServesOneRow(weight, batch) || (kBytesOf && type == gpu::Type::kFloat32)) return false;
  const auto kernel = OneRowKernel(weight, type, memory);
  if (kernel.SharedBytes() > gpu::CurrentDevice().shared) return false;
  body(kernel);
  return true;
}

template <class Memory>
bool MultiplyOneRow(const GpuWeight& weight, const void* x, void* y, int64_t batch, gpu::Type type,
                    Memory memory, cudaStream_t stream) {
  return WithOneRow(weight, batch, type, memory, [&](auto kernel) {
    kernel.x = x;
    kernel.aligned = Aligned(x) && weight.length % 8 == 0;
    kernel.y.data = y;
    gpu::Launch(stream, {BlocksOf(kernel), 1, 1}, kernel.SharedBytes(), kernel, /*early=*/true);
  });
}

void MultiplyWeight(const Given& given, const void* x, void* y, int64_t batch, gpu::Type type,
                    const gpu::Scratch& scratch, cudaStream_t stream) {
  const GpuWeight weight = Read(given);
  WithMemory(given, [&](auto memory) {
    if constexpr (std::is_same_v<decltype(memory), Floats>) {
      MultiplyPlain(weight, x, y, batch, type, stream);
    } else {
      if (MultiplyOneRow(weight, x, y, batch, type, memory, stream)) return;
      WithSource(weight, memory, [&](const auto& source) {
        const gpu::Task task = TaskFor(source, type);
        gpu::Multiply(task, source, x, y, batch, weight.scale, scratch, stream);
      });
    }
  });
}

int64_t ScratchOf(const Given& given, int64_t batch, gpu::Type type) {
  const GpuWeight weight = Read(given);
  int64_t bytes = 0;
  WithMemory(given, [&](auto memory) {
    if constexpr (!std::is_same_v<decltype(memory), Floats>) {
      if (WithOneRow(weight, batch, type, memory, [](const auto&) {})) return;
      WithSource(weight, memory, [&](const auto& source) {
        bytes = gpu::ScratchFor(TaskFor(source, type), batch, gpu::SizeOf(source));
      });
    }
  });
  return bytes;
}

void GatherWeight(const Given& given, const void* indices, int32_t index_bytes, int64_t count,
                  float* y, cudaStream_t stream) {
  const GpuWeight weight = Read(given);
  Require(index_bytes == 4 || index_bytes == 8, "index_bytes must be 4 or 8");
  const gpu::Grid grid{count * gpu::DivideUp(weight.length, gpu::kThreads), 1, 1};
  WithMemory(given, [&](auto memory) {
    using Memory = decltype(memory);
    if (index_bytes == 4) {
      const auto* list = static_cast<const int32_t*>(indices);
      gpu::Launch(stream, grid, 0, GatherRows<Memory, int32_t>{weight, list, count, y});
    } else {
      const auto* list = static_cast<const int64_t*>(indices);
      gpu::Launch(stream, grid, 0, GatherRows<Memory, int64_t>{weight, list, count, y});
    }
  });
}

void DecodeWeight(const Given& given, void* w, gpu::Type type, cudaStream_t stream) {
  const GpuWeight weight = Read(given);
  WithMemory(given, [&](auto memory) {
    using Kernel = DecodeAll<decltype(memory)>;
    const int64_t spans = gpu::DivideUp(weight.length, Kernel::kColumns);
    gpu::Launch(stream, {weight.panels * spans, 1, 1}, Kernel::kSharedBytes,
                Kernel{weight, type, w});
  });
}

}  // namespace
}  // namespace onnxcomp::hash

namespace gpu = onnxcomp::gpu;
namespace hash = onnxcomp::hash;

extern "C" int onnxcomp_cuda_hash_scratch(const OnnxcompHashWeight* weight, int64_t batch,
                                          int32_t type, size_t* bytes) {
  return gpu::Report([&] {
    *bytes = static_cast<size_t>(hash::ScratchOf(*weight, batch, gpu::ReadType(type)));
  });
}

extern "C" int onnxcomp_cuda_hash_matmul(const OnnxcompHashWeight* weight, const void* x, void* y,
                                         int64_t batch, int32_t type, void* scratch, size_t bytes,
                                         void* stream) {
  return gpu::Report([&] {
    hash::MultiplyWeight(*weight, x, y, batch, gpu::ReadType(type),
                         {static_cast<char*>(scratch), static_cast<int64_t>(bytes)},
                         static_cast<cudaStream_t>(stream));
  });
}

extern "C" int onnxcomp_cuda_hash_gather(const OnnxcompHashWeight* weight, const void* indices,
                                         int32_t index_bytes, int64_t count, float* y,
                                         void* stream) {
  return gpu::Report([&] {
    hash::GatherWeight(*weight, indices, index_bytes, count, y, static_cast<cudaStream_t>(stream));
  });
}

extern "C" int onnxcomp_cuda_hash_decode(const OnnxcompHashWeight* weight, void* w, int32_t type,
                                         void* stream) {
  return gpu::Report([&] {
    hash::DecodeWeight(*weight, w, gpu::ReadType(type), static_cast<cudaStream_t>(stream));
  });
}
