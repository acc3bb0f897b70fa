// The plain C++ form of every kernel: no instruction beyond the baseline, order of sums as in
// spec.md. The other forms are tested against this one.

#include "hyper/plain.h"

namespace onnxcomp::hyper {
namespace {

void Rotate(const float* from, float* to, int group) {
  for (int t = 0; t < group; ++t) to[t] = kSigns.value[t] < 0 ? -from[t] : from[t];
  for (int stride = 1; stride < group; stride *= 2) {
    for (int base = 0; base < group; base += 2 * stride) {
      for (int i = base; i < base + stride; ++i) {
        const float a = to[i];
        const float b = to[i + stride];
        to[i] = a + b;
        to[i + stride] = a - b;
      }
    }
  }
}

// Weights of one panel's group, weight-major: q[t * 16 + lane].
void DecodeBlock(const Weight& weight, int64_t panel, int64_t group, float* q) {
  const uint8_t* block = weight.block(panel, group);
  for (int lane = 0; lane < kLanes; ++lane) {
    DecodeLane(weight.format, block + lane * 4, weight.table, q + lane, kLanes);
  }
}

void LoadScales(const Weight& weight, int64_t panel, int64_t group, float* scales) {
  const uint16_t* stored = weight.scale(panel, group);
  for (int lane = 0; lane < kLanes; ++lane) scales[lane] = ScaleOf(stored[lane]);
}

// Four floats: what the baseline of x86-64 and of ARM has in a register.
typedef float Four __attribute__((vector_size(16)));

// One row, one group. With int8 activations all partial sums are integers below 2^24: exact.
template <class T>
void SumGroup(const float* q, const T* x, int group, float* out) {
  Four sums[kLanes / 4] = {};
  for (int t = 0; t < group; ++t) {
    const auto value = static_cast<float>(x[t]);
#pragma GCC unroll 4
    for (int i = 0; i < kLanes / 4; ++i) {
      Four weights;
      std::memcpy(&weights, q + t * kLanes + i * 4, sizeof weights);
      sums[i] += weights * value;
    }
  }
  std::memcpy(out, sums, sizeof sums);
}

// Adds the product of one group to y. The plain form has tiles of one row: x is contiguous.
template <class T>
void AddGroup(const float* q, const T* x, int group, const float* scales, float x_scale,
              float* y) {
  float sums[kLanes];
  SumGroup(q, x, group, sums);
  for (int lane = 0; lane < kLanes; ++lane) y[lane] += sums[lane] * (scales[lane] * x_scale);
}

template <bool Int8>
void Product(const Weight& weight, const Activations& x, int64_t panel, int panels, int64_t first,
             int64_t rows, float* out) {
  const int group = weight.format.group;
  const int64_t groups = weight.format.groups;
  std::memset(out, 0, static_cast<size_t>(rows) * 2 * kLanes * sizeof(float));
  float q[kMaxGroup * kLanes];
  float scales[kLanes];
  for (int p = 0; p < panels; ++p) {
    for (int64_t g = 0; g < groups; ++g) {
      DecodeBlock(weight, panel + p, g, q);
      LoadScales(weight, panel + p, g, scales);
      for (int64_t m = 0; m < rows; ++m) {
        const int64_t unit = g * x.rows + first + m;
        float* y = out + m * 2 * kLanes + p * kLanes;
        if constexpr (Int8) {
          AddGroup(q, x.codes + unit * group, group, scales, x.scales[unit], y);
        } else {
          AddGroup(q, x.values + unit * group, group, scales, 1.0f, y);
        }
      }
    }
  }
}

}  // namespace

Layout LayoutOf(const Isa& isa, const Weight& weight) {
  Layout layout{};
  for (int t = 0; t < weight.format.group; ++t) {
    const int position = isa.position(weight, t);
    layout.positions[t] = static_cast<int16_t>(position);
    layout.moved = layout.moved || position != t;
    if (position < 32) layout.order[position] = static_cast<uint8_t>(t);
  }
  layout.bias = isa.bias(weight);
  layout.calm = isa.calm != nullptr && weight.structure != nullptr && !weight.structure->narrow;
  return layout;
}

const Isa& PlainIsa() {
  static const Isa isa{
      "plain",
      1,
      IdentityPosition,
      UnsignedBias,
      Rotate,
      FromHalf,
      ToHalf,
      QuantizeGroup,
      PlaceCodes,
      Product<true>,
      Product<false>,
      DecodePanelRows,
      DecodeOneRow};
  return isa;
}

}  // namespace onnxcomp::hyper
