// The bits that say which elements of a weight are kept.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "common/elements.h"
#include "common/error.h"

namespace onnxcomp::sparse {

// Bits of the bytes from `mask` on, at most eight of them.
inline uint64_t LoadBits(const uint8_t* mask, int64_t bytes) {
  if (bytes >= 8) {
    uint64_t word = 0;
    std::memcpy(&word, mask, sizeof word);
    return word;
  }
  uint64_t word = 0;
  for (int64_t i = 0; i < bytes; ++i) word |= static_cast<uint64_t>(mask[i]) << (8 * i);
  return word;
}

inline int64_t CountBits(const uint8_t* mask, int64_t bytes) {
  int64_t count = 0;
  for (int64_t i = 0; i < bytes; i += 8) {
    count += __builtin_popcountll(LoadBits(mask + i, bytes - i));
  }
  return count;
}

// How many elements are kept before each row, and in all rows. Throws Error for a bit beyond the end
// of a row.
inline std::vector<int64_t> RowStarts(const uint8_t* mask, int64_t rows, int64_t length) {
  const int64_t bytes = CeilDiv(length, 8);
  const int used = static_cast<int>(length - 8 * (bytes - 1));  // of the last byte
  std::vector<int64_t> starts(static_cast<size_t>(rows) + 1);
  for (int64_t row = 0; row < rows; ++row) {
    const uint8_t* bits = mask + row * bytes;
    if (bits[bytes - 1] >> used != 0) Fail("mask has bits beyond the ", length, " of row ", row);
    starts[static_cast<size_t>(row) + 1] = starts[static_cast<size_t>(row)] + CountBits(bits, bytes);
  }
  return starts;
}

}  // namespace onnxcomp::sparse
