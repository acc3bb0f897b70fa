// SparseDecode, SparseIntMatMul and SparseIntDecode: declarations shared by the operator family.
#pragma once

#include <deque>

#include "common/custom_op.h"
#include "common/elements.h"
#include "sparse/format.h"

namespace onnxcomp::sparse {

// Adds one operator for each combination of element types.
void AddOps(const Api& api, std::deque<CustomOp>& ops);

// The same for weights of integers.
void AddIntOps(const Api& api, std::deque<CustomOp>& ops);

// Attributes of weights of integers.
struct IntFormat {
  int64_t rows, length;
  int64_t groups, padded;  // columns in whole groups
  int64_t bytes;           // of a row of the mask
  int group, bits;
  bool paired;  // two of every four elements are kept; else a bit says so of each
};

// A weight of integers as the runtime holds it now, checked.
struct IntWeight {
  const uint8_t* mask;
  const uint8_t* codes;
  const uint16_t* scales;
  const int64_t* starts;  // codes before each row, the zero in front counted, and all of them
};

// Attributes and constant inputs of a node, checked once; the rest is checked at each run.
class IntReader {
 public:
  // `first` is the index of the input that holds the mask; codes and scales follow it.
  IntReader(const NodeInfo& node, size_t first);

  const IntFormat& format() const { return format_; }

  // The weight as the runtime holds it now; `own` holds what had to be found for this run. Throws
  // Error when its tensors do not fit together.
  IntWeight Read(const OrtKernelContext* context, std::vector<int64_t>& own) const;

 private:
  std::vector<int64_t> Starts(const OrtValue* mask, const OrtValue* codes) const;
  void CheckScales(const OrtValue* scales) const;

  Api api_;
  size_t first_;
  IntFormat format_{};
  std::vector<int64_t> starts_;  // empty where mask or codes are not constant
};

// Memory in which one task makes rows of a weight dense.
class RowMaker {
 public:
  RowMaker(const Isa& isa, const IntFormat& format, const IntWeight& weight);

  // The codes of a row, `padded` of them; they live until the next call.
  const int8_t* Codes(int64_t row) const;

  // Its scales in float32; they live until the next call.
  const float* Scales(int64_t row) const;

 private:
  const uint8_t* Bits(int64_t row) const;

  const Isa& isa_;
  const IntFormat& format_;
  const IntWeight& weight_;
  Scratch<int8_t> dense_;
  Scratch<int8_t> unpacked_;
  Scratch<uint64_t> words_;
  Scratch<float> scales_;
};

}  // namespace onnxcomp::sparse
