// What the operators of all families with a weight (rows, length) have in common: their attributes,
// their indices, and the shapes of their outputs.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "common/custom_op.h"
#include "common/elements.h"

namespace onnxcomp {

// The attribute 'extent': rows and length, each at least 1 and at most `most`.
inline Dims ReadExtent(const NodeInfo& node, int64_t most) {
  const auto extent = node.Ints("extent");
  if (!extent) Fail("attribute 'extent' (ints: rows, length) is missing");
  if (extent->size() != 2) Fail("attribute 'extent' is ", Text(*extent), ", must be two ints");
  for (int64_t size : *extent) {
    if (size < 1 || size > most) {
      Fail("attribute 'extent' is ", Text(*extent), ", must be rows >= 1 and length >= 1");
    }
  }
  return *extent;
}

// Whether the attribute 'precision' of a product asks for int8 activations; checks 'dtype', too.
template <class T>
bool ReadInt8(const NodeInfo& node) {
  const int64_t dtype = node.Int("dtype").value_or(kTypeOf<T>);
  if (dtype != kTypeOf<T>) {
    Fail("attribute 'dtype' is ", dtype, ", the element type of x is ", kTypeOf<T>);
  }
  const int64_t precision = node.Int("precision").value_or(0);
  if (precision != 0 && precision != 1) {
    Fail("attribute 'precision' is ", precision, ", must be 0 (exact) or 1 (int8)");
  }
  return precision == 1;
}

inline void CheckLastDim(const Dims& dims, int64_t length) {
  if (dims.empty() || dims.back() != length) {
    Fail("x has shape ", Text(dims), ", its last dim must be ", length);
  }
}

template <class Index>
void CheckIndices(const Index* indices, int64_t count, int64_t rows) {
  for (int64_t i = 0; i < count; ++i) {
    if (indices[i] < -rows || indices[i] >= rows) {
      Fail("index ", indices[i], " at position ", i, " is outside [", -rows, ", ", rows - 1, "]");
    }
  }
}

template <class K>
std::unique_ptr<Kernel> Make(const NodeInfo& node, const CustomOp&) {
  return std::make_unique<K>(node);
}

inline bool Positive(const Dims& extent) {
  return extent.size() == 2 && extent[0] > 0 && extent[1] > 0;
}

// The runtime asks one of the overloads for all of them: the type of y comes from x, not from `op`.
inline void InferMatMul(const InferContext& context, const CustomOp&) {
  Dims dims = context.InputDims(0);
  const Dims extent = context.Ints("extent");
  if (dims.empty() || !Positive(extent)) return;  // unknown, or left to the kernel to refuse
  std::vector<std::string> symbols = context.InputSymbols(0);
  dims.back() = extent[0];
  symbols.back().clear();
  context.SetOutput(context.InputType(0), dims, symbols);
}

inline void InferGather(const InferContext& context, const CustomOp& op) {
  Dims dims = context.InputDims(0);
  const Dims extent = context.Ints("extent");
  if (dims.empty() || !Positive(extent)) return;  // a scalar cannot be told from an unknown rank
  std::vector<std::string> symbols = context.InputSymbols(0);
  dims.push_back(extent[1]);
  symbols.emplace_back();
  context.SetOutput(op.output, dims, symbols);
}

inline void InferDecode(const InferContext& context, const CustomOp& op) {
  const Dims extent = context.Ints("extent");
  if (Positive(extent)) context.SetOutput(op.output, extent, {});
}

}  // namespace onnxcomp
