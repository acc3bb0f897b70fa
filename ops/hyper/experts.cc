// HyperExperts for the CPU provider: products with those of many matrices that a run chooses.
//
// Rows of activations are sorted by the matrix that they meet: each chosen matrix is decoded once for
// all of its rows, and the others are not read.

#include <algorithm>
#include <vector>

#include "common/parallel.h"
#include "common/weight_op.h"
#include "hyper/kernel.h"
#include "hyper/row_products.h"

namespace onnxcomp::hyper {
namespace {

// One dim of two shapes that are broadcast; -1 where it is not known.
int64_t Joined(int64_t a, int64_t b) { return a == 1 || (a < 0 && b != 1) ? b : a; }

// Two shapes, aligned at their last dims, as numpy broadcasts them.
Dims Broadcast(const Dims& a, const Dims& b) {
  Dims out(std::max(a.size(), b.size()), 1);
  for (size_t i = 0; i < out.size(); ++i) {
    const int64_t from_a = i < a.size() ? a[a.size() - 1 - i] : 1;
    const int64_t from_b = i < b.size() ? b[b.size() - 1 - i] : 1;
    if (from_a != from_b && from_a != 1 && from_b != 1) {
      Fail("x has the batch ", Text(a), ", experts have shape ", Text(b), ": they do not fit");
    }
    out[out.size() - 1 - i] = Joined(from_a, from_b);
  }
  return out;
}

// Where each element of a broadcast shape lies in the smaller one, counted up in order.
class Places {
 public:
  Places(const Dims& whole, const Dims& part) : whole_(whole), steps_(whole.size(), 0) {
    int64_t step = 1;
    for (size_t i = 0; i < part.size(); ++i) {
      const int64_t dim = part[part.size() - 1 - i];
      if (dim != 1) steps_[whole.size() - 1 - i] = step;
      step *= dim;
    }
    at_.assign(whole.size(), 0);
  }

  int64_t place() const { return place_; }

  void Next() {
    for (size_t i = whole_.size(); i-- > 0;) {
      place_ += steps_[i];
      if (++at_[i] < whole_[i]) return;
      place_ -= steps_[i] * whole_[i];
      at_[i] = 0;
    }
  }

 private:
  Dims whole_;
  Dims steps_;
  Dims at_;
  int64_t place_ = 0;
};

// Rows of x and y in the order of the matrices that they meet.
struct Routes {
  std::vector<int64_t> ends;  // of the rows of each matrix
  std::vector<int64_t> from;
  std::vector<int64_t> to;
};

template <class T, class Index>
class ExpertsKernel : public Kernel {
 public:
  explicit ExpertsKernel(const NodeInfo& node)
      : api_(node.api()), reader_(node, 2), isa_(SelectIsa()) {
    int8_ = ReadInt8<T>(node);
    CheckColumns(node, reader_.length());
    const auto experts = node.Int("experts");
    if (!experts) Fail("attribute 'experts' (int) is missing");
    if (*experts < 1 || reader_.rows() % *experts != 0 ||
        reader_.rows() / *experts % kLanes != 0) {
      Fail("attribute 'experts' is ", *experts, ": ", reader_.rows(),
           " rows are not so many matrices of a multiple of ", kLanes, " rows");
    }
    experts_ = *experts;
    columns_ = reader_.rows() / experts_;
    if (reader_.constant()) layout_ = LayoutOf(isa_, reader_.Known());
  }

  void Compute(OrtKernelContext* context) const override {
    const OrtValue* x = InputOf(api_, context, 0);
    Dims batch = DimsOf(api_, x);
    CheckLastDim(batch, reader_.length());
    batch.pop_back();
    const bool vector = batch.empty();
    const int64_t rows = vector ? 1 : batch.back();
    if (!vector) batch.pop_back();
    const OrtValue* experts = InputOf(api_, context, 1);
    const Dims chosen = DimsOf(api_, experts);
    const Index* indices = DataOf<Index>(api_, experts);
    CheckIndices(indices, Count(chosen), experts_);
    const Dims whole = Broadcast(batch, chosen);
    const Weight weight = reader_.Read(context);
    Dims dims = whole;
    if (!vector) dims.push_back(rows);
    dims.push_back(columns_);
    T* y = OutputOf<T>(api_, context, dims);
    const Routes routes = Sorted(whole, Places(whole, batch), Places(whole, chosen), indices, rows);
    Run(context, weight, DataOf<T>(api_, x), routes, y);
  }

 private:
  int64_t Expert(Index index) const { return index < 0 ? index + experts_ : index; }

  Routes Sorted(const Dims& whole, const Places& x, const Places& experts, const Index* indices,
                int64_t rows) const {
    const int64_t count = Count(whole);
    std::vector<int64_t> next(static_cast<size_t>(experts_) + 1, 0);
    Places expert = experts;
    for (int64_t i = 0; i < count; ++i, expert.Next()) {
      next[static_cast<size_t>(Expert(indices[expert.place()])) + 1] += rows;
    }
    for (size_t e = 1; e < next.size(); ++e) next[e] += next[e - 1];
    Routes routes;
    routes.from.resize(static_cast<size_t>(count * rows));
    routes.to.resize(static_cast<size_t>(count * rows));
    Places source = x;
    expert = experts;
    for (int64_t i = 0; i < count; ++i, expert.Next(), source.Next()) {
      int64_t& at = next[static_cast<size_t>(Expert(indices[expert.place()]))];
      for (int64_t m = 0; m < rows; ++m, ++at) {
        routes.from[static_cast<size_t>(at)] = source.place() * rows + m;
        routes.to[static_cast<size_t>(at)] = i * rows + m;
      }
    }
    next.pop_back();  // each has moved to its end
    routes.ends = std::move(next);
    return routes;
  }

  // One of the matrices.
  Weight Matrix(const Weight& all, int64_t expert) const {
    Weight one = all;
    one.format.rows = columns_;
    one.format.panels = columns_ / kLanes;
    one.codes = all.block(expert * one.format.panels, 0);
    one.scales = all.scale(expert * one.format.panels, 0);
    return one;
  }

  void Run(OrtKernelContext* context, const Weight& all, const T* x, const Routes& routes,
           T* y) const {
    const Layout layout = reader_.constant() ? layout_ : LayoutOf(isa_, all);
    int64_t first = 0;
    for (int64_t expert = 0; expert < experts_; ++expert) {
      const int64_t end = routes.ends[static_cast<size_t>(expert)];
      if (first == end) continue;
      const Weight weight = Matrix(all, expert);
      for (; first < end;) {
        const int64_t count = std::min(kBatchBlock, end - first);
        Multiply<T>(api_, context, isa_, weight, layout, int8_, x, {routes.from.data() + first},
                    count, y, {routes.to.data() + first});
        first += count;
      }
    }
  }

  Api api_;
  WeightReader reader_;
  const Isa& isa_;
  Layout layout_{};  // where the weight is constant
  int64_t experts_ = 0;
  int64_t columns_ = 0;  // of a product: rows of one matrix
  bool int8_ = false;
};

// Shape of y: what x and the experts have before their last two axes is broadcast. Experts of no
// axes cannot be told from those of an unknown number.
void InferExperts(const InferContext& context, const CustomOp&) {
  Dims batch = context.InputDims(0);
  const Dims chosen = context.InputDims(1), extent = context.Ints("extent");
  const int64_t experts = context.Int("experts");
  if (batch.empty() || chosen.empty() || !Positive(extent) || experts < 1) return;
  batch.pop_back();
  std::vector<std::string> names = context.InputSymbols(0);
  const std::vector<std::string> others = context.InputSymbols(1);
  Dims dims;
  std::vector<std::string> symbols;
  Dims tail;
  std::vector<std::string> tail_symbols;
  if (!batch.empty()) {
    tail = {batch.back()};
    tail_symbols = {names[batch.size() - 1]};
    batch.pop_back();
  }
  const size_t rank = std::max(batch.size(), chosen.size());
  for (size_t i = 0; i < rank; ++i) {
    const size_t back = rank - i;  // from the end, counted from 1
    const int64_t a = back <= batch.size() ? batch[batch.size() - back] : 1;
    const int64_t b = back <= chosen.size() ? chosen[chosen.size() - back] : 1;
    const std::string name = a < 0 ? names[batch.size() - back] : "";
    const std::string other = b < 0 ? others[chosen.size() - back] : "";
    dims.push_back(Joined(a, b));
    symbols.push_back(a == 1 ? other : b == 1 || name == other ? name : "");
  }
  dims.insert(dims.end(), tail.begin(), tail.end());
  symbols.insert(symbols.end(), tail_symbols.begin(), tail_symbols.end());
  dims.push_back(extent[0] / experts);
  symbols.emplace_back();
  context.SetOutput(context.InputType(0), dims, symbols);
}

template <class T, class Index>
void Add(const Api& api, std::deque<CustomOp>& ops) {
  std::vector<int> inputs = WithWeight({kTypeOf<T>, kTypeOf<Index>});
  inputs.push_back(kInt64);  // 'stack', of the portable body
  ops.emplace_back(api, "HyperExperts", inputs, kTypeOf<T>, Make<ExpertsKernel<T, Index>>,
                   InferExperts);
}

}  // namespace

void AddExperts(const Api& api, std::deque<CustomOp>& ops) {
  Add<float, int32_t>(api, ops);
  Add<float, int64_t>(api, ops);
  Add<Half, int32_t>(api, ops);
  Add<Half, int64_t>(api, ops);
  Add<Brain, int32_t>(api, ops);
  Add<Brain, int64_t>(api, ops);
}

}  // namespace onnxcomp::hyper
