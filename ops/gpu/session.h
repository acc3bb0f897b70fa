// What kernels of CUDAExecutionProvider take from the session: its stream and its memory.
//
// With ONNXCOMP_CUDA_EMULATED everything is the CPU's, and kernels are registered for its provider:
// sessions then run the code around the emulated kernels (tests/ops).
#pragma once

#include "common/attributes.h"
#include "common/tensor.h"
#include "gpu/onnxcomp_cuda.h"

namespace onnxcomp::gpu {

#if defined(ONNXCOMP_CUDA_EMULATED)
constexpr const char* kProviderName = nullptr;
#else
constexpr const char* kProviderName = "CUDAExecutionProvider";
#endif

// Throws what a C function reports.
inline void CheckCall(int failed) {
  if (failed != 0) Fail(onnxcomp_cuda_error());
}

inline void* StreamOf(const Api& api, const OrtKernelContext* context) {
  void* stream = nullptr;
#if !defined(ONNXCOMP_CUDA_EMULATED)
  Check(api, api.KernelContextGetGpuStream(context, &stream));
#else
  (void)api;
  (void)context;
#endif
  return stream;
}

// The provider's own memory, for one node.
class Memory {
 public:
  explicit Memory(const NodeInfo& node) : api_(node.api()), allocator_(node.Allocator()) {}
  ~Memory() { api_.ReleaseAllocator(allocator_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  // Calls body(memory) with so many bytes. They go to later work on the same stream only, so that
  // they may be given back before the GPU is done with them.
  template <class Body>
  void With(const OrtKernelContext* context, size_t bytes, const Body& body) const {
    void* memory = Take(context, bytes);
    try {
      body(memory);
    } catch (...) {
      Free(memory);
      throw;
    }
    Free(memory);
  }

 private:
  void* Take(const OrtKernelContext* context, size_t bytes) const {
    void* memory = nullptr;
    if (bytes == 0) return memory;
#if defined(ONNXCOMP_CUDA_EMULATED)
    (void)context;
    Check(api_, api_.AllocatorAlloc(allocator_, bytes, &memory));
#else
    const OrtMemoryInfo* info = nullptr;
    Check(api_, api_.AllocatorGetInfo(allocator_, &info));
    Check(api_, api_.KernelContextGetScratch(context, info, bytes, &memory));
#endif
    return memory;
  }

  void Free(void* memory) const {
    if (memory == nullptr) return;
    OrtStatus* status = api_.AllocatorFree(allocator_, memory);
    if (status != nullptr) api_.ReleaseStatus(status);  // nothing is left to be done about it
  }

  Api api_;
  OrtAllocator* allocator_;
};

}  // namespace onnxcomp::gpu
