// The storage format of spec.md as plain structures, and what an instruction set has to provide.
//
// Included by translation units compiled for different instruction sets: only declarations and
// trivial members here, nothing the linker could merge across them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace onnxcomp::hash {

constexpr int kLanes = 16;                 // rows of a panel, columns of a block
constexpr int kTile = kLanes * kLanes;     // weights of a tile
constexpr int kSpan = 8;                   // blocks that are multiplied at a time
constexpr int kGroup = kSpan * kLanes;     // columns that share a scale of int8 activations
constexpr int kMaxRows = 12;               // rows of activations that are interleaved, at most
constexpr int kRowBlock = 144;             // rows of activations per task
constexpr int kStreamRows = 4;             // up to here tiles are read in place
constexpr uint32_t kWord = 0x7fffffffu;    // keys and hashes are taken modulo 2^31

enum class Memory { kFloat32, kFloat16, kInt8 };

// The node input `map`.
struct Map {
  int64_t base, run, stride, rotate, sign, is_signed;
};

// One weight. The tensors belong to the runtime.
struct Weight {
  int64_t rows, length;
  int64_t panels, blocks;
  int64_t slots;
  int chunk;  // weights of a slot
  Memory type;
  const void* memory;
  float scale;
  const uint8_t* codes;  // (panels, blocks, parts), or null
  Map map;

  int parts() const { return kTile / chunk; }
};

// Rows of activations, laid out for a product: spans of 8 blocks, and in a span, tiles of n rows
// interleaved. Element t (below 128) of row i of the tile that starts at row r stands, for span s, at
//   float  ((r * spans + s * n) * 128) + t * n + i
//   int8   ((r * spans + s * n) * 128) + (t / 4 * n + i) * 4 + t mod 4
// and the scale of row i at r * spans + s * n + i; the sums of its eight blocks at eight times that.
// For at most kStreamRows rows a second copy with opposite signs follows at a distance of `negated`.
struct Activations {
  int64_t rows;
  int64_t spans;
  int tile;
  int64_t negated;
  const float* values;
  const int8_t* codes;  // int8 only, as the following; null where `values` serves
  const float* scales;
  const int32_t* sums;
};

// Work of one instruction set. All functions are re-entrant.
struct Isa {
  int tile;      // rows of activations that are interleaved
  int panels;    // panels of one product
  bool dot;      // int8 products of whole tiles use `codes` of the activations, not `values`

  // out[i * 32 + lane] = sum over all columns, for rows [first, first + rows) and the lanes of
  // `panels` panels. Without the factor of the weight's scale.
  void (*product)(const Weight& weight, const Activations& x, int64_t panel, int panels,
                  int64_t first, int64_t rows, float* out);

  // The same for int8 activations and an int8 memory, with their scales; see spec.md.
  void (*product_int8)(const Weight& weight, const Activations& x, int64_t panel, int panels,
                       int64_t first, int64_t rows, float* out);

  // out[t * 16 + lane] of the columns of `count` blocks, with signs, without the scale.
  void (*decode)(const Weight& weight, int64_t panel, int64_t block, int count, float* out);
};

const Isa& PlainIsa();
const Isa& Avx2Isa();
const Isa& Avx512Isa();

// The form of the instruction set that runs.
const Isa& SelectIsa();

}  // namespace onnxcomp::hash
