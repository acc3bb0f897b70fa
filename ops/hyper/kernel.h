// HyperMatMul, HyperGather, HyperDecode: declarations shared by the operator family.
#pragma once

#include <deque>

#include "common/custom_op.h"
#include "hyper/format.h"

namespace onnxcomp::hyper {

// Adds one operator for each combination of element types.
void AddOps(const Api& api, std::deque<CustomOp>& ops);

// Attributes and constant inputs of a node, checked once; the rest is checked at each run.
class WeightReader {
 public:
  // `first` is the index of the input that holds the codes; scales and table follow it.
  WeightReader(const NodeInfo& node, size_t first);

  int64_t rows() const { return rows_; }
  int64_t length() const { return length_; }

  // The weight as the runtime holds it now. Throws Error when its tensors do not fit together.
  Weight Read(const OrtKernelContext* context) const;

 private:
  Format Validate(const Dims& codes, const Dims& scales, const Dims& table) const;

  Api api_;
  size_t first_;
  int64_t rows_ = 0;
  int64_t length_ = 0;
  int group_ = 0;
  bool constant_ = false;  // shapes and table were checked at creation
  bool leveled_ = false;
  Format format_{};
  Levels levels_{};
};


}  // namespace onnxcomp::hyper
