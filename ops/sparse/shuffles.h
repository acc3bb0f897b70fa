// For the instruction sets that place the codes of one byte of the mask by a shuffle.
#pragma once

#include <cstdint>

namespace onnxcomp::sparse {
namespace {

// For each byte of a mask the places of eight columns among the codes that follow; 0x80, which
// shuffles turn into zero, where a bit is not set.
struct Shuffles {
  alignas(64) uint8_t places[256][8];

  Shuffles() {
    for (int byte = 0; byte < 256; ++byte) {
      uint8_t next = 0;
      for (int j = 0; j < 8; ++j) places[byte][j] = (byte >> j & 1) != 0 ? next++ : 0x80;
    }
  }
};

inline const Shuffles& AllShuffles() {
  static const Shuffles shuffles;
  return shuffles;
}

}  // namespace
}  // namespace onnxcomp::sparse
