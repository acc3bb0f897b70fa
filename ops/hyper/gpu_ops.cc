// HyperMatMul, HyperGather and HyperDecode for CUDAExecutionProvider: nodes to calls of the C
// functions.
//
// Attribute 'precision' makes no difference here: tensor cores multiply codes by activations in
// float16 parts, which is at least as exact as the int8 of precision 1. An index outside the weight
// cannot be told to the session without waiting for the GPU: its row is NaN.

#include <optional>

#include "gpu/kernels.h"
#include "hyper/kernel.h"

namespace onnxcomp::hyper {
namespace {

// A weight whose tensors lie on the GPU.
class GpuReader {
 public:
  static constexpr auto kScratch = onnxcomp_cuda_hyper_scratch;
  static constexpr auto kMatMul = onnxcomp_cuda_hyper_matmul;
  static constexpr auto kGather = onnxcomp_cuda_hyper_gather;
  static constexpr auto kDecode = onnxcomp_cuda_hyper_decode;

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

  static void CheckProduct(const NodeInfo&, bool) {}
  void CheckGather(const NodeInfo& node) const { CheckColumns(node, length()); }

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

template <class K>
void Add(const Api& api, std::deque<CustomOp>& ops, const char* name, std::vector<int> inputs,
         int output, CustomOp::Infer infer) {
  ops.emplace_back(api, name, WithWeight(std::move(inputs)), output, Make<K>, infer,
                   gpu::kProviderName);
}

}  // namespace

void AddGpuOps(const Api& api, std::deque<CustomOp>& ops) {
  Add<gpu::MatMulKernel<float, GpuReader>>(api, ops, "HyperMatMul", {kFloat}, kFloat, InferMatMul);
  Add<gpu::MatMulKernel<Half, GpuReader>>(api, ops, "HyperMatMul", {kFloat16}, kFloat16, InferMatMul);
  Add<gpu::MatMulKernel<Brain, GpuReader>>(api, ops, "HyperMatMul", {kBfloat16}, kBfloat16, InferMatMul);
  Add<gpu::GatherKernel<int32_t, GpuReader>>(api, ops, "HyperGather", {kInt32}, kFloat, InferGather);
  Add<gpu::GatherKernel<int64_t, GpuReader>>(api, ops, "HyperGather", {kInt64}, kFloat, InferGather);
  Add<gpu::DecodeKernel<GpuReader>>(api, ops, "HyperDecode", {}, kFloat, InferDecode);
}

}  // namespace onnxcomp::hyper
