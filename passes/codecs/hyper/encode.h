// Plain encoding of one block of sixteen rows and one group, for encoders that begin with it.

#pragma once

#include <cstdint>
#include <memory>

#include "jobs.h"

namespace hyper {

// A code and how the plain encoder uses it; `isa` is one of `chosen_isa`.
struct PlainCode {
  const int8_t* table;
  double spread;
  int32_t passes;
  int32_t isa;
};

class BlockEncoder {
 public:
  // Throws std::bad_alloc. The format is valid, and the instruction set there.
  BlockEncoder(const Format& format, const PlainCode& code);
  ~BlockEncoder();

  bool ok() const;
  // Where the weights go: [t][lane].
  float* targets();
  // Returns false when a scale does not fit float16.
  bool run();
  // States [t][lane], zeros where a scale is zero, and float16 scales [lane].
  const uint16_t* path() const;
  const uint16_t* scales() const;

 private:
  class Block;
  std::unique_ptr<Block> block_;
};

}  // namespace hyper
