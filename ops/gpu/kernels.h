// The kernels of CUDAExecutionProvider around the C functions, for every family of weights.
//
// A `Reader` is a weight whose tensors lie on the GPU; it is made of a node and the index of the
// weight's first input and has
//   rows(), length()
//   Read(context)                      the C structure
//   CheckProduct(node, int8), CheckGather(node)   what their nodes may get wrong
//   kScratch, kMatMul, kGather, kDecode           the C functions of the family
#pragma once

#include "common/weight_op.h"
#include "gpu/session.h"

namespace onnxcomp::gpu {

template <class T, class Reader>
class MatMulKernel : public Kernel {
 public:
  explicit MatMulKernel(const NodeInfo& node)
      : api_(node.api()), reader_(node, 1), memory_(node) {
    Reader::CheckProduct(node, ReadInt8<T>(node));
  }

  void Compute(OrtKernelContext* context) const override {
    const OrtValue* x = InputOf(api_, context, 0);
    Dims dims = DimsOf(api_, x);
    CheckLastDim(dims, reader_.length());
    const auto weight = reader_.Read(context);
    dims.back() = reader_.rows();
    T* y = OutputOf<T>(api_, context, dims);
    dims.pop_back();
    const int64_t batch = Count(dims);
    size_t bytes = 0;
    CheckCall(Reader::kScratch(&weight, batch, kTypeOf<T>, &bytes));
    memory_.With(context, bytes, [&](void* scratch) {
      CheckCall(Reader::kMatMul(&weight, DataOf<T>(api_, x), y, batch, kTypeOf<T>, scratch, bytes,
                                StreamOf(api_, context)));
    });
  }

 private:
  Api api_;
  Reader reader_;
  Memory memory_;
};

template <class Index, class Reader>
class GatherKernel : public Kernel {
 public:
  explicit GatherKernel(const NodeInfo& node) : api_(node.api()), reader_(node, 1) {
    reader_.CheckGather(node);
  }

  void Compute(OrtKernelContext* context) const override {
    const OrtValue* indices = InputOf(api_, context, 0);
    Dims dims = DimsOf(api_, indices);
    const int64_t count = Count(dims);
    const auto weight = reader_.Read(context);
    dims.push_back(reader_.length());
    auto* y = OutputOf<float>(api_, context, dims);
    CheckCall(Reader::kGather(&weight, DataOf<Index>(api_, indices), sizeof(Index), count, y,
                              StreamOf(api_, context)));
  }

 private:
  Api api_;
  Reader reader_;
};

template <class Reader>
class DecodeKernel : public Kernel {
 public:
  explicit DecodeKernel(const NodeInfo& node) : api_(node.api()), reader_(node, 0) {}

  void Compute(OrtKernelContext* context) const override {
    const auto weight = reader_.Read(context);
    auto* w = OutputOf<float>(api_, context, {weight.rows, weight.length});
    CheckCall(Reader::kDecode(&weight, w, kFloat, StreamOf(api_, context)));
  }

 private:
  Api api_;
  Reader reader_;
};

}  // namespace onnxcomp::gpu
