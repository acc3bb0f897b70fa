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

// What a device offers, as far as the choice of a kernel depends on it.
struct Device {
  int processors;     // multiprocessors
  int64_t shared;     // bytes of shared memory that a block may have
};

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
__global__ void __launch_bounds__(kThreads, K::kBlocks) Enter(const __grid_constant__ K kernel) {
  extern __shared__ __align__(16) char shared[];
  Block block{blockIdx.x, blockIdx.y, blockIdx.z, shared};
  kernel(block);
}

// Nothing here allocates or waits: a stream that is being captured into a graph takes it.
template <class K>
void Launch(cudaStream_t stream, const Grid& grid, int64_t shared, const K& kernel) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  CheckGrid(grid);
  if (shared > 48 * 1024) {
    CheckCuda(cudaFuncSetAttribute(Enter<K>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(shared)));
  }
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
                    static_cast<unsigned>(grid.z));
  Enter<K><<<blocks, kThreads, static_cast<size_t>(shared), stream>>>(kernel);
  CheckCuda(cudaGetLastError());
}

inline Device CurrentDevice() {
  thread_local int known = -1;
  thread_local Device device{};
  int id = 0;
  CheckCuda(cudaGetDevice(&id));
  if (id == known) return device;
  int processors = 0;
  int shared = 0;
  CheckCuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, id));
  CheckCuda(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, id));
  device = {processors, shared};
  known = id;
  return device;
}

inline void CopyToHost(const void* from, void* to, size_t bytes) {
  CheckCuda(cudaMemcpy(to, from, bytes, cudaMemcpyDefault));
}

#else

// Few processors, so that small shapes take every way through the kernels; as much shared memory as
// a test wants.
inline Device CurrentDevice() {
  const char* shared = std::getenv("ONNXCOMP_EMULATED_SHARED");
  return {4, shared == nullptr ? int64_t{160} * 1024 : std::atoll(shared)};
}

template <class K>
void Launch(cudaStream_t, const Grid& grid, int64_t shared, const K& kernel) {
  CheckGrid(grid);
  if (shared > CurrentDevice().shared) throw GpuError("too much shared memory for this device");
  for (int64_t z = 0; z < grid.z; ++z) {
    for (int64_t y = 0; y < grid.y; ++y) {
      for (int64_t x = 0; x < grid.x; ++x) {
        emulator::RunBlock(kThreads, shared, [&](char* memory) {
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
