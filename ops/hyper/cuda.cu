// HyperMatMul, HyperGather and HyperDecode on NVIDIA GPUs, as plain C functions.
//
// Any C++ compiler compiles this file, too, for an emulation on CPUs (gpu/simt.h).

#include "gpu/call.h"
#include "gpu/onnxcomp_cuda.h"
#include "hyper/gpu_rows.h"
#include "hyper/gpu_source.h"
#include "hyper/levels.h"
#include "hyper/pairs.h"

namespace onnxcomp::hyper {
namespace {

using gpu::Require;
using Given = OnnxcompHyperWeight;

// Shared memory of a block from which on tables of 64 KB fit beside activations. Turing has 64 KB.
constexpr int64_t kPlenty = 99 * 1024;

void Check(const Given& given) {
  Require(given.rows >= 1 && given.length >= 1, "rows and length must be at least 1");
  const int g = given.group;
  Require(g == 32 || g == 64 || g == 128 || g == 256, "group must be 32, 64, 128 or 256");
  Require(given.bits >= 1 && given.bits <= 6, "bits must be 1 .. 6");
  const int l = given.states;
  Require((l == 6 || l == 7 || l == 8 || l == 10 || l == 12) && l >= given.bits + 2,
          "states must be 6, 7, 8, 10 or 12 and at least bits + 2");
  Require(given.codes != nullptr && given.scales != nullptr && given.table != nullptr,
          "codes, scales or table is null");
}

GpuWeight Read(const Given& given) {
  Check(given);
  GpuWeight weight{};
  weight.rows = given.rows;
  weight.length = given.length;
  weight.panels = gpu::DivideUp(given.rows, gpu::kPanel);
  weight.groups = gpu::DivideUp(given.length, given.group);
  weight.group = given.group;
  weight.dwords = given.group * given.bits / 32;
  weight.states = given.states;
  weight.codes = static_cast<const uint8_t*>(given.codes);
  weight.scales = static_cast<const uint16_t*>(given.scales);
  weight.table = static_cast<const int8_t*>(given.table);
  weight.copy_bits = gpu::CurrentDevice().shared >= kPlenty ? 5 : 4;
  weight.leveled = given.levels != nullptr;
  if (weight.leveled) {
    Require(given.states > 8, "a table of at most 256 states has no levels");
    weight.multiplier = static_cast<uint32_t>(given.levels->multiplier) << 16;
    weight.offset = static_cast<uint32_t>(given.levels->offset) << 16;
    std::memcpy(weight.levels, given.levels->values, sizeof weight.levels);
  }
  return weight;
}

// Calls body(Source) with the fastest source for the weight.
template <int K, class Body>
void WithBits(const GpuWeight& weight, const Body& body) {
  if (weight.group < 128) return body(Source<K, 8, Lookup::kDirect>(weight));
  if constexpr (K <= 2) {
    const int bits = weight.states + K;
    const int most = weight.copy_bits + 4;  // 64 KB, or 16 KB
    if (bits <= most) return body(Source<K, 32, Lookup::kPairs>(weight));
  }
  if constexpr (K <= 4) {
    if (weight.leveled) return body(Source<K, 32, Lookup::kLeveled>(weight));
  }
  if constexpr (K <= 5) {
    if (weight.states <= 7) return body(Source<K, 32, Lookup::kTwice>(weight));
  }
  body(Source<K, 32, Lookup::kDirect>(weight));
}

template <class Body>
void WithSource(const GpuWeight& weight, const Body& body) {
  switch (BitsOf(weight)) {
    case 1: return WithBits<1>(weight, body);
    case 2: return WithBits<2>(weight, body);
    case 3: return WithBits<3>(weight, body);
    case 4: return WithBits<4>(weight, body);
    case 5: return WithBits<5>(weight, body);
    default: return WithBits<6>(weight, body);
  }
}

template <class Source>
gpu::Task TaskFor(const Source& source, gpu::Type type) {
  const GpuWeight& weight = source.weight;
  gpu::Task task{};
  task.cut = {weight.length, weight.groups, weight.group, true, gpu::Placement{Source::kRun}};
  task.rows = weight.rows;
  task.panels = source.panels;
  task.units = source.units;
  task.type = type;
  return task;
}

// On Hopper every row beyond four takes longer to rotate in each block than the other kernels take.
bool PrefersFewRows(const PairTask& task, const gpu::Device& device) {
  constexpr int64_t kFewOnHopper = 4;
  if (task.batch > kFewOnHopper && ServesHopper(device)) return false;
  return ServesFewRows(task, device);
}

// Scratch memory of a product, and the product, by the fastest kernel that serves it.
int64_t ScratchOf(const GpuWeight& weight, int64_t batch, gpu::Type type) {
  PairTask pairs{};
  if (ReadPairTask(weight, type, batch, pairs)) {
    const gpu::Device device = gpu::CurrentDevice();
    if (PrefersFewRows(pairs, device)) return 0;
    if constexpr (gpu::kWithHopper) {
      if (ServesHopper(device)) return HopperScratch(pairs, device);
    }
  }
  int64_t bytes = 0;
  WithSource(weight, [&](const auto& source) {
    bytes = gpu::ScratchFor(TaskFor(source, type), batch, gpu::SizeOf(source));
  });
  return bytes;
}

void Multiply(const GpuWeight& weight, const void* x, void* y, int64_t batch, gpu::Type type,
              const gpu::Scratch& scratch, cudaStream_t stream) {
  PairTask pairs{};
  if (ReadPairTask(weight, type, batch, pairs)) {
    const gpu::Device device = gpu::CurrentDevice();
    if (PrefersFewRows(pairs, device)) return MultiplyFewRows(pairs, x, y, device, stream);
    if constexpr (gpu::kWithHopper) {
      if (ServesHopper(device)) return MultiplyHopper(pairs, x, y, device, scratch, stream);
    }
  }
  WithSource(weight, [&](const auto& source) {
    gpu::Multiply(TaskFor(source, type), source, x, y, batch, 1.0f, scratch, stream);
  });
}

template <int K, int kRun>
void Decode(const GpuWeight& weight, void* out, gpu::Type type, cudaStream_t stream) {
  using Kernel = DecodeAll<K, kRun, Lookup::kDirect>;
  const int64_t most = 4 * int64_t{gpu::CurrentDevice().processors};
  const int64_t pieces = gpu::DivideUp(weight.panels * weight.groups, gpu::kWarps);
  const Kernel kernel{weight, typename Kernel::Codes(weight), type, out, std::min(most, pieces)};
  gpu::Launch(stream, {kernel.blocks, 1, 1}, kernel.SharedBytes(), kernel);
}

void DecodeWeight(const GpuWeight& weight, void* out, gpu::Type type, cudaStream_t stream) {
  PairWeight pairs{};
  if (ReadPairWeight(weight, pairs) &&
      DecodeByPairs(pairs, BitsOf(weight), out, type, gpu::CurrentDevice(), stream)) {
    return;
  }
  const bool small = weight.group < 128;
  switch (BitsOf(weight)) {
    case 1: return (small ? Decode<1, 8> : Decode<1, 32>)(weight, out, type, stream);
    case 2: return (small ? Decode<2, 8> : Decode<2, 32>)(weight, out, type, stream);
    case 3: return (small ? Decode<3, 8> : Decode<3, 32>)(weight, out, type, stream);
    case 4: return (small ? Decode<4, 8> : Decode<4, 32>)(weight, out, type, stream);
    case 5: return (small ? Decode<5, 8> : Decode<5, 32>)(weight, out, type, stream);
    default: return (small ? Decode<6, 8> : Decode<6, 32>)(weight, out, type, stream);
  }
}

template <class Index>
void Gather(const GpuWeight& weight, const void* indices, int64_t count, float* y,
            cudaStream_t stream) {
  const GatherRows<Index> kernel{weight, static_cast<const Index*>(indices), count, y};
  gpu::Launch(stream, {gpu::DivideUp(count * weight.groups, gpu::kWarps), 1, 1}, 0, kernel);
}

}  // namespace
}  // namespace onnxcomp::hyper

using onnxcomp::hyper::GpuWeight;

extern "C" int onnxcomp_cuda_hyper_levels(const void* table, int32_t states,
                                          OnnxcompHyperLevels* levels, int32_t* found) {
  onnxcomp::hyper::Levels search{};
  *found = search.Find(static_cast<const int8_t*>(table), states) ? 1 : 0;
  levels->multiplier = search.multiplier;
  levels->offset = search.offset;
  std::memcpy(levels->values, search.values, sizeof levels->values);
  return 0;
}

extern "C" int onnxcomp_cuda_hyper_scratch(const OnnxcompHyperWeight* weight, int64_t batch,
                                           int32_t type, size_t* bytes) {
  return onnxcomp::gpu::Report([&] {
    const GpuWeight read = onnxcomp::hyper::Read(*weight);
    *bytes = static_cast<size_t>(
        onnxcomp::hyper::ScratchOf(read, batch, onnxcomp::gpu::ReadType(type)));
  });
}

extern "C" int onnxcomp_cuda_hyper_matmul(const OnnxcompHyperWeight* weight, const void* x, void* y,
                                          int64_t batch, int32_t type, void* scratch, size_t bytes,
                                          void* stream) {
  return onnxcomp::gpu::Report([&] {
    const GpuWeight read = onnxcomp::hyper::Read(*weight);
    onnxcomp::hyper::Multiply(read, x, y, batch, onnxcomp::gpu::ReadType(type),
                              {static_cast<char*>(scratch), static_cast<int64_t>(bytes)},
                              static_cast<cudaStream_t>(stream));
  });
}

extern "C" int onnxcomp_cuda_hyper_gather(const OnnxcompHyperWeight* weight, const void* indices,
                                          int32_t index_bytes, int64_t count, float* y,
                                          void* stream) {
  return onnxcomp::gpu::Report([&] {
    const GpuWeight read = onnxcomp::hyper::Read(*weight);
    const auto on = static_cast<cudaStream_t>(stream);
    onnxcomp::gpu::Require(index_bytes == 4 || index_bytes == 8, "index_bytes must be 4 or 8");
    if (index_bytes == 4) {
      onnxcomp::hyper::Gather<int32_t>(read, indices, count, y, on);
    } else {
      onnxcomp::hyper::Gather<int64_t>(read, indices, count, y, on);
    }
  });
}

extern "C" int onnxcomp_cuda_hyper_decode(const OnnxcompHyperWeight* weight, void* w, int32_t type,
                                          void* stream) {
  return onnxcomp::gpu::Report([&] {
    const GpuWeight read = onnxcomp::hyper::Read(*weight);
    const auto on = static_cast<cudaStream_t>(stream);
    const auto to = onnxcomp::gpu::ReadType(type);
    onnxcomp::hyper::DecodeWeight(read, w, to, on);
  });
}
