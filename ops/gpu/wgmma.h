// Products of a warpgroup (four warps) on Hopper: A from registers, B from shared memory.
//
// wgmma m64nNk16: A of warp w is rows 16 w .. 16 w + 15, as fragments of mma.h; B is (N, 16) float16,
// K-major, with the swizzle of 128 bytes: column n of 64 terms is 128 bytes, eight columns are 1024,
// and chunk c of 16 bytes lies at c ^ (n mod 8). Sums are float32, four of each thread for 8 columns,
// again as in mma.h.
//
// Products run while threads go on. Between FenceGroup() and the AwaitGroup() that waits for them
// their registers must not be touched.
#pragma once

#include <utility>

#include "gpu/async.h"

// The code exists for compute capability 9.0 with its own instructions (sm_90a) alone.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define ONNXCOMP_HOPPER 1
#else
#define ONNXCOMP_HOPPER 0
#endif

namespace onnxcomp::gpu {

constexpr int kWarpgroup = 128;  // threads

// Registers that products use are written: they may begin.
ONNXCOMP_THREAD void FenceGroup() {
#if ONNXCOMP_HOPPER
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#elif ONNXCOMP_IN_EMULATOR
  emulator::FenceGroup();
#endif
}

// Closes a batch of products.
ONNXCOMP_THREAD void CloseGroup() {
#if ONNXCOMP_HOPPER
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#elif ONNXCOMP_IN_EMULATOR
  emulator::CloseGroup();
#endif
}

// Waits until at most `kOpen` batches run.
template <int kOpen>
ONNXCOMP_THREAD void AwaitGroup() {
#if ONNXCOMP_HOPPER
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kOpen) : "memory");
#elif ONNXCOMP_IN_EMULATOR
  emulator::AwaitGroup(kOpen);
#endif
}

// Gives registers of this warpgroup back, or takes more.
template <int kRegisters>
ONNXCOMP_THREAD void GiveRegisters() {
#if ONNXCOMP_HOPPER
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}
template <int kRegisters>
ONNXCOMP_THREAD void TakeRegisters() {
#if ONNXCOMP_HOPPER
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

// Where B lies, at most 128 bytes behind a multiple of 1024 in shared memory.
class GroupMatrix {
 public:
#if defined(__CUDACC__)
  // Address, leading offset 1 (unused by this layout), 1024 bytes between eights, swizzle of 128.
  ONNXCOMP_THREAD explicit GroupMatrix(const char* shared)
      : descriptor_(static_cast<uint64_t>((SharedAddress(shared) & 0x3ffffu) >> 4) |
                    uint64_t{1} << 16 | uint64_t{64} << 32 | uint64_t{1} << 62) {}

  // So many bytes further on: a multiple of 16.
  ONNXCOMP_THREAD GroupMatrix At(int bytes) const {
    return GroupMatrix(descriptor_ + static_cast<uint64_t>(bytes / 16));
  }

  ONNXCOMP_THREAD uint64_t descriptor() const { return descriptor_; }

 private:
  ONNXCOMP_THREAD explicit GroupMatrix(uint64_t descriptor) : descriptor_(descriptor) {}

  uint64_t descriptor_;
#else
  explicit GroupMatrix(const char* shared) : shared_(shared) {}
  GroupMatrix At(int bytes) const { return GroupMatrix(shared_ + bytes); }
  const char* shared() const { return shared_; }

 private:
  const char* shared_;
#endif
};

}  // namespace onnxcomp::gpu

#if ONNXCOMP_HOPPER
#include "gpu/wgmma_forms.h"
#endif

namespace onnxcomp::gpu {

// sums = (add ? sums : 0) + A B.
template <int kColumns>
ONNXCOMP_THREAD void MultiplyGroup(float (&sums)[kColumns / 2], const uint32_t* a,
                                   const GroupMatrix& b, bool add) {
#if ONNXCOMP_HOPPER
  GroupProduct<kColumns>::Add(sums, a, b.descriptor(), add ? 1 : 0);
#elif ONNXCOMP_IN_EMULATOR
  emulator::MultiplyGroup(kColumns, sums, a, b.shared(), add);
#else
  (void)sums, (void)a, (void)b, (void)add;
#endif
}

}  // namespace onnxcomp::gpu
