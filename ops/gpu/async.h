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

// Waits for `threads` threads of the block at barrier `number`, 1 .. 15.
ONNXCOMP_THREAD void SyncNamed(int number, int threads) {
#if defined(__CUDACC__)
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
#else
  emulator::SyncNamed(number, threads);
#endif
}

// Reads what the kernel before this one may have written while this one already ran: past the first
// cache, which does not know of it.
template <class T>
ONNXCOMP_THREAD T LoadFresh(const T* global) {
#if defined(__CUDACC__)
  if constexpr (sizeof(T) == 16) {
    const uint4 v = __ldcg(reinterpret_cast<const uint4*>(global));
    T result;
    memcpy(&result, &v, sizeof v);
    return result;
  } else {
    return __ldcg(global);
  }
#else
  return *global;
#endif
}

// Waits until the kernel before this one on the stream is done, if it let this one begin early.
ONNXCOMP_THREAD void AwaitPreviousGrid() {
#if ONNXCOMP_ON_GPU && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel on the stream begin where there is room; it waits for what it needs.
ONNXCOMP_THREAD void StartNextGrid() {
#if ONNXCOMP_ON_GPU && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// A barrier in shared memory that counts arrivals and bytes of copies; from compute capability 9.0
// on. Its phases end in turn with parity 0, 1, 0, ...
struct CopyBarrier {
  uint64_t state;

  // By one thread, before FenceBarriers() and a barrier of the block.
  ONNXCOMP_THREAD void Start(int arrivals) {
#if ONNXCOMP_ON_GPU && __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(SharedAddress(this)),
                 "r"(arrivals));
#elif ONNXCOMP_IN_EMULATOR
    emulator::InitBarrier(this, arrivals);
#else
    (void)arrivals;
#endif
  }

  ONNXCOMP_THREAD void Arrive() {
#if ONNXCOMP_ON_GPU && __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(SharedAddress(this)) : "memory");
#elif ONNXCOMP_IN_EMULATOR
    emulator::Arrive(this);
#endif
  }

  // Waits for the end of the phase of this parity; a barrier that is new waits for none of parity 1.
  ONNXCOMP_THREAD void Await(uint32_t parity) {
#if ONNXCOMP_ON_GPU && __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n.reg .pred done;\nAGAIN:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra DONE;\nbra AGAIN;\nDONE:\n}" ::"r"(SharedAddress(this)),
        "r"(parity)
        : "memory");
#elif ONNXCOMP_IN_EMULATOR
    emulator::AwaitPhase(this, parity);
#else
    (void)parity;
#endif
  }

  // Arrives, and starts to copy so many bytes, a multiple of 16, which the phase waits for.
  ONNXCOMP_THREAD void Copy(char* shared, const char* global, uint32_t bytes) {
#if ONNXCOMP_ON_GPU && __CUDA_ARCH__ >= 900
    const uint32_t barrier = SharedAddress(this);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                 "r"(bytes)
                 : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(SharedAddress(shared)),
        "l"(global), "r"(bytes), "r"(barrier)
        : "memory");
#elif ONNXCOMP_IN_EMULATOR
    emulator::ArriveAndExpect(this, bytes);
    emulator::CopyBulk(shared, global, bytes, this);
#else
    (void)shared, (void)global, (void)bytes;
#endif
  }
};

// What one thread started, copies that others start may use.
ONNXCOMP_THREAD void FenceBarriers() {
#if ONNXCOMP_ON_GPU && __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#elif ONNXCOMP_IN_EMULATOR
  emulator::FenceBarriers();
#endif
}

// Stores what other blocks read after this thread's Fence().
ONNXCOMP_THREAD void StoreForOthers(Vector* global, const Vector& value) {
#if defined(__CUDACC__)
  *global = value;
#else
  emulator::StoreForOthers(global, &value, sizeof value);
#endif
}

ONNXCOMP_THREAD void Fence() {
#if defined(__CUDACC__)
  __threadfence();
#else
  emulator::Fence();
#endif
}

// Adds to a counter of all blocks; what it was before.
ONNXCOMP_THREAD int Increment(int* global) {
#if defined(__CUDACC__)
  return atomicAdd(global, 1);
#else
  return (*global)++;
#endif
}

}  // namespace onnxcomp::gpu
