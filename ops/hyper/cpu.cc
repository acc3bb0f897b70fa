// HyperMatMul, HyperGather and HyperDecode for the CPU provider; spec.md defines them.

#include "hyper/kernel.h"

#include <algorithm>

#include "common/parallel.h"
#include "common/weight_op.h"
#include "hyper/row_products.h"

namespace onnxcomp::hyper {
namespace {

template <class T>
class MatMulKernel : public Kernel {
 public:
  explicit MatMulKernel(const NodeInfo& node)
      : api_(node.api()), reader_(node, 1), isa_(SelectIsa()) {
    int8_ = ReadInt8<T>(node);
    if (reader_.constant()) layout_ = LayoutOf(isa_, reader_.Known());
  }

  void Compute(OrtKernelContext* context) const override {
    const OrtValue* x = InputOf(api_, context, 0);
    Dims dims = DimsOf(api_, x);
    CheckLastDim(dims, reader_.length());
    const Weight weight = reader_.Read(context);
    dims.back() = reader_.rows();
    T* y = OutputOf<T>(api_, context, dims);
    dims.pop_back();
    const int64_t rows = Count(dims);
    const T* data = DataOf<T>(api_, x);
    for (int64_t first = 0; first < rows; first += kBatchBlock) {
      const int64_t count = std::min(kBatchBlock, rows - first);
      Run(context, weight, data + first * reader_.length(), count, y + first * reader_.rows());
    }
  }

 private:
  void Run(OrtKernelContext* context, const Weight& weight, const T* x, int64_t rows, T* y) const {
    const Layout found = reader_.constant() ? Layout{} : LayoutOf(isa_, weight);
    const Layout& layout = reader_.constant() ? layout_ : found;
    Multiply<T>(api_, context, isa_, weight, layout, int8_, x, {}, rows, y, {});
  }

  Api api_;
  WeightReader reader_;
  const Isa& isa_;
  Layout layout_{};  // where the weight is constant
  bool int8_ = false;
};

template <class Index>
class GatherKernel : public Kernel {
 public:
  explicit GatherKernel(const NodeInfo& node)
      : api_(node.api()), reader_(node, 1), isa_(SelectIsa()) {
    CheckColumns(node, reader_.length());
  }

  void Compute(OrtKernelContext* context) const override {
    const OrtValue* indices = InputOf(api_, context, 0);
    Dims dims = DimsOf(api_, indices);
    const int64_t count = Count(dims);
    const Index* data = DataOf<Index>(api_, indices);
    CheckIndices(data, count, reader_.rows());
    const Weight weight = reader_.Read(context);
    dims.push_back(reader_.length());
    float* y = OutputOf<float>(api_, context, dims);
    ParallelPieces(api_, context, count, kTaskWork / 8 / weight.format.padded(), [&](int64_t i) {
      const int64_t row = data[i] < 0 ? data[i] + reader_.rows() : data[i];
      Row(weight, row, y + i * reader_.length());
    });
  }

 private:
  void Row(const Weight& weight, int64_t row, float* out) const {
    const Format& format = weight.format;
    for (int64_t g = 0; g < format.groups; ++g) {
      const int64_t left = format.length - g * format.group;
      const int width = static_cast<int>(std::min<int64_t>(format.group, left));
      isa_.decode_row(weight, row, g, width, out + g * format.group);
    }
  }

  Api api_;
  WeightReader reader_;
  const Isa& isa_;
};

class DecodeKernel : public Kernel {
 public:
  explicit DecodeKernel(const NodeInfo& node)
      : api_(node.api()), reader_(node, 0), isa_(SelectIsa()) {}

  void Compute(OrtKernelContext* context) const override {
    const Weight weight = reader_.Read(context);
    const Format& format = weight.format;
    float* w = OutputOf<float>(api_, context, {format.rows, format.length});
    ParallelPieces(api_, context, format.panels * format.groups,
                   kTaskWork / 4 / (kLanes * format.group),
                   [&](int64_t i) { Block(weight, i / format.groups, i % format.groups, w); });
  }

 private:
  void Block(const Weight& weight, int64_t panel, int64_t group, float* w) const {
    const Format& format = weight.format;
    const int64_t row = panel * kLanes;
    const int64_t column = group * format.group;
    const int count = static_cast<int>(std::min<int64_t>(kLanes, format.rows - row));
    const int width = static_cast<int>(std::min<int64_t>(format.group, format.length - column));
    float* out = w + row * format.length + column;
    isa_.decode_panel(weight, panel, group, count, width, out, format.length);
  }

  Api api_;
  WeightReader reader_;
  const Isa& isa_;
};

template <class T>
void AddMatMul(const Api& api, std::deque<CustomOp>& ops) {
  ops.emplace_back(api, "HyperMatMul", WithWeight({kTypeOf<T>}), kTypeOf<T>,
                   Make<MatMulKernel<T>>, InferMatMul);
}

template <class Index>
void AddGather(const Api& api, std::deque<CustomOp>& ops) {
  ops.emplace_back(api, "HyperGather", WithWeight({kTypeOf<Index>}), kFloat,
                   Make<GatherKernel<Index>>, InferGather);
}

}  // namespace

void AddOps(const Api& api, std::deque<CustomOp>& ops) {
  AddMatMul<float>(api, ops);
  AddMatMul<Half>(api, ops);
  AddMatMul<Brain>(api, ops);
  AddGather<int32_t>(api, ops);
  AddGather<int64_t>(api, ops);
  ops.emplace_back(api, "HyperDecode", WithWeight({}), kFloat, Make<DecodeKernel>, InferDecode);
  AddExperts(api, ops);
}

}  // namespace onnxcomp::hyper
