// Compares the sparse kernels of one instruction set with plain C++: rows made dense, halves and int8
// products bit by bit, exact products within float32 rounding.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "sparse/format.h"

namespace conformance {

using onnxcomp::sparse::Activations;
using onnxcomp::sparse::Isa;
using onnxcomp::sparse::Row;

[[noreturn]] inline void SparseDiffers(const Isa& isa, const char* what, int groups, int group) {
  std::printf("%s: sparse %s differs at %d groups of %d\n", isa.name, what, groups, group);
  std::exit(1);
}

inline bool SameBytes(const void* a, const void* b, size_t bytes) {
  return std::memcmp(a, b, bytes) == 0;
}

// One row of random codes, and some rows of activations.
inline void CompareSparseRow(const Isa& isa, int groups, int group, std::mt19937& random) {
  constexpr int64_t kRows = 7;
  const Isa& plain = onnxcomp::sparse::PlainIsa();
  const auto padded = static_cast<size_t>(groups * group);
  const auto word = [&] { return static_cast<int>(random() % 255) - 127; };
  std::vector<uint8_t> bits(padded / 8);
  for (uint8_t& byte : bits) byte = static_cast<uint8_t>(random() % 3 == 0 ? 0xff : random());
  size_t kept = 0;
  for (const uint8_t byte : bits) kept += static_cast<size_t>(__builtin_popcount(byte));
  // No more behind the codes than kernels may read.
  std::vector<int8_t> codes(kept + static_cast<size_t>(isa.slack)), here(padded), there(padded);
  for (int8_t& code : codes) code = static_cast<int8_t>(word());
  isa.expand(bits.data(), static_cast<int64_t>(padded / 64), codes.data(), here.data());
  plain.expand(bits.data(), static_cast<int64_t>(padded / 64), codes.data(), there.data());
  if (here != there) SparseDiffers(isa, "expand", groups, group);

  std::vector<uint16_t> halves(static_cast<size_t>(groups));
  for (uint16_t& half : halves) half = static_cast<uint16_t>(random() % 0x7c00u);
  constexpr size_t kMore = onnxcomp::sparse::kLanes;  // products read more scales than there are
  std::vector<float> scales(halves.size() + kMore), others(scales);
  isa.from_half(halves.data(), groups, scales.data());
  plain.from_half(halves.data(), groups, others.data());
  if (!SameBytes(scales.data(), others.data(), 4 * scales.size())) {
    SparseDiffers(isa, "from_half", groups, group);
  }

  std::vector<int8_t> rounded(kRows * padded);
  for (int8_t& code : rounded) code = static_cast<int8_t>(word());
  std::vector<float> values(kRows * padded), steps(kRows * halves.size() + kMore);
  std::normal_distribution<float> normal;
  for (float& value : values) value = normal(random);
  for (float& step : steps) step = normal(random);
  std::vector<int8_t> flipped(rounded);
  for (int8_t& code : flipped) code = static_cast<int8_t>(code ^ isa.flip);
  const Activations own{groups, group, flipped.data(), steps.data(), values.data()};
  const Activations x{groups, group, rounded.data(), steps.data(), values.data()};
  const Row row{here.data(), scales.data()};
  float a[kRows], b[kRows];
  isa.product_int8(row, own, kRows, a);
  plain.product_int8(row, x, kRows, b);
  if (!SameBytes(a, b, sizeof a)) SparseDiffers(isa, "product_int8", groups, group);
  isa.product_exact(row, x, kRows, a);
  plain.product_exact(row, x, kRows, b);
  double bound = 0;
  for (size_t t = 0; t < padded; ++t) {
    bound += 8.0 * std::fabs(here[t]) * scales[t / static_cast<size_t>(group)];
  }
  for (int m = 0; m < kRows; ++m) {
    if (!(std::fabs(a[m] - b[m]) <= bound * 0x1p-20)) {
      SparseDiffers(isa, "product_exact", groups, group);
    }
  }
}

// The number of cases.
inline int CompareSparse(const Isa& isa) {
  std::mt19937 random(11);
  int cases = 0;
  for (int group : {64, 128, 256}) {
    for (int groups : {1, 2, 3, 17, 40}) {
      CompareSparseRow(isa, groups, group, random);
      ++cases;
    }
  }
  return cases;
}

}  // namespace conformance
