// The storage format of spec.md as plain structures, and what an instruction set has to provide.
//
// Included by translation units compiled for different instruction sets: only declarations and
// trivial members here, nothing the linker could merge across them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "hyper/levels.h"
#include "hyper/structure.h"

namespace onnxcomp::hyper {

constexpr int kLanes = 16;      // rows of a panel
constexpr int kLine = 4 * kLanes;  // bytes of one dword of 16 rows
constexpr int kMaxGroup = 256;  // weights of a group
constexpr int kMaxTile = 12;    // rows of activations that are interleaved, at most
constexpr int kRowBlock = 144;  // rows of activations per task; a multiple of every tile
constexpr int kManyRows = 64;   // rows of activations from which `Isa::many_rows` is used

// Sizes of one weight.
struct Format {
  int64_t rows;    // output channels
  int64_t length;  // axis of the sum
  int64_t panels;  // ceil(rows / 16)
  int64_t groups;  // ceil(length / group)
  int group;       // weights of a group
  int bits;        // k, bits of a weight
  int states;      // L, log2 of the table's length
  int dwords;      // of one row of one group

  int64_t padded() const { return groups * group; }
};

// One weight. The tensors belong to the runtime.
struct Weight {
  Format format;
  const uint8_t* codes;
  const uint16_t* scales;
  const int8_t* table;
  const Levels* levels;  // of the table, or null where it has more or is small
  const Structure* structure;  // of the table, or null where it has none

  // The dwords of 16 rows in one group, `format.dwords` times 64 bytes.
  const uint8_t* block(int64_t panel, int64_t group) const {
    return codes + (panel * format.groups + group) * format.dwords * kLine;
  }
  const uint16_t* scale(int64_t panel, int64_t group) const {
    return scales + (panel * format.groups + group) * kLanes;
  }
};

// What the int8 products of an instruction set want of the activations for one weight.
struct Layout {
  int16_t positions[kMaxGroup];  // of weight t of a group in the order in which they are met
  uint8_t order[32];             // weight at each position; what follows repeats it
  bool moved;                    // positions are not the order of weights
  int32_t bias;                  // what the sum of the codes of a group is multiplied by
  bool calm;                     // products ask where activations are calm: see Isa::calm
};

// Rotated rows of activations, laid out for a product.
//
// A group of all rows lies together, because products go through the weights group by group. Rows are
// interleaved in tiles: tile T holds n = min(tile, rows - T * tile) rows. In units of one row's group
// g, element t of row i of the tile is stored at
//   int8   ((group * rows + T * tile) * g) + (t' / 4 * n + i) * 4 + t' mod 4, t' the position that the
//          instruction set gives to weight t
//   float  ((group * rows + T * tile) * g) + t * n + i
// and its scale and bias at group * rows + T * tile + i; what holds for a whole tile is at its first row.
struct Activations {
  int64_t rows;
  int64_t groups;
  int group;
  int tile;
  const int8_t* codes;   // precision 1
  const float* scales;   // precision 1
  const int32_t* biases; // precision 1: Layout::bias times the sum of the codes
  const float* values;   // precision 0
  const bool* calm;      // precision 1: of tiles, what Isa::calm says, where that is given
};

// Work of one instruction set. All functions are re-entrant.
struct Isa {
  const char* name;
  int tile;

  // The position of weight t of a group in the order in which `product_int8` meets the weights:
  // a permutation within every 32 of them, the same for all.
  int (*position)(const Weight& weight, int t);

  // What `product_int8` wants the sum of the codes of a group multiplied by, as `biases`.
  int32_t (*bias)(const Weight& weight);

  // One group: to = H (sign * from), in float32, strides 1, 2, 4, ...; `to` may be `from`.
  void (*rotate)(const float* from, float* to, int group);

  // Between float16 bits and float32, to nearest even.
  void (*from_half)(const uint16_t* halves, int64_t count, float* out);
  void (*to_half)(const float* values, int64_t count, uint16_t* out);

  // Rounds one rotated group to int8: codes (group,), returns the scale; see spec.md. `total` is
  // the sum of the codes.
  float (*quantize)(const float* values, int group, int8_t* codes, int32_t* total);

  // Lays the codes of one group of `count` rows out as Activations: four codes of each row in turn,
  // by their positions.
  void (*place)(const int8_t* codes, int count, int group, const Layout& layout, int8_t* out);

  // out[i * 32 + lane] = sum over groups, for rows [first, first + rows) of the activations and the
  // 16 * panels lanes from panel on; `panels` is 1 or 2, `first` a multiple of the tile.
  void (*product_int8)(const Weight& weight, const Activations& x, int64_t panel, int panels,
                       int64_t first, int64_t rows, float* out);
  void (*product_exact)(const Weight& weight, const Activations& x, int64_t panel, int panels,
                        int64_t first, int64_t rows, float* out);

  // The rows of one panel in one group, decoded: out[lane * stride + t], lanes < count, t < width.
  void (*decode_panel)(const Weight& weight, int64_t panel, int64_t group, int count, int width,
                       float* out, int64_t stride);

  // One row in one group, decoded: out[t], t < width.
  void (*decode_row)(const Weight& weight, int64_t row, int64_t group, int width, float* out);

  // The form for int8 products of at least kManyRows rows, where that is another one.
  const Isa* many_rows = nullptr;

  // Whether 16 bits hold, for every row of a tile, the codes of a group times any entries of
  // structured tables, summed up over four fours of positions.
  bool (*calm)(const int8_t* placed, int count, int group) = nullptr;
};

// What the int8 products of a weight want of the activations.
Layout LayoutOf(const Isa& isa, const Weight& weight);

// The plain form, right on every machine.
const Isa& PlainIsa();

// The best form for this machine, or the one named by the environment variable ONNXCOMP_ISA.
const Isa& SelectIsa();

}  // namespace onnxcomp::hyper
