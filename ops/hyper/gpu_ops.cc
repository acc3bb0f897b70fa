// HyperMatMul, HyperGather and HyperDecode for CUDAExecutionProvider: nodes to calls of the C
// functions.
//
// Attribute 'precision' makes no difference here: tensor cores multiply codes by activations in
// float16 parts, which is at least as exact as the int8 of precision 1. An index outside the weight
// cannot be told to the session without waiting for the GPU: its row is NaN.

#include <optional>

#include "common/weight_op.h"
#include "gpu/session.h"
#include "hyper/kernel.h"

namespace onnxcomp::hyper {
namespace {

// A weight whose tensors lie on the GPU.
class GpuReader {
 public:
  GpuReader(const NodeInfo& node, size_t first) : reader_(node, first, /*readable=*/false) {
    const OrtValue* table = node.Constant(first + 2);
    if (table == nullptr) return;
    std::vector<int8_t> copy(static_cast<size_t>(Count(DimsOf(node.api(), table))));
    if (copy.size() != 1024 && copy.size() != 4096) return;  // no levels, or nothing to read
    gpu::CheckCall(onnxcomp_cuda_copy_to_host(DataOf<int8_t>(node.api(), table), copy.data(),
                                              copy.size()));
    int32_t found = 0;
    OnnxcompHyperLevels levels{};
    gpu::CheckCall(onnxcomp_cuda_hyper_levels(copy.data(), copy.size() == 1024 ? 10 : 12, &levels,
                                              &found));
    if (found != 0) levels_ = levels;
  }

  int64_t rows() const { return reader_.rows(); }
  int64_t length() const { return reader_.length(); }

  OnnxcompHyperWeight Read(const OrtKernelContext* context) const {
    const Weight weight = reader_.Read(context);
    const Format& format = weight.format;
    return {format.rows,  format.length, format.group, format.bits,
            format.states, weight.codes, weight.scales, weight.table,
            levels_ ? &*levels_ : nullptr};
  }

 private:
  WeightReader reader_;
  std::optional<OnnxcompHyperLevels> levels_;
};

template <class T>
class GpuMatMul : public Kernel {
 public:
  explicit GpuMatMul(const NodeInfo& node) : api_(node.api()), reader_(node, 1), memory_(node) {
    ReadInt8<T>(node);
  }

  void Compute(OrtKernelContext* context) const override {
    const OrtValue* x = InputOf(api_, context, 0);
    Dims dims = DimsOf(api_, x);
    CheckLastDim(dims, reader_.length());
    const OnnxcompHyperWeight weight = reader_.Read(context);
    dims.back() = reader_.rows();
    T* y = OutputOf<T>(api_, context, dims);
    dims.pop_back();
    const int64_t batch = Count(dims);
    size_t bytes = 0;
    gpu::CheckCall(onnxcomp_cuda_hyper_scratch(&weight, batch, kTypeOf<T>, &bytes));
    memory_.With(context, bytes, [&](void* scratch) {
      gpu::CheckCall(onnxcomp_cuda_hyper_matmul(&weight, DataOf<T>(api_, x), y, batch, kTypeOf<T>,
                                                scratch, bytes, gpu::StreamOf(api_, context)));
    });
  }

 private:
  Api api_;
  GpuReader reader_;
  gpu::Memory memory_;
};

template <class Index>
class GpuGather : public Kernel {
 public:
  explicit GpuGather(const NodeInfo& node) : api_(node.api()), reader_(node, 1) {
    CheckColumns(node, reader_.length());
  }

  void Compute(OrtKernelContext* context) const override {
    const OrtValue* indices = InputOf(api_, context, 0);
    Dims dims = DimsOf(api_, indices);
    const int64_t count = Count(dims);
    const OnnxcompHyperWeight weight = reader_.Read(context);
    dims.push_back(reader_.length());
    auto* y = OutputOf<float>(api_, context, dims);
    gpu::CheckCall(onnxcomp_cuda_hyper_gather(&weight, DataOf<Index>(api_, indices), sizeof(Index),
                                              count, y, gpu::StreamOf(api_, context)));
  }

 private:
  Api api_;
  GpuReader reader_;
};

class GpuDecode : public Kernel {
 public:
  explicit GpuDecode(const NodeInfo& node) : api_(node.api()), reader_(node, 0) {}

  void Compute(OrtKernelContext* context) const override {
    const OnnxcompHyperWeight weight = reader_.Read(context);
    auto* w = OutputOf<float>(api_, context, {weight.rows, weight.length});
    gpu::CheckCall(
        onnxcomp_cuda_hyper_decode(&weight, w, kFloat, gpu::StreamOf(api_, context)));
  }

 private:
  Api api_;
  GpuReader reader_;
};

template <class K>
void Add(const Api& api, std::deque<CustomOp>& ops, const char* name, std::vector<int> inputs,
         int output, CustomOp::Infer infer) {
  ops.emplace_back(api, name, WithWeight(std::move(inputs)), output, Make<K>, infer,
                   gpu::kProviderName);
}

}  // namespace

void AddGpuOps(const Api& api, std::deque<CustomOp>& ops) {
  Add<GpuMatMul<float>>(api, ops, "HyperMatMul", {kFloat}, kFloat, InferMatMul);
  Add<GpuMatMul<Half>>(api, ops, "HyperMatMul", {kFloat16}, kFloat16, InferMatMul);
  Add<GpuMatMul<Brain>>(api, ops, "HyperMatMul", {kBfloat16}, kBfloat16, InferMatMul);
  Add<GpuGather<int32_t>>(api, ops, "HyperGather", {kInt32}, kFloat, InferGather);
  Add<GpuGather<int64_t>>(api, ops, "HyperGather", {kInt64}, kFloat, InferGather);
  Add<GpuDecode>(api, ops, "HyperDecode", {}, kFloat, InferDecode);
}

}  // namespace onnxcomp::hyper
