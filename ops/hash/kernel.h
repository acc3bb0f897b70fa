// HashMatMul, HashGather, HashDecode: declarations shared by the operator family.
#pragma once

#include <deque>

#include "common/custom_op.h"
#include "common/elements.h"
#include "hash/format.h"

namespace onnxcomp::hash {

// Adds one operator for each combination of element types.
void AddOps(const Api& api, std::deque<CustomOp>& ops);

// The same for CUDAExecutionProvider.
void AddGpuOps(const Api& api, std::deque<CustomOp>& ops);

// Element types of a node's inputs from the memory on: memory, scale, codes, map, then what only
// the portable body reads.
std::vector<int> WithWeight(std::vector<int> inputs, int memory);

// Checks that 'precision' 1 (int8), if asked for, has a memory of int8.
void CheckPrecision(bool int8, Memory memory);

template <class T>
constexpr Memory kMemoryOf = Memory::kFloat32;
template <>
inline constexpr Memory kMemoryOf<Half> = Memory::kFloat16;
template <>
inline constexpr Memory kMemoryOf<int8_t> = Memory::kInt8;

// Attributes of a node, checked once; its tensors are checked at each run, which is cheap.
class WeightReader {
 public:
  // `first` is the index of the input that holds the memory; scale, codes and map follow it. With
  // `readable` false, memory and codes lie where this program cannot read.
  WeightReader(const NodeInfo& node, size_t first, Memory type, bool readable = true);

  int64_t rows() const { return rows_; }
  int64_t length() const { return length_; }

  // The weight as the runtime holds it now. Throws Error when its tensors do not fit together.
  Weight Read(const OrtKernelContext* context) const;

 private:
  Api api_;
  size_t first_;
  Memory type_;
  bool readable_;
  int64_t rows_ = 0;
  int64_t length_ = 0;
};

}  // namespace onnxcomp::hash
