// Large tables that hold at most 256 values in order: recognised once, looked up fast.
//
// A table of 2^L states, L > 8, is one of 256 levels when there are an odd A and 256 values with
//   table[s] = values[u div 2^(L-8)],  u = (A s + (A - 1) / 2) mod 2^L,  values[255 - v] = -values[v]
// (spec.md section 3 makes them so up to four bits per weight). A multiplication in 16 bits then
// leaves v in its high byte, whatever stands above the window's L bits, and 256 values fit
// registers. Other tables are served as they are.
#pragma once

#include <cstdint>

namespace onnxcomp::hyper {

struct Levels {
  uint16_t multiplier;  // A 2^(16-L)
  uint16_t offset;      // (A - 1) / 2 2^(16-L)
  int8_t values[256];

  // Whether the table of 2^states entries is one of 256 levels; fills the members if so.
  bool Find(const int8_t* table, int states);
};

}  // namespace onnxcomp::hyper
