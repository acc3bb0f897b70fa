// Elements of activations to float32 and back. Internal linkage for the reason of float16.h.
#pragma once

#include "common/elements.h"
#include "common/float16.h"

namespace onnxcomp {
namespace {

inline float ToFloat(float x) { return x; }
inline float ToFloat(Half x) { return HalfToFloat(x.bits); }
inline float ToFloat(Brain x) { return BfloatToFloat(x.bits); }
inline void FromFloat(float value, float* y) { *y = value; }
inline void FromFloat(float value, Half* y) { y->bits = FloatToHalf(value); }
inline void FromFloat(float value, Brain* y) { y->bits = FloatToBfloat(value); }

}  // namespace
}  // namespace onnxcomp
