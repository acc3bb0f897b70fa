// Products with groups of 128 weights by tables of pairs: which weights, which devices.
#pragma once

#include "gpu/call.h"
#include "hyper/gpu_pairs.h"

namespace onnxcomp::hyper {

// A product as the choice of its kernel sees it.
struct PairTask {
  PairWeight weight;
  int bits;
  gpu::Type type;
  int64_t batch;
};

// Whether tables of pairs serve a weight: not one of other groups, more bits or states, or of tensors
// that are not aligned to 16 bytes.
bool ReadPairWeight(const GpuWeight& weight, PairWeight& pairs);

// The task of a product, where they serve it: not for float32 activations.
bool ReadPairTask(const GpuWeight& weight, gpu::Type type, int64_t batch, PairTask& task);

// One to eight rows in one launch; see gpu_few_rows.h.
bool ServesFewRows(const PairTask& task, const gpu::Device& device);
void MultiplyFewRows(const PairTask& task, const void* x, void* y, const gpu::Device& device,
                     cudaStream_t stream);

// Any number of rows, on Hopper: see gpu_some_rows.h and gpu_many_rows.h. Scratch memory is aligned to
// 256 bytes. Where gpu::kWithHopper is false, the two functions do not exist.
inline bool ServesHopper(const gpu::Device& device) {
  constexpr int64_t kShared = 227 * 1024;
  return device.hopper && device.shared >= kShared;
}
int64_t HopperScratch(const PairTask& task, const gpu::Device& device);
void MultiplyHopper(const PairTask& task, const void* x, void* y, const gpu::Device& device,
                    const gpu::Scratch& scratch, cudaStream_t stream);

// The whole weight; see gpu_decode.h. False, and nothing done, where the device has no form for it.
bool DecodeByPairs(const PairWeight& weight, int bits, void* out, gpu::Type type,
                   const gpu::Device& device, cudaStream_t stream);

}  // namespace onnxcomp::hyper
