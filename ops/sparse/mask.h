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
  uint64_t word = 0;
  if (bytes >= 8) {
    std::memcpy(&word, mask, sizeof word);
    return word;
  }
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

// Whether a row of the mask has a bit at `length` or behind.
inline bool HasBitsBehind(const uint8_t* mask, int64_t bytes, int64_t length) {
  const int64_t whole = length / 8;
  if (whole == bytes) return false;
  unsigned found = static_cast<unsigned>(mask[whole]) >> (length % 8);
  for (int64_t i = whole + 1; i < bytes; ++i) found |= mask[i];
  return found != 0;
}

// How many elements are kept before each row, and in all rows; a row has `bytes` bytes. Throws Error
// for a bit behind the end of a row.
inline std::vector<int64_t> RowStarts(const uint8_t* mask, int64_t rows, int64_t bytes,
                                      int64_t length) {
  std::vector<int64_t> starts(static_cast<size_t>(rows) + 1);
  for (int64_t row = 0; row < rows; ++row) {
    const uint8_t* bits = mask + row * bytes;
    if (HasBitsBehind(bits, bytes, length)) {
      Fail("mask has bits behind the ", length, " columns of row ", row);
    }
    starts[static_cast<size_t>(row) + 1] = starts[static_cast<size_t>(row)] + CountBits(bits, bytes);
  }
  return starts;
}

}  // namespace onnxcomp::sparse
