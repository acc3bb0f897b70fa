// NEON without the dot product: products of bytes to 16 bits, twice pairwise to 32. Two products
// fit 16 bits: 2 * 127 * 127 < 2^15.

#include "hyper/neon.h"

#include <arm_neon.h>

namespace onnxcomp::hyper {
namespace {

constexpr const char* kIsaName = "neon";

// sums += four products in every dword of four rows.
inline int32x4_t Dot(int32x4_t sums, int8x16_t weights, int8x16_t x) {
  const int16x8_t low = vmull_s8(vget_low_s8(weights), vget_low_s8(x));
  const int16x8_t high = vmull_high_s8(weights, x);
  return vpadalq_s16(sums, vpaddq_s16(low, high));
}

// Dword I of `x` against every dword of the weights.
template <int I>
inline int32x4_t DotLane(int32x4_t sums, int8x16_t weights, int8x16_t x) {
  return Dot(sums, weights, vreinterpretq_s8_s32(vdupq_laneq_s32(vreinterpretq_s32_s8(x), I)));
}

}  // namespace
}  // namespace onnxcomp::hyper

#include "hyper/neon_kernels.h"

namespace onnxcomp::hyper {

const Isa& NeonIsa() { return ThisIsa(); }

}  // namespace onnxcomp::hyper
