// HashMatMul, HashGather and HashDecode for the CPU provider; spec.md defines them.

#include <algorithm>
#include <cstring>

#include "common/convert.h"
#include "common/parallel.h"
#include "common/weight_op.h"
#include "hash/kernel.h"
#include "hash/places.h"
#include "hyper/format.h"

namespace onnxcomp::hash {
namespace {

// Weights decoded or multiplied by one task, roughly: some ten microseconds of work.
constexpr int64_t kTaskWork = int64_t{1} << 18;
// Rows of activations that are prepared at once, which bounds the scratch memory.
constexpr int64_t kBatchBlock = 8 * kRowBlock;

// Rows of x laid out as Activations, on all threads.
template <class T>
class Prepared {
 public:
  Prepared(const Isa& isa, const Weight& weight, const T* x, int64_t rows, bool int8)
      : rounding_(hyper::SelectIsa()),
        length_(weight.length),
        spans_(CeilDiv(weight.blocks, kSpan)),
        tile_(isa.tile),
        x_(x),
        rows_(rows),
        int8_(int8),
        dot_(int8 && isa.dot && weight.chunk == kTile),
        copies_(rows <= kStreamRows ? 2 : 1),
        values_(dot_ ? 0 : copies_ * size()),
        codes_(dot_ ? copies_ * size() : 0),
        scales_(int8 ? rows * spans_ : 0),
        sums_(dot_ ? rows * spans_ * kSpan : 0) {}

  int64_t pieces() const { return CeilDiv(rows_, tile_) * spans_; }

  Activations view() const {
    return {rows_,         spans_,       tile_,         size(),
            values_.get(), codes_.get(), scales_.get(), sums_.get()};
  }

  void Run(int64_t piece) const {
    const int64_t span = piece % spans_;
    const int64_t first = piece / spans_ * tile_;
    const int count = static_cast<int>(std::min<int64_t>(tile_, rows_ - first));
    const int64_t unit = first * spans_ + span * count;
    for (int i = 0; i < count; ++i) {
      alignas(64) float row[kGroup];
      alignas(64) int8_t codes[kGroup];
      LoadSpan(x_ + (first + i) * length_, span, row);
      if (int8_) {
        int32_t sum = 0;  // of the whole span; signs need those of its blocks
        scales_.get()[unit + i] = rounding_.quantize(row, kGroup, codes, &sum);
      }
      if (dot_) {
        PlaceCodes(codes, unit, i, count);
        continue;
      }
      float* values = values_.get() + unit * kGroup + i;
      int8_ ? PlaceValues(codes, values, count) : PlaceValues(row, values, count);
    }
  }

 private:
  int64_t size() const { return rows_ * spans_ * kGroup; }

  void LoadSpan(const T* row, int64_t span, float* out) const {
    const int64_t begin = span * kGroup;
    const int64_t width = std::min<int64_t>(kGroup, length_ - begin);
    for (int64_t t = 0; t < width; ++t) out[t] = ToFloat(row[begin + t]);
    std::fill(out + width, out + kGroup, 0.0f);
  }

  template <class V>
  void PlaceValues(const V* row, float* out, int count) const {
    for (int t = 0; t < kGroup; ++t) out[t * count] = row[t];
    if (copies_ == 1) return;
    for (int t = 0; t < kGroup; ++t) out[size() + t * count] = -static_cast<float>(row[t]);
  }

  void PlaceCodes(const int8_t* row, int64_t unit, int i, int count) const {
    int8_t* out = codes_.get() + unit * kGroup + i * 4;
    int32_t* sums = sums_.get() + (unit + i) * kSpan;
    std::fill(sums, sums + kSpan, 0);
    for (int t = 0; t < kGroup; ++t) {
      const int8_t code = row[t];
      sums[t / kLanes] += code;
      int8_t* place = out + t / 4 * count * 4 + t % 4;
      *place = code;
      if (copies_ == 2) place[size()] = static_cast<int8_t>(-code);
    }
  }

  const hyper::Isa& rounding_;  // both families round activations alike
  int64_t length_;
  int64_t spans_;
  int tile_;
  const T* x_;
  int64_t rows_;
  bool int8_;
  bool dot_;
  int64_t copies_;
  Scratch<float> values_;
  Scratch<int8_t> codes_;
  Scratch<float> scales_;
  Scratch<int32_t> sums_;
};

// y (rows, out) = x W^T over a grid of tasks: pairs of panels times blocks of activation rows.
template <class T>
class Grid {
 public:
  Grid(const Isa& isa, const Weight& weight, const Activations& x, bool int8, T* y)
      : weight_(weight), x_(x), call_(int8 ? isa.product_int8 : isa.product), y_(y) {
    const int64_t work = 2 * kTile * weight.blocks * std::min<int64_t>(x.rows, kRowBlock);
    pairs_ = std::clamp<int64_t>(kTaskWork / std::max<int64_t>(work, 1), 1, 64);
    panel_blocks_ = CeilDiv(weight.panels, 2 * pairs_);
  }

  size_t tasks() const {
    return static_cast<size_t>(panel_blocks_ * CeilDiv(x_.rows, kRowBlock));
  }

  void operator()(size_t task) const {
    const int64_t block = static_cast<int64_t>(task) % panel_blocks_;
    const int64_t first = static_cast<int64_t>(task) / panel_blocks_ * kRowBlock;
    const int64_t rows = std::min<int64_t>(kRowBlock, x_.rows - first);
    const int64_t end = std::min((block + 1) * 2 * pairs_, weight_.panels);
    for (int64_t panel = block * 2 * pairs_; panel < end; panel += 2) {
      alignas(64) float out[kRowBlock * 2 * kLanes];
      const int panels = static_cast<int>(std::min<int64_t>(2, end - panel));
      call_(weight_, x_, panel, panels, first, rows, out);
      Write(out, panel * kLanes, panels * kLanes, first, rows);
    }
  }

 private:
  void Write(const float* out, int64_t column, int64_t lanes, int64_t first, int64_t rows) const {
    const int64_t width = std::min(lanes, weight_.rows - column);
    T* y = y_ + first * weight_.rows + column;
    for (int64_t m = 0; m < rows; ++m, out += 2 * kLanes, y += weight_.rows) {
      for (int64_t i = 0; i < width; ++i) FromFloat(out[i] * weight_.scale, y + i);
    }
  }

  const Weight& weight_;
  const Activations& x_;
  decltype(Isa::product) call_;
  T* y_;
  int64_t panel_blocks_;
  int64_t pairs_;
};

template <class T, class M>
class MatMulKernel : public Kernel {
 public:
  explicit MatMulKernel(const NodeInfo& node)
      : api_(node.api()), reader_(node, 1, kMemoryOf<M>), isa_(SelectIsa()) {
    int8_ = ReadInt8<T>(node);
    CheckPrecision(int8_, kMemoryOf<M>);
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
    const Prepared<T> prepared(isa_, weight, x, rows, int8_);
    const int64_t per_task = kTaskWork / (isa_.tile * kGroup * 8);
    ParallelPieces(api_, context, prepared.pieces(), per_task,
                   [&](int64_t piece) { prepared.Run(piece); });
    const Activations view = prepared.view();
    const Grid<T> grid(isa_, weight, view, int8_, y);
    ParallelFor(api_, context, grid.tasks(), grid);
  }

  Api api_;
  WeightReader reader_;
  const Isa& isa_;
  bool int8_ = false;
};

inline float Widen(const float* x) { return *x; }
inline float Widen(const Half* x) { return HalfToFloat(x->bits); }
inline float Widen(const int8_t* x) { return static_cast<float>(*x); }

template <class Index, class M>
class GatherKernel : public Kernel {
 public:
  explicit GatherKernel(const NodeInfo& node)
      : api_(node.api()), reader_(node, 1, kMemoryOf<M>) {}

  void Compute(OrtKernelContext* context) const override {
    const OrtValue* indices = InputOf(api_, context, 0);
    Dims dims = DimsOf(api_, indices);
    const int64_t count = Count(dims);
    const Index* data = DataOf<Index>(api_, indices);
    CheckIndices(data, count, reader_.rows());
    const Weight weight = reader_.Read(context);
    dims.push_back(reader_.length());
    float* y = OutputOf<float>(api_, context, dims);
    ParallelPieces(api_, context, count, kTaskWork / 8 / weight.length, [&](int64_t i) {
      const int64_t row = data[i] < 0 ? data[i] + reader_.rows() : data[i];
      Row(weight, row, y + i * reader_.length());
    });
  }

 private:
  // The row's lane of every column: one element in sixteen of every tile of its panel.
  static void Row(const Weight& weight, int64_t row, float* out) {
    const int lane = static_cast<int>(row % kLanes);
    const M* memory = static_cast<const M*>(weight.memory);
    for (int64_t block = 0; block < weight.blocks; ++block, out += kLanes) {
      const int64_t width = std::min<int64_t>(kLanes, weight.length - block * kLanes);
      ForParts(weight, row / kLanes, block, [&](int part, int64_t slot, bool minus) {
        const int begin = part * weight.chunk;
        const int end = begin + weight.chunk;
        const int first = lane + (begin - lane + kLanes - 1) / kLanes * kLanes;
        for (int at = std::max(first, lane); at < end && at / kLanes < width; at += kLanes) {
          const float value = Widen(memory + slot * weight.chunk + (at - begin));
          out[at / kLanes] = (minus ? -value : value) * weight.scale;
        }
      });
    }
  }

  Api api_;
  WeightReader reader_;
};

template <class M>
class DecodeKernel : public Kernel {
 public:
  explicit DecodeKernel(const NodeInfo& node)
      : api_(node.api()), reader_(node, 0, kMemoryOf<M>), isa_(SelectIsa()) {}

  void Compute(OrtKernelContext* context) const override {
    const Weight weight = reader_.Read(context);
    float* w = OutputOf<float>(api_, context, {weight.rows, weight.length});
    const int64_t spans = CeilDiv(weight.blocks, kSpan);
    ParallelPieces(api_, context, weight.panels * spans, kTaskWork / 4 / (kGroup * kLanes),
                   [&](int64_t i) { Span(weight, i / spans, i % spans, w); });
  }

 private:
  void Span(const Weight& weight, int64_t panel, int64_t span, float* w) const {
    alignas(64) float columns[kGroup * kLanes];
    const int64_t blocks = std::min<int64_t>(kSpan, weight.blocks - span * kSpan);
    isa_.decode(weight, panel, span * kSpan, static_cast<int>(blocks), columns);
    const int64_t width = std::min<int64_t>(kGroup, weight.length - span * kGroup);
    const int64_t lanes = std::min<int64_t>(kLanes, weight.rows - panel * kLanes);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      float* out = w + (panel * kLanes + lane) * weight.length + span * kGroup;
      for (int64_t t = 0; t < width; ++t) out[t] = columns[t * kLanes + lane] * weight.scale;
    }
  }

  Api api_;
  WeightReader reader_;
  const Isa& isa_;
};

template <class T, class M>
void AddMatMul(const Api& api, std::deque<CustomOp>& ops) {
  ops.emplace_back(api, "HashMatMul", WithWeight({kTypeOf<T>}, kTypeOf<M>), kTypeOf<T>,
                   Make<MatMulKernel<T, M>>, InferMatMul);
}

template <class M>
void AddForMemory(const Api& api, std::deque<CustomOp>& ops) {
  AddMatMul<float, M>(api, ops);
  AddMatMul<Half, M>(api, ops);
  AddMatMul<Brain, M>(api, ops);
  ops.emplace_back(api, "HashGather", WithWeight({kInt32}, kTypeOf<M>), kFloat,
                   Make<GatherKernel<int32_t, M>>, InferGather);
  ops.emplace_back(api, "HashGather", WithWeight({kInt64}, kTypeOf<M>), kFloat,
                   Make<GatherKernel<int64_t, M>>, InferGather);
  ops.emplace_back(api, "HashDecode", WithWeight({}, kTypeOf<M>), kFloat, Make<DecodeKernel<M>>,
                   InferDecode);
}

}  // namespace

void AddOps(const Api& api, std::deque<CustomOp>& ops) {
  AddForMemory<float>(api, ops);
  AddForMemory<Half>(api, ops);
  AddForMemory<int8_t>(api, ops);
}

}  // namespace onnxcomp::hash
