// HyperMatMul, HyperGather and HyperDecode for the CPU provider; spec.md defines them.

#include "hyper/kernel.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "common/float16.h"
#include "common/parallel.h"
#include "common/weight_op.h"

namespace onnxcomp::hyper {
namespace {

// Weights decoded or multiplied by one task, roughly: some ten microseconds of work.
constexpr int64_t kTaskWork = int64_t{1} << 18;
// Rows of activations that are prepared at once, which bounds the scratch memory.
constexpr int64_t kBatchBlock = 8 * kRowBlock;

// Between the type of x and y and float32.
inline void Load(const Isa&, const float* x, int64_t count, float* out) {
  std::memcpy(out, x, static_cast<size_t>(count) * sizeof(float));
}
inline void Load(const Isa& isa, const Half* x, int64_t count, float* out) {
  isa.from_half(&x->bits, count, out);
}
inline void Load(const Isa&, const Brain* x, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = BfloatToFloat(x[i].bits);
}
inline void Store(const Isa&, const float* values, int64_t count, float* y) {
  std::memcpy(y, values, static_cast<size_t>(count) * sizeof(float));
}
inline void Store(const Isa& isa, const float* values, int64_t count, Half* y) {
  isa.to_half(values, count, &y->bits);
}
inline void Store(const Isa&, const float* values, int64_t count, Brain* y) {
  for (int64_t i = 0; i < count; ++i) y[i].bits = FloatToBfloat(values[i]);
}

// Rotates rows of x and lays them out as Activations, on all threads.
template <class T>
class Prepared {
 public:
  Prepared(const Isa& isa, const Format& format, const T* x, int64_t rows, bool int8)
      : isa_(isa),
        format_(format),
        x_(x),
        rows_(rows),
        int8_(int8),
        codes_(int8 ? rows * format.padded() : 0),
        scales_(int8 ? rows * format.groups : 0),
        biases_(int8 ? rows * format.groups : 0),
        values_(int8 ? 0 : rows * format.padded()) {
    for (int t = 0; t < format.group; ++t) {
      positions_[t] = static_cast<int16_t>(isa.position(format, t));
      permuted_ = permuted_ || positions_[t] != t;
    }
  }

  // Independent pieces of work: one group of the rows of one tile each.
  int64_t pieces() const { return CeilDiv(rows_, isa_.tile) * format_.groups; }

  Activations view() const {
    return {rows_,         format_.groups, format_.group,  isa_.tile,
            codes_.get(), scales_.get(),  biases_.get(), values_.get()};
  }

  void Run(int64_t piece) const {
    const int64_t g = piece % format_.groups;
    const int64_t first = piece / format_.groups * isa_.tile;
    const int count = static_cast<int>(std::min<int64_t>(isa_.tile, rows_ - first));
    const int64_t unit = first * format_.groups + g * count;
    alignas(64) float rotated[kMaxTile * kMaxGroup];
    for (int i = 0; i < count; ++i) Rotate(first + i, g, rotated + i * format_.group);
    if (int8_) {
      PlaceInt8(rotated, unit, count);
    } else {
      PlaceExact(rotated, unit, count);
    }
  }

 private:
  // Group g of one row, rotated; what lies beyond the row's end counts as zeros.
  void Rotate(int64_t row, int64_t g, float* out) const {
    const int64_t begin = g * format_.group;
    const int64_t width = std::min<int64_t>(format_.group, format_.length - begin);
    const T* x = x_ + row * format_.length + begin;
    if constexpr (std::is_same_v<T, float>) {
      if (width == format_.group) return isa_.rotate(x, out, format_.group);
    }
    Load(isa_, x, width, out);
    std::fill(out + width, out + format_.group, 0.0f);
    isa_.rotate(out, out, format_.group);
  }

  void PlaceExact(const float* rotated, int64_t unit, int count) const {
    float* out = values_.get() + unit * format_.group;
    for (int t = 0; t < format_.group; ++t) {
      for (int i = 0; i < count; ++i) *out++ = rotated[i * format_.group + t];
    }
  }

  void PlaceInt8(const float* rotated, int64_t unit, int count) const {
    const int group = format_.group;
    int8_t codes[kMaxTile * kMaxGroup];
    for (int i = 0; i < count; ++i) {
      int8_t* row = codes + i * group;
      int32_t sum = 0;
      scales_.get()[unit + i] = isa_.quantize(rotated + i * group, group, row, &sum);
      biases_.get()[unit + i] = -128 * sum;
      if (permuted_) Permute(row);
    }
    int8_t* out = codes_.get() + unit * group;
    switch (count) {
      case 1: std::memcpy(out, codes, static_cast<size_t>(group)); break;
      case kMaxTile: Interleave(codes, group, std::integral_constant<int, kMaxTile>(), out); break;
      default: Interleave(codes, group, count, out); break;
    }
  }

  // Four codes of each of `count` rows in turn; a constant count lets the compiler unroll.
  template <class Count>
  static void Interleave(const int8_t* codes, int group, Count count, int8_t* out) {
    for (int t = 0; t < group; t += 4, out += 4 * count) {
      for (int i = 0; i < count; ++i) std::memcpy(out + 4 * i, codes + i * group + t, 4);
    }
  }

  void Permute(int8_t* row) const {
    int8_t moved[kMaxGroup];
    for (int t = 0; t < format_.group; ++t) moved[positions_[t]] = row[t];
    std::memcpy(row, moved, static_cast<size_t>(format_.group));
  }

  const Isa& isa_;
  const Format& format_;
  const T* x_;
  int64_t rows_;
  bool int8_;
  Scratch<int8_t> codes_;
  Scratch<float> scales_;
  Scratch<int32_t> biases_;
  Scratch<float> values_;
  bool permuted_ = false;
  int16_t positions_[kMaxGroup];
};

// y (rows, out) = x W^T over a grid of tasks: pairs of panels times blocks of activation rows.
template <class T>
class Product {
 public:
  Product(const Isa& isa, const Weight& weight, const Activations& x, bool int8, T* y)
      : isa_(isa),
        weight_(weight),
        x_(x),
        call_(int8 ? isa.product_int8 : isa.product_exact),
        y_(y) {
    const Format& format = weight.format;
    row_blocks_ = CeilDiv(x.rows, kRowBlock);
    const int64_t work = 2 * kLanes * format.padded() * std::min<int64_t>(x.rows, kRowBlock);
    pairs_ = std::clamp<int64_t>(kTaskWork / std::max<int64_t>(work, 1), 1, 64);
    panel_blocks_ = CeilDiv(format.panels, 2 * pairs_);
  }

  size_t tasks() const { return static_cast<size_t>(panel_blocks_ * row_blocks_); }

  void operator()(size_t task) const {
    const int64_t block = static_cast<int64_t>(task) % panel_blocks_;
    const int64_t first = static_cast<int64_t>(task) / panel_blocks_ * kRowBlock;
    const int64_t rows = std::min<int64_t>(kRowBlock, x_.rows - first);
    const int64_t end = std::min((block + 1) * 2 * pairs_, weight_.format.panels);
    for (int64_t panel = block * 2 * pairs_; panel < end; panel += 2) {
      alignas(64) float out[kRowBlock * 2 * kLanes];
      const int panels = static_cast<int>(std::min<int64_t>(2, end - panel));
      if (rows > 4) Fetch(panel * kLanes, first, rows);
      call_(weight_, x_, panel, panels, first, rows, out);
      Write(out, panel * kLanes, panels * kLanes, first, rows);
    }
  }

 private:
  // Asks for the lines that `Write` will fill.
  void Fetch(int64_t column, int64_t first, int64_t rows) const {
    const T* y = y_ + first * weight_.format.rows + column;
    for (int64_t m = 0; m < rows; ++m, y += weight_.format.rows) {
      __builtin_prefetch(y, 1, 2);
      __builtin_prefetch(y + kLanes, 1, 2);
    }
  }

  void Write(const float* out, int64_t column, int64_t lanes, int64_t first, int64_t rows) const {
    const int64_t width = std::min(lanes, weight_.format.rows - column);
    T* y = y_ + first * weight_.format.rows + column;
    if (width == 2 * kLanes) {  // a constant size spares a call for every row
      for (int64_t m = 0; m < rows; ++m, out += 2 * kLanes, y += weight_.format.rows) {
        Store(isa_, out, 2 * kLanes, y);
      }
      return;
    }
    for (int64_t m = 0; m < rows; ++m, out += 2 * kLanes, y += weight_.format.rows) {
      Store(isa_, out, width, y);
    }
  }

  const Isa& isa_;
  const Weight& weight_;
  const Activations& x_;
  decltype(Isa::product_int8) call_;
  T* y_;
  int64_t row_blocks_;
  int64_t panel_blocks_;
  int64_t pairs_;
};

template <class T>
class MatMulKernel : public Kernel {
 public:
  explicit MatMulKernel(const NodeInfo& node)
      : api_(node.api()), reader_(node, 1), isa_(SelectIsa()) {
    int8_ = ReadInt8<T>(node);
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
    const Format& format = weight.format;
    const Prepared<T> prepared(isa_, format, x, rows, int8_);
    const int64_t per_task = kTaskWork / (isa_.tile * format.group * 8);
    ParallelPieces(api_, context, prepared.pieces(), per_task,
                   [&](int64_t piece) { prepared.Run(piece); });
    const Activations view = prepared.view();
    const Product<T> product(isa_, weight, view, int8_, y);
    ParallelFor(api_, context, product.tasks(), product);
  }

  Api api_;
  WeightReader reader_;
  const Isa& isa_;
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
}

}  // namespace onnxcomp::hyper
