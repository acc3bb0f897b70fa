// What runs while threads go on: copies, barriers in shared memory, and the grid that comes next.
//
// The functions of this file are a GPU's; the emulator has a twin of each.
#pragma once

#include "gpu/simt.h"

// A function that only GPUs run.
#if defined(__CUDACC__)
#define ONNXCOMP_THREAD __device__ __forceinline__
#else
#define ONNXCOMP_THREAD inline
#endif

namespace onnxcomp::gpu {

// The address of shared memory as instructions take it.
ONNXCOMP_DEVICE uint32_t SharedAddress(const void* shared) {
#if ONNXCOMP_ON_GPU
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
#else
  return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(shared));
#endif
}

// Copies 16 bytes or 4 from global to shared memory, later.
template <class T>
ONNXCOMP_DEVICE void CopyLater(T* shared, const T* global) {
  static_assert(sizeof(T) == 16 || sizeof(T) == 4, "a size that the hardware copies");
#if ONNXCOMP_ON_GPU && __CUDA_ARCH__ >= 800
  const uint32_t to = SharedAddress(shared);
  if constexpr (sizeof(T) == 16) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(global)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(global) : "memory");
  }
#elif ONNXCOMP_IN_EMULATOR
  emulator::CopyLater(shared, global, sizeof(T));
#else
  *shared = *global;
#endif
}

// Closes a batch of copies.
ONNXCOMP_DEVICE void CloseCopies() {
#if ONNXCOMP_ON_GPU && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#elif ONNXCOMP_IN_EMULATOR
  emulator::CloseCopies();
#endif
}

// Waits until at most `kOpen` of this thread's batches are still under way.
template <int kOpen>
ONNXCOMP_DEVICE void AwaitCopies() {
#if ONNXCOMP_ON_GPU && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kOpen) : "memory");
#elif ONNXCOMP_IN_EMULATOR
  emulator::AwaitCopies(kOpen);
#endif
}

}  // namespace onnxcomp::gpu
