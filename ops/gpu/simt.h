// Blocks, warps and threads, for a GPU and, emulated, for a CPU.
//
// A kernel is a structure whose `operator()(Block&)` is written once. nvcc compiles it for GPUs,
// where every thread runs it. Any C++ compiler compiles it for CPUs, where one thread runs whole
// blocks: `EachThread` and `EachLane` become loops, and what a GPU keeps in the registers of each
// thread becomes an array. So every line of a kernel but the few inside `#if ONNXCOMP_ON_GPU` is
// executed and compared with the definition by tests that need no GPU. What emulation cannot show
// is a missing `Sync`, because its loops run one after the other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "common/device.h"
#include "common/float16.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif
#if defined(__CUDA_ARCH__)
#define ONNXCOMP_ON_GPU 1
#define ONNXCOMP_UNROLL _Pragma("unroll")
#else
#define ONNXCOMP_ON_GPU 0
#define ONNXCOMP_UNROLL
#endif

namespace onnxcomp::gpu {

constexpr int kWarp = 32;            // threads of a warp
constexpr int kWarps = 8;            // warps of a block
constexpr int kThreads = kWarp * kWarps;

// What one load or store moves at most.
struct alignas(16) Vector {
  uint32_t word[4];
};

// A variable of each thread: a register on a GPU, an array in the emulation.
template <class T>
class PerThread {
 public:
#if ONNXCOMP_ON_GPU
  ONNXCOMP_DEVICE T& operator[](int) { return value_; }

 private:
  T value_;
#else
  ONNXCOMP_DEVICE T& operator[](int thread) { return values_[thread]; }

 private:
  T values_[kThreads];
#endif
};

// 32 threads that run together.
struct Warp {
  int index;  // in its block

  // Calls body(thread) for the warp's threads; `thread` counts in the block.
  template <class Body>
  ONNXCOMP_DEVICE void EachLane(const Body& body) const {
#if ONNXCOMP_ON_GPU
    body(static_cast<int>(threadIdx.x));
#else
    for (int lane = 0; lane < kWarp; ++lane) body(index * kWarp + lane);
#endif
  }

  // The value of one of the warp's threads.
  template <class T>
  ONNXCOMP_DEVICE T ValueOf(PerThread<T>& values, int lane) const {
#if ONNXCOMP_ON_GPU
    return __shfl_sync(0xffffffffu, values[0], lane);
#else
    return values[index * kWarp + lane];
#endif
  }

  // Every thread receives the value of the thread whose lane differs in the bits of `mask`.
  template <class T>
  ONNXCOMP_DEVICE void Exchange(PerThread<T>& values, int mask) const {
#if ONNXCOMP_ON_GPU
    values[0] = __shfl_xor_sync(0xffffffffu, values[0], mask);
#else
    T old[kWarp];
    for (int lane = 0; lane < kWarp; ++lane) old[lane] = values[index * kWarp + lane];
    for (int lane = 0; lane < kWarp; ++lane) values[index * kWarp + lane] = old[lane ^ mask];
#endif
  }
};

// One block of kThreads threads.
struct Block {
  int64_t x, y, z;  // its place in the grid
  char* shared;     // memory of the block, aligned to 16 bytes

  template <class Body>
  ONNXCOMP_DEVICE void EachThread(const Body& body) const {
#if ONNXCOMP_ON_GPU
    body(static_cast<int>(threadIdx.x));
#else
    for (int thread = 0; thread < kThreads; ++thread) body(thread);
#endif
  }

  template <class Body>
  ONNXCOMP_DEVICE void EachWarp(const Body& body) const {
#if ONNXCOMP_ON_GPU
    body(Warp{static_cast<int>(threadIdx.x) / kWarp});
#else
    for (int warp = 0; warp < kWarps; ++warp) body(Warp{warp});
#endif
  }

  // What threads wrote to shared memory before is seen by all of them after.
  ONNXCOMP_DEVICE void Sync() const {
#if ONNXCOMP_ON_GPU
    __syncthreads();
#endif
  }
};

ONNXCOMP_DEVICE int64_t DivideUp(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Bits [shift, shift + 32) of the 64 bits high:low; shift is 0 .. 31.
ONNXCOMP_DEVICE uint32_t Funnel(uint32_t low, uint32_t high, int shift) {
#if ONNXCOMP_ON_GPU
  return __funnelshift_r(low, high, shift);
#else
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> shift);
#endif
}

// The low halves of two words: a below b.
ONNXCOMP_DEVICE uint32_t PackLow(uint32_t a, uint32_t b) {
#if ONNXCOMP_ON_GPU
  return __byte_perm(a, b, 0x5410);
#else
  return (a & 0xffffu) | b << 16;
#endif
}

// The high halves of two words: that of a below that of b.
ONNXCOMP_DEVICE uint32_t PackHigh(uint32_t a, uint32_t b) {
#if ONNXCOMP_ON_GPU
  return __byte_perm(a, b, 0x7632);
#else
  return a >> 16 | (b & 0xffff0000u);
#endif
}

ONNXCOMP_DEVICE float FloatOfBits(uint32_t bits) {
#if ONNXCOMP_ON_GPU
  return __uint_as_float(bits);
#else
  return BitsToFloat(bits);
#endif
}

ONNXCOMP_DEVICE uint32_t BitsOfFloat(float value) {
#if ONNXCOMP_ON_GPU
  return __float_as_uint(value);
#else
  return FloatToBits(value);
#endif
}

ONNXCOMP_DEVICE float FloatOfHalf(uint16_t half) {
#if ONNXCOMP_ON_GPU
  return __half2float(__ushort_as_half(half));
#else
  return HalfToFloat(half);
#endif
}

ONNXCOMP_DEVICE uint16_t HalfOfFloat(float value) {
#if ONNXCOMP_ON_GPU
  return __half_as_ushort(__float2half_rn(value));
#else
  return FloatToHalf(value);
#endif
}

// To nearest even; NaN stays NaN.
ONNXCOMP_DEVICE uint16_t BrainOfFloat(float value) {
  const uint32_t bits = BitsOfFloat(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Element types, in the numbering of TensorProto.
enum class Type : int { kFloat32 = 1, kFloat16 = 10, kBfloat16 = 16 };

ONNXCOMP_DEVICE float LoadElement(Type type, const void* data, int64_t index) {
  if (type == Type::kFloat32) return static_cast<const float*>(data)[index];
  const uint16_t bits = static_cast<const uint16_t*>(data)[index];
  if (type == Type::kFloat16) return FloatOfHalf(bits);
  return FloatOfBits(static_cast<uint32_t>(bits) << 16);
}

ONNXCOMP_DEVICE void StoreElement(Type type, void* data, int64_t index, float value) {
  if (type == Type::kFloat32) {
    static_cast<float*>(data)[index] = value;
  } else {
    static_cast<uint16_t*>(data)[index] =
        type == Type::kFloat16 ? HalfOfFloat(value) : BrainOfFloat(value);
  }
}

// Stores `values` as columns column .. column + kCount - 1 of the row that begins at element `row`,
// as far as they are below `length`; in vectors where these are whole and aligned.
template <int kCount>
ONNXCOMP_DEVICE void StoreRun(Type type, void* data, int64_t row, int64_t column, int64_t length,
                              const float* values) {
  const int per_vector = type == Type::kFloat32 ? 4 : 8;
  const int64_t begin = row + column;
  if (column + kCount <= length && begin % per_vector == 0) {
    auto* vectors = static_cast<Vector*>(data) + begin / per_vector;
    ONNXCOMP_UNROLL
    for (int i = 0; i < kCount; i += 4) {
      Vector vector;
      ONNXCOMP_UNROLL
      for (int j = 0; j < 4; ++j) vector.word[j] = BitsOfFloat(values[i + j]);
      if (type == Type::kFloat32) vectors[i / 4] = vector;
    }
    if (type == Type::kFloat32) return;
    ONNXCOMP_UNROLL
    for (int i = 0; i < kCount; i += 8) {
      Vector vector;
      ONNXCOMP_UNROLL
      for (int j = 0; j < 4; ++j) {
        const float low = values[i + 2 * j];
        const float high = values[i + 2 * j + 1];
        vector.word[j] = type == Type::kFloat16
                             ? PackLow(HalfOfFloat(low), HalfOfFloat(high))
                             : PackLow(BrainOfFloat(low), BrainOfFloat(high));
      }
      vectors[i / 8] = vector;
    }
    return;
  }
  ONNXCOMP_UNROLL
  for (int i = 0; i < kCount; ++i) {
    if (column + i < length) StoreElement(type, data, begin + i, values[i]);
  }
}

// Copies that run while threads go on: from global to shared memory, 16 bytes or 4.
template <class T>
ONNXCOMP_DEVICE void CopyLater(T* shared, const T* global) {
  static_assert(sizeof(T) == 16 || sizeof(T) == 4, "a size that the hardware copies");
#if ONNXCOMP_ON_GPU && __CUDA_ARCH__ >= 800
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (sizeof(T) == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(global) : "memory");
  }
#else
  *shared = *global;
#endif
}

// Closes a batch of copies.
ONNXCOMP_DEVICE void CloseCopies() {
#if ONNXCOMP_ON_GPU && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `kOpen` of this thread's batches are still under way.
template <int kOpen>
ONNXCOMP_DEVICE void AwaitCopies() {
#if ONNXCOMP_ON_GPU && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kOpen) : "memory");
#endif
}

}  // namespace onnxcomp::gpu
