// HyperMatMul, HyperGather, HyperDecode: declarations shared by the operator family.
#pragma once

#include <deque>

#include "common/custom_op.h"
#include "hyper/format.h"

namespace onnxcomp::hyper {

// Adds one operator for each combination of element types.
void AddOps(const Api& api, std::deque<CustomOp>& ops);

// HyperExperts, which `AddOps` adds, too.
void AddExperts(const Api& api, std::deque<CustomOp>& ops);

// The same as `AddOps` for CUDAExecutionProvider, but for HyperExperts.
void AddGpuOps(const Api& api, std::deque<CustomOp>& ops);

// Element types of a node's inputs from the codes on: codes, scales, table, then what only the
// portable body reads.
std::vector<int> WithWeight(std::vector<int> inputs);

// Reads 'columns' of HyperGather, which the portable body needs and a kernel only checks.
void CheckColumns(const NodeInfo& node, int64_t length);

// Attributes and constant inputs of a node, checked once; the rest is checked at each run.
class WeightReader {
 public:
  // `first` is the index of the input that holds the codes; scales and table follow it. With
  // `readable` false they lie where this program cannot read: only their shapes are checked.
  WeightReader(const NodeInfo& node, size_t first, bool readable = true);

  int64_t rows() const { return rows_; }
  int64_t length() const { return length_; }

  // Whether the weight's shapes and table are known before a run.
  bool constant() const { return constant_; }

  // What is known of a constant weight: everything but its tensors.
  Weight Known() const;

  // The weight as the runtime holds it now. Throws Error when its tensors do not fit together.
  Weight Read(const OrtKernelContext* context) const;

 private:
  Format Validate(const Dims& codes, const Dims& scales, const Dims& table) const;

  Api api_;
  size_t first_;
  bool readable_;
  int64_t rows_ = 0;
  int64_t length_ = 0;
  int group_ = 0;
  bool constant_ = false;  // shapes and table were checked at creation
  bool leveled_ = false;
  bool structured_ = false;
  Format format_{};
  Levels levels_{};
  Structure structure_{};
};

}  // namespace onnxcomp::hyper
