// The plain C++ form of every kernel: no instruction beyond the baseline, order of sums as in
// spec.md. The other forms are tested against this one.

#include "hyper/plain.h"

namespace onnxcomp::hyper {
namespace {

void Rotate(float* row, int64_t groups, int group) {
  for (int64_t g = 0; g < groups; ++g, row += group) {
    for (int t = 0; t < group; ++t) row[t] = SignOf(t) < 0 ? -row[t] : row[t];
    for (int stride = 1; stride < group; stride *= 2) {
      for (int base = 0; base < group; base += 2 * stride) {
        for (int i = base; i < base + stride; ++i) {
          const float a = row[i];
          const float b = row[i + stride];
          row[i] = a + b;
          row[i + stride] = a - b;
        }
      }
    }
  }
}

// Weights of one panel's group, weight-major: q[t * 16 + lane].
template <class T>
void DecodeBlock(const Weight& weight, int64_t panel, int64_t group, T* q) {
  const uint8_t* block = weight.block(panel, group);
  for (int lane = 0; lane < kLanes; ++lane) {
    DecodeLane(weight.format, block + lane * 4, weight.table, q + lane, kLanes);
  }
}

void LoadScales(const Weight& weight, int64_t panel, int64_t group, float* scales) {
  const uint16_t* stored = weight.scale(panel, group);
  for (int lane = 0; lane < kLanes; ++lane) scales[lane] = ScaleOf(stored[lane]);
}

// One row, one group: the integer sums of 16 lanes.
void SumInt8(const int16_t* q, const int8_t* x, int step, int group, int32_t* sums) {
  for (int lane = 0; lane < kLanes; ++lane) sums[lane] = 0;
  for (int t = 0; t < group; ++t) {
    const int32_t value = x[t / 4 * step + t % 4];
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] += value * q[t * kLanes + lane];
  }
}

void ProductInt8(const Weight& weight, const Activations& x, int64_t panel, int panels,
                 int64_t first, int64_t rows, float* out) {
  const Format& format = weight.format;
  std::memset(out, 0, static_cast<size_t>(rows) * 2 * kLanes * sizeof(float));
  int16_t q[kMaxGroup * kLanes];
  float scales[kLanes];
  int32_t sums[kLanes];
  for (int p = 0; p < panels; ++p) {
    for (int64_t g = 0; g < format.groups; ++g) {
      DecodeBlock(weight, panel + p, g, q);
      LoadScales(weight, panel + p, g, scales);
      for (int64_t m = 0; m < rows; ++m) {
        const int inner = static_cast<int>((first + m) % x.tile);
        const Tile tile = TileAt(x, first + m - inner);
        const int64_t unit = tile.base + g * tile.rows;
        SumInt8(q, x.codes + unit * format.group + inner * 4, tile.rows * 4, format.group, sums);
        const float scale = x.scales[unit + inner];
        float* y = out + m * 2 * kLanes + p * kLanes;
        for (int lane = 0; lane < kLanes; ++lane) {
          y[lane] += static_cast<float>(sums[lane]) * (scales[lane] * scale);
        }
      }
    }
  }
}

void ProductExact(const Weight& weight, const Activations& x, int64_t panel, int panels,
                  int64_t first, int64_t rows, float* out) {
  const Format& format = weight.format;
  std::memset(out, 0, static_cast<size_t>(rows) * 2 * kLanes * sizeof(float));
  float q[kMaxGroup * kLanes];
  float scales[kLanes];
  for (int p = 0; p < panels; ++p) {
    for (int64_t g = 0; g < format.groups; ++g) {
      DecodeBlock(weight, panel + p, g, q);
      LoadScales(weight, panel + p, g, scales);
      for (int64_t m = 0; m < rows; ++m) {
        const int inner = static_cast<int>((first + m) % x.tile);
        const Tile tile = TileAt(x, first + m - inner);
        const float* values = x.values + (tile.base + g * tile.rows) * format.group + inner;
        float sums[kLanes] = {};
        for (int t = 0; t < format.group; ++t) {
          const float value = values[t * tile.rows];
          for (int lane = 0; lane < kLanes; ++lane) sums[lane] += value * q[t * kLanes + lane];
        }
        float* y = out + m * 2 * kLanes + p * kLanes;
        for (int lane = 0; lane < kLanes; ++lane) y[lane] += sums[lane] * scales[lane];
      }
    }
  }
}

}  // namespace

const Isa& PlainIsa() {
  static const Isa isa{
      "plain",
      1,
      IdentityPosition,
      Rotate,
      FromHalf,
      ToHalf,
      QuantizeGroup,
      ProductInt8,
      ProductExact,
      DecodePanelRows,
      DecodeOneRow};
  return isa;
}

}  // namespace onnxcomp::hyper
