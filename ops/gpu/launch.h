// Starts kernels: on a stream of a GPU, or in the emulation, at once.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "gpu/simt.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#else
using cudaStream_t = void*;
#endif

namespace onnxcomp::gpu {

struct Grid {
  int64_t x, y, z;
};

// Whether this library has machine code for sm_90a.
#if defined(ONNXCOMP_CUDA_HOPPER) || !defined(__CUDACC__)
constexpr bool kWithHopper = true;
#else
constexpr bool kWithHopper = false;
#endif

// What a device offers, as far as the choice of a kernel depends on it.
struct Device {
  int processors;  // multiprocessors
  int64_t shared;  // bytes of shared memory that a block may have
  int capability;  // of the device, 90 for 9.0
  int compiled;    // of the code that runs on it: less where it was compiled from older PTX
  bool hopper;     // that code may use what only Hopper has (sm_90a)
};

// Threads of a block of a kernel.
template <class K>
constexpr auto ThreadsOf(int) -> decltype(K::kBlockThreads) {
  return K::kBlockThreads;
}
template <class K>
constexpr int ThreadsOf(...) {
  return kThreads;
}

// A call of the CUDA runtime that failed, or a shape that no grid holds.
class GpuError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

inline void CheckGrid(const Grid& grid) {
  if (grid.x > 0x7fffffff || grid.y > 0xffff || grid.z > 0xffff) {
    throw GpuError("a grid of (" + std::to_string(grid.x) + ", " + std::to_string(grid.y) + ", " +
                   std::to_string(grid.z) + ") blocks is too large");
  }
}

#if defined(__CUDACC__)

inline void CheckCuda(cudaError_t error) {
  if (error != cudaSuccess) throw GpuError(cudaGetErrorString(error));
}

template <class K>
__global__ void __launch_bounds__(ThreadsOf<K>(0), K::kBlocks)
    Enter(const __grid_constant__ K kernel) {
  extern __shared__ __align__(1024) char shared[];
  Block block{blockIdx.x, blockIdx.y, blockIdx.z, shared};
  kernel(block);
}

// Of the current device. It stands in call.cu: a kernel that two object files with code for different
// architectures had in common would be taken from either.
Device CurrentDevice();

// Nothing here allocates or waits: a stream that is being captured into a graph takes it. With
// `early`, blocks begin while those of the kernel before end, as soon as that kernel calls
// StartNextGrid(); then this one must call AwaitPreviousGrid() before it touches what others write
// or read. Code of older generations has no such call and is never started early.
template <class K>
void Launch(cudaStream_t stream, const Grid& grid, int64_t shared, const K& kernel,
            bool early = false) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  CheckGrid(grid);
  if (shared > 48 * 1024) {
    CheckCuda(cudaFuncSetAttribute(Enter<K>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(shared)));
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
                        static_cast<unsigned>(grid.z));
  launch.blockDim = dim3(ThreadsOf<K>(0));
  launch.dynamicSmemBytes = static_cast<size_t>(shared);
  launch.stream = stream;
  launch.attrs = &attribute;
  launch.numAttrs = early && CurrentDevice().compiled >= 90 ? 1 : 0;
  CheckCuda(cudaLaunchKernelEx(&launch, Enter<K>, kernel));
}

inline void CopyToHost(const void* from, void* to, size_t bytes) {
  CheckCuda(cudaMemcpy(to, from, bytes, cudaMemcpyDefault));
}

#else

// Few processors, so that small shapes take every way through the kernels; of the generation and
// with as much shared memory as a test wants.
inline Device CurrentDevice() {
  const char* shared = std::getenv("ONNXCOMP_EMULATED_SHARED");
  const char* wanted = std::getenv("ONNXCOMP_EMULATED_CAPABILITY");
  const int capability = wanted == nullptr ? 80 : std::atoi(wanted);
  const int64_t usual = (capability == 90 ? 227 : 163) * int64_t{1024};
  return {4, shared == nullptr ? usual : std::atoll(shared), capability, capability,
          capability == 90};
}

template <class K>
void Launch(cudaStream_t, const Grid& grid, int64_t shared, const K& kernel, bool = false) {
  CheckGrid(grid);
  if (shared > CurrentDevice().shared) throw GpuError("too much shared memory for this device");
  emulator::Note(__PRETTY_FUNCTION__);
  for (int64_t z = 0; z < grid.z; ++z) {
    for (int64_t y = 0; y < grid.y; ++y) {
      for (int64_t x = 0; x < grid.x; ++x) {
        emulator::RunBlock(ThreadsOf<K>(0), shared, [&](char* memory) {
          Block block{x, y, z, memory};
          kernel(block);
        });
      }
    }
  }
}

inline void CopyToHost(const void* from, void* to, size_t bytes) { std::memcpy(to, from, bytes); }

#endif

}  // namespace onnxcomp::gpu
