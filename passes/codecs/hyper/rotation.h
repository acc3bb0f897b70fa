// The rotation of groups: signs and a Hadamard transform along t; arrays are [t][lane]. Included once
// per instruction set by viterbi.h and panel.h. No include guard on purpose.

namespace ONNXCOMP_ISA {
namespace {

void transform(float* x, int group) {
  for (int half = 1; half < group; half *= 2)
    for (int start = 0; start < group; start += 2 * half)
      for (int i = start * kLanes; i < (start + half) * kLanes; ++i) {
        const float a = x[i], b = x[i + half * kLanes];
        x[i] = a + b;
        x[i + half * kLanes] = a - b;
      }
}

void flip_signs(float* x, int group) {
  for (int t = 0; t < group; ++t)
    if (sign_is_negative(t))
      for (int lane = 0; lane < kLanes; ++lane) x[t * kLanes + lane] = -x[t * kLanes + lane];
}

void rotate(float* x, int group) {
  flip_signs(x, group);
  transform(x, group);
}

}  // namespace
}  // namespace ONNXCOMP_ISA
