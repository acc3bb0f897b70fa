// HashMatMul, HashGather, HashDecode: declarations shared by the operator family.
#pragma once

#include <deque>

#include "common/custom_op.h"
#include "hash/format.h"

namespace onnxcomp::hash {

// Adds one operator for each combination of element types.
void AddOps(const Api& api, std::deque<CustomOp>& ops);

// Attributes of a node, checked once; its tensors are checked at each run, which is cheap.
class WeightReader {
 public:
  // `first` is the index of the input that holds the memory; scale, codes and map follow it.
  WeightReader(const NodeInfo& node, size_t first, Memory type);

  int64_t rows() const { return rows_; }
  int64_t length() const { return length_; }

  // The weight as the runtime holds it now. Throws Error when its tensors do not fit together.
  Weight Read(const OrtKernelContext* context) const;

 private:
  Api api_;
  size_t first_;
  Memory type_;
  int64_t rows_ = 0;
  int64_t length_ = 0;
};

}  // namespace onnxcomp::hash
