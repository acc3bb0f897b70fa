// Weights of integers with zeros left out, as kernels see them; spec.md defines them.
#pragma once

#include <cstdint>

namespace onnxcomp::sparse {

constexpr int kLanes = 16;      // partial sums of a product
constexpr int kWord = 64;       // columns that are looked at together
constexpr int kMostGroup = 256; // columns with one scale

// Bytes of codes between those that are used and those that are asked of memory.
constexpr int64_t kAhead = 2048;

// Rows of activations as products want them, padded with zeros to whole groups.
struct Activations {
  int64_t groups;
  int group;
  const int8_t* codes;  // precision 1: (rows, groups * group)
  const float* scales;  // precision 1: (rows, groups), and kLanes more that can be read
  const float* values;  // precision 0: (rows, groups * group)
};

// One row of a weight, dense: groups * group codes, and a scale for each group, kLanes more that can be
// read.
struct Row {
  const int8_t* codes;
  const float* scales;
};

// Work of one instruction set. All functions are re-entrant.
struct Isa {
  const char* name;

  // Bytes behind the codes of a row that `expand` may read.
  int64_t slack;

  // What the codes of activations are combined with by exclusive or.
  int8_t flip;

  // out[64 i + j] is the next code where bit j of word i is set, else 0, for 64 * words columns. The
  // words lie at any address.
  void (*expand)(const uint8_t* bits, int64_t words, const int8_t* codes, int8_t* out);

  // From float16 bits to float32.
  void (*from_half)(const uint16_t* halves, int64_t count, float* out);

  // y[m] = the product of a row with rows m of the activations, m < count.
  void (*product_int8)(const Row& row, const Activations& x, int64_t count, float* y);
  void (*product_exact)(const Row& row, const Activations& x, int64_t count, float* y);
};

const Isa& PlainIsa();
const Isa& Avx2Isa();
const Isa& Avx512Isa();
const Isa& NeonIsa();

// The best form for this machine, or the one named by the environment variable ONNXCOMP_ISA.
const Isa& SelectIsa();

}  // namespace onnxcomp::sparse
