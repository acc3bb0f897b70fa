// Blocks, warps and threads, for a GPU and, emulated, for a CPU.
//
// A kernel is a structure whose `operator()(Block&)` every thread runs. nvcc compiles it for GPUs;
// any C++ compiler compiles it for CPUs, where threads are fibers (gpu/emulator.h). So every line of
// a kernel but the few inside `#if ONNXCOMP_ON_GPU` is executed and compared with the definition by
// tests that need no GPU, and so are its barriers and its waits for asynchronous copies.
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
#define ONNXCOMP_UNROLL_TWICE _Pragma("unroll 2")
#define ONNXCOMP_ROLL _Pragma("unroll 1")
#else
#define ONNXCOMP_ON_GPU 0
#define ONNXCOMP_UNROLL
#define ONNXCOMP_UNROLL_TWICE
#define ONNXCOMP_ROLL
#endif
#if defined(__CUDACC__)
#define ONNXCOMP_IN_EMULATOR 0
#else
#define ONNXCOMP_IN_EMULATOR 1
#include "gpu/emulator.h"
#endif

namespace onnxcomp::gpu {

constexpr int kWarp = 32;            // threads of a warp
constexpr int kWarps = 8;            // warps of a block
constexpr int kThreads = kWarp * kWarps;

// What one load or store moves at most.
struct alignas(16) Vector {
  uint32_t word[4];
};

// The thread's number in its block.
ONNXCOMP_DEVICE int ThreadIndex() {
#if ONNXCOMP_ON_GPU
  return static_cast<int>(threadIdx.x);
#elif ONNXCOMP_IN_EMULATOR
  return emulator::ThreadIndex();
#else
  return 0;
#endif
}

// A variable of each thread.
template <class T>
class PerThread {
 public:
  ONNXCOMP_DEVICE T& operator[](int) { return value_; }

 private:
  T value_;
};

// The value of another lane of the warp.
template <class T>
ONNXCOMP_DEVICE T Shuffle(const T& value, int lane) {
#if ONNXCOMP_ON_GPU
  return __shfl_sync(0xffffffffu, value, lane);
#elif ONNXCOMP_IN_EMULATOR
  return emulator::Shuffle(value, lane);
#else
  return lane < 0 ? T{} : value;
#endif
}

// That of the lane whose number differs in the bits of `mask`.
template <class T>
ONNXCOMP_DEVICE T ShuffleXor(const T& value, int mask) {
#if ONNXCOMP_ON_GPU
  return __shfl_xor_sync(0xffffffffu, value, mask);
#else
  return Shuffle(value, (ThreadIndex() % kWarp) ^ mask);
#endif
}

// What threads of the warp wrote to shared memory before is seen by all of them after.
ONNXCOMP_DEVICE void SyncWarp() {
#if ONNXCOMP_ON_GPU
  __syncwarp();
#elif ONNXCOMP_IN_EMULATOR
  emulator::SyncWarp();
#endif
}

// 32 threads that run together.
struct Warp {
  int index;  // in its block

  // Calls body(thread); `thread` counts in the block.
  template <class Body>
  ONNXCOMP_DEVICE void EachLane(const Body& body) const {
    body(ThreadIndex());
  }

  // The value of one of the warp's threads.
  template <class T>
  ONNXCOMP_DEVICE T ValueOf(PerThread<T>& values, int lane) const {
    return Shuffle(values[0], lane);
  }

  // Every thread receives the value of the thread whose lane differs in the bits of `mask`.
  template <class T>
  ONNXCOMP_DEVICE void Exchange(PerThread<T>& values, int mask) const {
    values[0] = ShuffleXor(values[0], mask);
  }
};

// One block of threads.
struct Block {
  int64_t x, y, z;  // its place in the grid
  char* shared;     // memory of the block, aligned to 1024 bytes

  template <class Body>
  ONNXCOMP_DEVICE void EachThread(const Body& body) const {
    body(ThreadIndex());
  }

  template <class Body>
  ONNXCOMP_DEVICE void EachWarp(const Body& body) const {
    body(Warp{ThreadIndex() / kWarp});
  }

  // What threads wrote to shared memory before is seen by all of them after.
  ONNXCOMP_DEVICE void Sync() const {
#if ONNXCOMP_ON_GPU
    __syncthreads();
#elif ONNXCOMP_IN_EMULATOR
    emulator::SyncBlock();
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

}  // namespace onnxcomp::gpu
