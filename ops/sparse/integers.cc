// SparseIntMatMul and SparseIntDecode for the CPU provider; spec.md defines them.

#include <algorithm>

#include "common/convert.h"
#include "common/parallel.h"
#include "common/weight_op.h"
#include "hyper/format.h"
#include "sparse/format.h"
#include "sparse/kernel.h"

namespace onnxcomp::sparse {
namespace {

// Weights decoded or multiplied by one task, roughly: some ten microseconds of work.
constexpr int64_t kTaskWork = int64_t{1} << 18;
// Rows of activations for which a row of the weight is made dense once.
constexpr int64_t kBatch = 64;

// Rows of x laid out as Activations.
template <class T>
class Prepared {
 public:
  Prepared(const Isa& isa, const IntFormat& format, const T* x, int64_t rows, bool int8)
      : rounding_(hyper::SelectIsa()),
        flip_(isa.flip),
        format_(format),
        x_(x),
        int8_(int8),
        codes_(int8 ? rows * format.padded : 0),
        scales_(int8 ? rows * format.groups + kLanes : 0),
        values_(int8 ? 0 : rows * format.padded) {
    if (int8) std::fill_n(scales_.get() + rows * format.groups, kLanes, 0.0f);
  }

  Activations view() const {
    return {format_.groups, format_.group, codes_.get(), scales_.get(), values_.get()};
  }

  void Run(int64_t row) const {
    for (int64_t g = 0; g < format_.groups; ++g) {
      alignas(64) float group[kMostGroup];
      float* out = int8_ ? group : values_.get() + row * format_.padded + g * format_.group;
      Load(row, g, out);
      if (!int8_) continue;
      int32_t sum = 0;  // not needed here
      int8_t* codes = codes_.get() + row * format_.padded + g * format_.group;
      scales_.get()[row * format_.groups + g] =
          rounding_.quantize(out, format_.group, codes, &sum);
      for (int t = 0; t < format_.group; ++t) codes[t] ^= flip_;
    }
  }

 private:
  void Load(int64_t row, int64_t g, float* out) const {
    const int64_t begin = g * format_.group;
    const int64_t width = std::min<int64_t>(format_.group, format_.length - begin);
    const T* x = x_ + row * format_.length + begin;
    for (int64_t t = 0; t < width; ++t) out[t] = ToFloat(x[t]);
    std::fill(out + width, out + format_.group, 0.0f);
  }

  const hyper::Isa& rounding_;  // all families round activations alike
  int8_t flip_;
  const IntFormat& format_;
  const T* x_;
  bool int8_;
  Scratch<int8_t> codes_;
  Scratch<float> scales_;
  Scratch<float> values_;
};

template <class T>
class MatMulKernel : public Kernel {
 public:
  explicit MatMulKernel(const NodeInfo& node)
      : api_(node.api()), reader_(node, 1), isa_(SelectIsa()), int8_(ReadInt8<T>(node)) {}

  void Compute(OrtKernelContext* context) const override {
    const IntFormat& format = reader_.format();
    const OrtValue* x = InputOf(api_, context, 0);
    Dims dims = DimsOf(api_, x);
    CheckLastDim(dims, format.length);
    std::vector<int64_t> own;
    const IntWeight weight = reader_.Read(context, own);
    dims.back() = format.rows;
    T* y = OutputOf<T>(api_, context, dims);
    dims.pop_back();
    const int64_t rows = Count(dims);
    const T* data = DataOf<T>(api_, x);
    for (int64_t first = 0; first < rows; first += kBatch) {
      const int64_t count = std::min(kBatch, rows - first);
      Run(context, weight, data + first * format.length, count, y + first * format.rows);
    }
  }

 private:
  void Run(OrtKernelContext* context, const IntWeight& weight, const T* x, int64_t count,
           T* y) const {
    const IntFormat& format = reader_.format();
    const Prepared<T> prepared(isa_, format, x, count, int8_);
    ParallelPieces(api_, context, count, kTaskWork / 8 / format.padded,
                   [&](int64_t row) { prepared.Run(row); });
    const Activations view = prepared.view();
    const auto call = int8_ ? isa_.product_int8 : isa_.product_exact;
    const int64_t work = format.padded * std::min<int64_t>(count, 16);
    const int64_t per_task = std::max<int64_t>(1, kTaskWork / work);
    ParallelFor(api_, context, static_cast<size_t>(CeilDiv(format.rows, per_task)), [&](size_t i) {
      const RowMaker maker(isa_, format, weight);
      const int64_t begin = static_cast<int64_t>(i) * per_task;
      for (int64_t row = begin; row < std::min(begin + per_task, format.rows); ++row) {
        float out[kBatch];
        call({maker.Codes(row), maker.Scales(row)}, view, count, out);
        for (int64_t m = 0; m < count; ++m) FromFloat(out[m], y + m * format.rows + row);
      }
    });
  }

  Api api_;
  IntReader reader_;
  const Isa& isa_;
  bool int8_;
};

class DecodeKernel : public Kernel {
 public:
  explicit DecodeKernel(const NodeInfo& node)
      : api_(node.api()), reader_(node, 0), isa_(SelectIsa()) {}

  void Compute(OrtKernelContext* context) const override {
    const IntFormat& format = reader_.format();
    std::vector<int64_t> own;
    const IntWeight weight = reader_.Read(context, own);
    float* w = OutputOf<float>(api_, context, {format.rows, format.length});
    const int64_t per_task = std::max<int64_t>(1, kTaskWork / 4 / format.padded);
    ParallelFor(api_, context, static_cast<size_t>(CeilDiv(format.rows, per_task)), [&](size_t i) {
      const RowMaker maker(isa_, format, weight);
      const int64_t begin = static_cast<int64_t>(i) * per_task;
      for (int64_t row = begin; row < std::min(begin + per_task, format.rows); ++row) {
        Write(maker.Codes(row), maker.Scales(row), w + row * format.length);
      }
    });
  }

 private:
  void Write(const int8_t* codes, const float* scales, float* out) const {
    const IntFormat& format = reader_.format();
    for (int64_t t = 0; t < format.length; ++t) {
      out[t] = static_cast<float>(codes[t]) * scales[t / format.group];
    }
  }

  Api api_;
  IntReader reader_;
  const Isa& isa_;
};

// Element types of a node's inputs from the mask on: mask, codes, scales, then what only the portable
// body reads.
std::vector<int> WithWeight(std::vector<int> inputs) {
  inputs.insert(inputs.end(), {kUint8, kUint8, kFloat16, kUint8, kInt32, kInt32, kInt64, kInt64});
  return inputs;
}

template <class T>
void AddMatMul(const Api& api, std::deque<CustomOp>& ops) {
  ops.emplace_back(api, "SparseIntMatMul", WithWeight({kTypeOf<T>}), kTypeOf<T>,
                   Make<MatMulKernel<T>>, InferMatMul);
}

}  // namespace

void AddIntOps(const Api& api, std::deque<CustomOp>& ops) {
  AddMatMul<float>(api, ops);
  AddMatMul<Half>(api, ops);
  AddMatMul<Brain>(api, ops);
  ops.emplace_back(api, "SparseIntDecode", WithWeight({}), kFloat, Make<DecodeKernel>, InferDecode);
}

}  // namespace onnxcomp::sparse
