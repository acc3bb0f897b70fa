// HashMatMul, HashGather and HashDecode for CUDAExecutionProvider: nodes to calls of the C
// functions.
//
// Attribute 'precision' makes no difference here; see hyper/gpu_ops.cc. Scale and map, eight
// numbers, lie in the memory of the CPU, where shapes are, because they decide which kernel runs.

#include "common/weight_op.h"
#include "gpu/session.h"
#include "hash/kernel.h"

namespace onnxcomp::hash {
namespace {

// A weight whose memory and codes lie on the GPU.
template <class M>
class GpuReader {
 public:
  GpuReader(const NodeInfo& node, size_t first)
      : reader_(node, first, kMemoryOf<M>, /*readable=*/false) {}

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

template <class T, class M>
class GpuMatMul : public Kernel {
 public:
  explicit GpuMatMul(const NodeInfo& node) : api_(node.api()), reader_(node, 1), memory_(node) {
    CheckPrecision(ReadInt8<T>(node), kMemoryOf<M>);
  }

  void Compute(OrtKernelContext* context) const override {
    const OrtValue* x = InputOf(api_, context, 0);
    Dims dims = DimsOf(api_, x);
    CheckLastDim(dims, reader_.length());
    const OnnxcompHashWeight weight = reader_.Read(context);
    dims.back() = reader_.rows();
    T* y = OutputOf<T>(api_, context, dims);
    dims.pop_back();
    const int64_t batch = Count(dims);
    size_t bytes = 0;
    gpu::CheckCall(onnxcomp_cuda_hash_scratch(&weight, batch, kTypeOf<T>, &bytes));
    memory_.With(context, bytes, [&](void* scratch) {
      gpu::CheckCall(onnxcomp_cuda_hash_matmul(&weight, DataOf<T>(api_, x), y, batch, kTypeOf<T>,
                                               scratch, bytes, gpu::StreamOf(api_, context)));
    });
  }

 private:
  Api api_;
  GpuReader<M> reader_;
  gpu::Memory memory_;
};

template <class Index, class M>
class GpuGather : public Kernel {
 public:
  explicit GpuGather(const NodeInfo& node) : api_(node.api()), reader_(node, 1) {}

  void Compute(OrtKernelContext* context) const override {
    const OrtValue* indices = InputOf(api_, context, 0);
    Dims dims = DimsOf(api_, indices);
    const int64_t count = Count(dims);
    const OnnxcompHashWeight weight = reader_.Read(context);
    dims.push_back(reader_.length());
    auto* y = OutputOf<float>(api_, context, dims);
    gpu::CheckCall(onnxcomp_cuda_hash_gather(&weight, DataOf<Index>(api_, indices), sizeof(Index),
                                             count, y, gpu::StreamOf(api_, context)));
  }

 private:
  Api api_;
  GpuReader<M> reader_;
};

template <class M>
class GpuDecode : public Kernel {
 public:
  explicit GpuDecode(const NodeInfo& node) : api_(node.api()), reader_(node, 0) {}

  void Compute(OrtKernelContext* context) const override {
    const OnnxcompHashWeight weight = reader_.Read(context);
    auto* w = OutputOf<float>(api_, context, {weight.rows, weight.length});
    gpu::CheckCall(onnxcomp_cuda_hash_decode(&weight, w, kFloat, gpu::StreamOf(api_, context)));
  }

 private:
  Api api_;
  GpuReader<M> reader_;
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
  Add<GpuMatMul<float, M>, M>(api, ops, "HashMatMul", {kFloat}, kFloat, InferMatMul);
  Add<GpuMatMul<Half, M>, M>(api, ops, "HashMatMul", {kFloat16}, kFloat16, InferMatMul);
  Add<GpuMatMul<Brain, M>, M>(api, ops, "HashMatMul", {kBfloat16}, kBfloat16, InferMatMul);
  Add<GpuGather<int32_t, M>, M>(api, ops, "HashGather", {kInt32}, kFloat, InferGather);
  Add<GpuGather<int64_t, M>, M>(api, ops, "HashGather", {kInt64}, kFloat, InferGather);
  Add<GpuDecode<M>, M>(api, ops, "HashDecode", {}, kFloat, InferDecode);
}

}  // namespace

void AddGpuOps(const Api& api, std::deque<CustomOp>& ops) {
  AddForMemory<float>(api, ops);
  AddForMemory<Half>(api, ops);
  AddForMemory<int8_t>(api, ops);
}

}  // namespace onnxcomp::hash
