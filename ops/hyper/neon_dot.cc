// NEON with the dot product of ARMv8.2.

#include "hyper/neon.h"

#include <arm_neon.h>

namespace onnxcomp::hyper {
namespace {

constexpr const char* kIsaName = "neondot";

// sums += four products in every dword of four rows.
inline int32x4_t Dot(int32x4_t sums, int8x16_t weights, int8x16_t x) {
  return vdotq_s32(sums, weights, x);
}

// Dword I of `x` against every dword of the weights.
template <int I>
inline int32x4_t DotLane(int32x4_t sums, int8x16_t weights, int8x16_t x) {
  return vdotq_laneq_s32(sums, weights, x, I);
}

}  // namespace
}  // namespace onnxcomp::hyper

#include "hyper/neon_kernels.h"

namespace onnxcomp::hyper {

const Isa& NeonDotIsa() { return ThisIsa(); }

}  // namespace onnxcomp::hyper
