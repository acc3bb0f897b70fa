// Products of rows of activations with one weight on the CPU: rotation, rounding, tasks.
//
// Rows of x and of y may be anywhere in their tensors: experts read the tokens that chose them.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "common/float16.h"
#include "common/parallel.h"
#include "common/weight_op.h"
#include "hyper/kernel.h"

namespace onnxcomp::hyper {
namespace {

// Weights decoded or multiplied by one task, roughly: some ten microseconds of work.
constexpr int64_t kTaskWork = int64_t{1} << 18;
// A product of fewer weights is one task: to wake a thread takes as long.
constexpr int64_t kUndivided = int64_t{1} << 19;
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

// Which row of a tensor is the i-th of a product: `order[i]`, or i where there is no order.
struct RowOrder {
  const int64_t* order = nullptr;

  int64_t operator[](int64_t i) const { return order == nullptr ? i : order[i]; }
};

// Rotates rows of x and lays them out as Activations, on all threads.
template <class T>
class Prepared {
 public:
  Prepared(const Isa& isa, const Format& format, const Layout& layout, const T* x, RowOrder order,
           int64_t rows, bool int8)
      : isa_(isa),
        format_(format),
        layout_(layout),
        x_(x),
        order_(order),
        rows_(rows),
        int8_(int8) {
    const int64_t elements = rows * format.padded();
    const int64_t units = rows * format.groups;
    if (int8) {
      static_assert(sizeof(float) == 4 && sizeof(bool) == 1);
      scratch_.Reserve(elements + 9 * units);
      codes_ = scratch_.As<int8_t>(0);
      scales_ = scratch_.As<float>(elements);  // whole groups: a multiple of 32 bytes
      biases_ = scratch_.As<int32_t>(elements + 4 * units);
      calm_ = scratch_.As<bool>(elements + 8 * units);
    } else {
      scratch_.Reserve(elements * static_cast<int64_t>(sizeof(float)));
      values_ = scratch_.As<float>(0);
    }
  }

  // Independent pieces of work: one group of the rows of one tile each.
  int64_t pieces() const { return CeilDiv(rows_, isa_.tile) * format_.groups; }

  Activations view() const {
    return {rows_,  format_.groups, format_.group, isa_.tile,
            codes_, scales_,        biases_,       values_,   calm_};
  }

  void Run(int64_t piece) const {
    const int64_t g = piece % format_.groups;
    const int64_t first = piece / format_.groups * isa_.tile;
    const int count = static_cast<int>(std::min<int64_t>(isa_.tile, rows_ - first));
    const int64_t unit = g * rows_ + first;
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
    const T* x = x_ + order_[row] * format_.length + begin;
    if constexpr (std::is_same_v<T, float>) {
      if (width == format_.group) return isa_.rotate(x, out, format_.group);
    }
    Load(isa_, x, width, out);
    std::fill(out + width, out + format_.group, 0.0f);
    isa_.rotate(out, out, format_.group);
  }

  void PlaceExact(const float* rotated, int64_t unit, int count) const {
    float* out = values_ + unit * format_.group;
    for (int t = 0; t < format_.group; ++t) {
      for (int i = 0; i < count; ++i) *out++ = rotated[i * format_.group + t];
    }
  }

  void PlaceInt8(const float* rotated, int64_t unit, int count) const {
    const int group = format_.group;
    int8_t codes[kMaxTile * kMaxGroup];
    for (int i = 0; i < count; ++i) {
      int32_t sum = 0;
      scales_[unit + i] = isa_.quantize(rotated + i * group, group, codes + i * group, &sum);
      biases_[unit + i] = layout_.bias * sum;
    }
    int8_t* placed = codes_ + unit * group;
    isa_.place(codes, count, group, layout_, placed);
    if (layout_.calm) calm_[unit] = isa_.calm(placed, count, group);
  }

  const Isa& isa_;
  const Format& format_;
  const Layout& layout_;
  const T* x_;
  RowOrder order_;
  int64_t rows_;
  bool int8_;
  ThreadScratch scratch_;
  int8_t* codes_ = nullptr;
  float* scales_ = nullptr;
  int32_t* biases_ = nullptr;
  bool* calm_ = nullptr;
  float* values_ = nullptr;
};

// y (rows, out) = x W^T over a grid of tasks: pairs of panels times blocks of activation rows.
template <class T>
class Product {
 public:
  Product(const Isa& isa, const Weight& weight, const Activations& x, bool int8, T* y,
          RowOrder order)
      : isa_(isa),
        weight_(weight),
        x_(x),
        call_(int8 ? isa.product_int8 : isa.product_exact),
        y_(y),
        order_(order) {
    const Format& format = weight.format;
    row_blocks_ = CeilDiv(x.rows, kRowBlock);
    const int64_t work = 2 * kLanes * format.padded() * std::min<int64_t>(x.rows, kRowBlock);
    pairs_ = std::clamp<int64_t>(kTaskWork / std::max<int64_t>(work, 1), 1, 64);
    const int64_t pairs = CeilDiv(format.panels, 2);
    if (pairs * work <= kUndivided) pairs_ = std::max<int64_t>(pairs, 1);
    panel_blocks_ = CeilDiv(pairs, pairs_);
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
  T* Row(int64_t row, int64_t column) const {
    return y_ + order_[row] * weight_.format.rows + column;
  }

  // Asks for the lines that `Write` will fill.
  void Fetch(int64_t column, int64_t first, int64_t rows) const {
    for (int64_t m = first; m < first + rows; ++m) {
      const T* y = Row(m, column);
      __builtin_prefetch(y, 1, 2);
      __builtin_prefetch(y + kLanes, 1, 2);
    }
  }

  void Write(const float* out, int64_t column, int64_t lanes, int64_t first, int64_t rows) const {
    const int64_t width = std::min(lanes, weight_.format.rows - column);
    if (width == 2 * kLanes) {  // a constant size spares a call for every row
      for (int64_t m = first; m < first + rows; ++m, out += 2 * kLanes) {
        Store(isa_, out, 2 * kLanes, Row(m, column));
      }
      return;
    }
    for (int64_t m = first; m < first + rows; ++m, out += 2 * kLanes) {
      Store(isa_, out, width, Row(m, column));
    }
  }

  const Isa& isa_;
  const Weight& weight_;
  const Activations& x_;
  decltype(Isa::product_int8) call_;
  T* y_;
  RowOrder order_;
  int64_t row_blocks_;
  int64_t panel_blocks_;
  int64_t pairs_;
};

// Rows of y = the same rows of x W^T, on the threads of the session.
template <class T>
void Multiply(const Api& api, OrtKernelContext* context, const Isa& any, const Weight& weight,
              const Layout& layout, bool int8, const T* x, RowOrder from, int64_t rows, T* y,
              RowOrder to) {
  const bool many = int8 && rows >= kManyRows && any.many_rows != nullptr;
  const Isa& isa = many ? *any.many_rows : any;  // positions are the same
  const Prepared<T> prepared(isa, weight.format, layout, x, from, rows, int8);
  const int64_t per_task = kTaskWork / (isa.tile * weight.format.group * 8);
  ParallelPieces(api, context, prepared.pieces(), per_task,
                 [&](int64_t piece) { prepared.Run(piece); });
  const Activations view = prepared.view();
  const Product<T> product(isa, weight, view, int8, y, to);
  ParallelFor(api, context, product.tasks(), product);
}

}  // namespace
}  // namespace onnxcomp::hyper
