// HashMatMul, HashGather and HashDecode for CUDAExecutionProvider: nodes to calls of the C
// functions.
//
// Attribute 'precision' makes no difference here; see hyper/gpu_ops.cc. Scale and map, eight
// numbers, lie in the memory of the CPU, where shapes are, because they decide which kernel runs.

#include "gpu/kernels.h"
#include "hash/kernel.h"

namespace onnxcomp::hash {
namespace {

// A weight whose memory and codes lie on the GPU.
template <class M>
class GpuReader {
 public:
  static constexpr auto kScratch = onnxcomp_cuda_hash_scratch;
  static constexpr auto kMatMul = onnxcomp_cuda_hash_matmul;
  static constexpr auto kGather = onnxcomp_cuda_hash_gather;
  static constexpr auto kDecode = onnxcomp_cuda_hash_decode;

  GpuReader(const NodeInfo& node, size_t first)
      : reader_(node, first, kMemoryOf<M>, /*readable=*/false) {}

  static void CheckProduct(const NodeInfo&, bool int8) { CheckPrecision(int8, kMemoryOf<M>); }
  static void CheckGather(const NodeInfo&) {}

  int64_t rows() const { return reader_.rows(); }
  int64_t length() const { return reader_.length(); }

  OnnxcompHashWeight Read(const OrtKernelContext* context) const {
    const Weight weight = reader_.Read(context);
    const Map& map = weight.map;
    return {weight.rows,   weight.length, weight.slots, weight.chunk, kTypeOf<M>,
            weight.memory, weight.codes,  weight.scale,
            {map.base, map.run, map.stride, map.rotate, map.sign, map.is_signed}};
  }

 private:
  WeightReader reader_;
};

// Adds an operator whose weight begins at input `first`.
template <class K, class M>
void Add(const Api& api, std::deque<CustomOp>& ops, const char* name, std::vector<int> inputs,
         int output, CustomOp::Infer infer) {
  const size_t first = inputs.size();
  ops.emplace_back(api, name, WithWeight(std::move(inputs), kTypeOf<M>), output, Make<K>, infer,
                   gpu::kProviderName, std::vector<size_t>{first + 1, first + 3});
}

template <class M>
void AddForMemory(const Api& api, std::deque<CustomOp>& ops) {
  Add<gpu::MatMulKernel<float, GpuReader<M>>, M>(api, ops, "HashMatMul", {kFloat}, kFloat, InferMatMul);
  Add<gpu::MatMulKernel<Half, GpuReader<M>>, M>(api, ops, "HashMatMul", {kFloat16}, kFloat16, InferMatMul);
  Add<gpu::MatMulKernel<Brain, GpuReader<M>>, M>(api, ops, "HashMatMul", {kBfloat16}, kBfloat16, InferMatMul);
  Add<gpu::GatherKernel<int32_t, GpuReader<M>>, M>(api, ops, "HashGather", {kInt32}, kFloat, InferGather);
  Add<gpu::GatherKernel<int64_t, GpuReader<M>>, M>(api, ops, "HashGather", {kInt64}, kFloat, InferGather);
  Add<gpu::DecodeKernel<GpuReader<M>>, M>(api, ops, "HashDecode", {}, kFloat, InferDecode);
}

}  // namespace

void AddGpuOps(const Api& api, std::deque<CustomOp>& ops) {
  AddForMemory<float>(api, ops);
  AddForMemory<Half>(api, ops);
  AddForMemory<int8_t>(api, ops);
}

}  // namespace onnxcomp::hash
