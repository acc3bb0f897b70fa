// Tables that are sums of two small ones: recognised once, looked up with 16 entries at a time.
//
// Of a state s of L bits, let N be the four top bits and c the four low ones. A table is structured
// when there are bytes F, P and G of 16 entries each with
//   table[s] = 2^shift u + beta,   u = (F[(N + P[c]) mod 16] + G[c]) mod 256,   0 <= u <= 63
// (spec.md section 3). N is the window of the newest symbols and c the same window of an earlier
// weight, (L - 4) / k of them ago. Entries of at most 63 are multiplied by activations as unsigned
// bytes, and four such products fit 16 bits. Other tables are served as they are.
#pragma once

#include <cstdint>

namespace onnxcomp::hyper {

constexpr int kMaxEntry = 63;  // largest u

struct Structure {
  // How much of the table is free; each step saves kernels a look-up.
  enum Kind {
    kFalling,  // P[c] = c and G[c] = -P[c]
    kSloped,   // P[c] = c
    kTwisted,  // G[c] = -P[c]
    kTurned,
  };
  static constexpr int kKinds = 4;

  Kind kind;
  int shift;
  int32_t beta;
  bool narrow;        // u <= 31: eight products fit 16 bits
  uint8_t turns[16];  // P
  uint8_t cells[16];  // F
  uint8_t steps[16];  // G
  // The same for table[s] itself, which is a sum modulo 256 as well.
  uint8_t whole_cells[16];
  uint8_t whole_steps[16];

  // Whether the table of 2^states entries is structured, for weights of so many bits; fills the
  // members if so.
  bool Find(const int8_t* table, int states, int bits);

  // Whether kernels know windows of these sizes: c must be the window of a weight before. Of tables of
  // 2^10 entries they know falling ones with a shift of one only.
  static bool Known(int states, int bits) {
    if (bits == 3 && states == 10) return true;
    return bits >= 2 && bits <= 4 && states <= 8 && (states - 4) % bits == 0;
  }
};

}  // namespace onnxcomp::hyper
