// Whole weights decoded by tables of pairs: which form of hyper/gpu_decode.h a weight and a device get.

#include "hyper/gpu_decode.h"
#include "hyper/pairs.h"

namespace onnxcomp::hyper {
namespace {

constexpr PairForm kHalves = PairForm::kHalves;

// Table and stages: the deepest ring that a device has room for.
using Four = DecodePairs<PairTable<kHalves, 4, 7, 3>, 4>;
using FourShort = DecodePairs<PairTable<kHalves, 4, 7, 3>, 2>;
using Three = DecodePairs<PairTable<kHalves, 3, 7, 4>, 3>;
using ThreeShort = DecodePairs<PairTable<kHalves, 3, 7, 4>, 2>;
using Two = DecodePairs<PairTable<kHalves, 2, 8, 4>, 3>;
using One = DecodePairs<PairTable<kHalves, 1, 8, 4>, 3>;

// Calls body(kernel) with the first form that fits the device; false where none does.
template <class Kernel, class... Others, class Body>
bool WithForm(const gpu::Device& device, const Body& body) {
  if (Kernel::kSharedBytes <= device.shared) {
    body(Kernel{});
    return true;
  }
  if constexpr (sizeof...(Others) > 0) return WithForm<Others...>(device, body);
  return false;
}

template <class Body>
bool WithKernel(int bits, const gpu::Device& device, const Body& body) {
  switch (bits) {
    case 1: return WithForm<One>(device, body);
    case 2: return WithForm<Two>(device, body);
    case 3: return WithForm<Three, ThreeShort>(device, body);
    default: return WithForm<Four, FourShort>(device, body);
  }
}

}  // namespace

bool DecodeByPairs(const PairWeight& weight, int bits, void* out, gpu::Type type,
                   const gpu::Device& device, cudaStream_t stream) {
  if (device.compiled < 80) return false;
  return WithKernel(bits, device, [&](auto kernel) {
    const int64_t per_vector = type == gpu::Type::kFloat32 ? 4 : 8;
    kernel.weight = weight;
    kernel.type = type;
    kernel.out = out;
    kernel.aligned =
        reinterpret_cast<uintptr_t>(out) % 16 == 0 && weight.length % per_vector == 0;
    const int64_t units = weight.panels * weight.groups;
    kernel.blocks = static_cast<int>(
        std::min<int64_t>(device.processors, gpu::DivideUp(units, kernel.kWarpCount)));
    gpu::Launch(stream, {kernel.blocks, 1, 1}, kernel.kSharedBytes, kernel);
  });
}

}  // namespace onnxcomp::hyper
