// Calibrated encoding of sixteen rows; included once per instruction set by feedback.cc. No include
// guard on purpose. Arrays are [column][lane] and [group][lane]; the lanes are the rows.

#include "rotation.h"

namespace ONNXCOMP_ISA {
namespace {

// sum[lane] += sum_t a[t] b[t], in the order of t.
void add_products(const float* a, const float* b, int count, double* sum) {
  for (int t = 0; t < count; ++t)
    for (int lane = 0; lane < kLanes; ++lane)
      sum[lane] += double(a[t * kLanes + lane]) * double(b[t * kLanes + lane]);
}

void add_to(float* sum, const float* x, int count) {
  for (int i = 0; i < count * kLanes; ++i) sum[i] += x[i];
}

// What a group of sixteen rows is encoded to.
struct Block {
  uint16_t* path;
  float* shape;  // weights for scales of 1
  double scale[kLanes];
  double cost[kLanes];
};

// One group: encoded plainly, then for its cost, from both starts, with the best scales.
class GroupSearch {
 public:
  explicit GroupSearch(const FeedbackTask& task)
      : task_(task),
        group_(task.format.group),
        size_(size_t(group_) * kLanes),
        stems_(1 << (task.format.state_bits - task.format.bits)),
        plain_(task.format, task.plain),
        spaces_{{group_, stems_}, {group_, stems_}},
        values_(task.plain.table, task.format.bits, task.format.state_bits),
        floats_(size_ * 5 + kTogether * group_),
        paths_(size_ * 2 + kTogether * group_) {
    float* f = floats_.get();
    pulled_ = f, rotated_ = f + size_, product_ = f + 2 * size_;
    best_.shape = f + 3 * size_, trial_.shape = f + 4 * size_, wanted_ = f + 5 * size_;
    best_.path = paths_.get(), trial_.path = best_.path + size_, row_ = trial_.path + size_;
  }

  bool ok() const {
    const bool room = std::all_of(spaces_, spaces_ + kTogether, [](auto& one) { return one.ok(); });
    return room && plain_.ok() && values_.get() && floats_.get() && paths_.get();
  }

  // Where the weights go: [t][lane], zeros in the padding.
  float* targets() { return plain_.targets(); }
  const Block& found() const { return best_; }

  // Returns false when a scale does not fit float16.
  bool run(const GroupCost& cost) {
    if (!plain_.run()) return false;
    multiply(cost.moments, group_, group_, group_, targets(), pulled_);
    std::memcpy(rotated_, targets(), size_ * sizeof(float));
    rotate(rotated_, group_);
    std::memcpy(best_.path, plain_.path(), size_ * sizeof(uint16_t));
    for (int lane = 0; lane < kLanes; ++lane) best_.scale[lane] = from_half(plain_.scales()[lane]);
    look_up(best_);
    multiply(cost.moments, group_, group_, group_, best_.shape, product_);
    judge(best_);
    for (int start = 0; start < kStarts; ++start) refine(cost, start);
    return true;
  }

 private:
  void look_up(Block& block) const {
    const int8_t* table = task_.plain.table;
    for (size_t i = 0; i < size_; ++i) block.shape[i] = float(table[block.path[i]]) * 0x1p-12f;
    transform(block.shape, group_);
    flip_signs(block.shape, group_);
  }

  // Costs of the errors, `product_` being what the moments make of the shape.
  void judge(Block& block) {
    const float *target = targets(), *pulled = pulled_, *product = product_, *shape = block.shape;
    std::fill(block.cost, block.cost + kLanes, 0.0);
    for (int t = 0; t < group_; ++t)
      for (int lane = 0; lane < kLanes; ++lane) {
        const int i = t * kLanes + lane;
        const double scale = block.scale[lane];
        const double error = double(target[i]) - scale * double(shape[i]);
        block.cost[lane] += (double(pulled[i]) - scale * double(product[i])) * error;
      }
  }

  void refine(const GroupCost& cost, int start) {
    const int first = start * group_ / kStarts;
    for (int lane = 0; lane < kLanes; lane += kTogether) search(cost, start, first, lane);
    look_up(trial_);
    multiply(cost.moments, group_, group_, group_, trial_.shape, product_);
    fit();
    judge(trial_);
    uint32_t better[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const bool less = trial_.cost[lane] < best_.cost[lane] && trial_.scale[lane] > 0;
      better[lane] = less ? 0xFFFFFFFF : 0;
      if (!less) continue;
      best_.scale[lane] = trial_.scale[lane];
      best_.cost[lane] = trial_.cost[lane];
    }
    take(trial_, better, group_, best_.path, best_.shape);
  }

  // Some rows from a lane on.
  void search(const GroupCost& cost, int start, int first, int lane) {
    SurvivorSearch searches[kTogether];
    SurvivorMemory memories[kTogether];
    for (int n = 0; n < kTogether; ++n) {
      const double scale = best_.scale[lane + n];
      const float factor = scale > 0 ? static_cast<float>(4096.0 / (group_ * scale)) : 0.0f;
      float* wanted = wanted_ + n * group_;
      for (int t = 0; t < group_; ++t)
        wanted[t] = rotated_[(first + t) % group_ * kLanes + lane + n] * factor;
      const uint16_t last = best_.path[(first + group_ - 1) % group_ * kLanes + lane + n];
      searches[n] = {group_, last >> task_.format.bits, wanted, cost.pull[start],
                     cost.prices[start], values_.get(), row_ + n * group_};
      memories[n] = spaces_[n].memory();
    }
    task_.search(searches, memories, kTogether);
    for (int t = 0; t < group_; ++t)
      for (int n = 0; n < kTogether; ++n)
        trial_.path[(first + t) % group_ * kLanes + lane + n] = row_[n * group_ + t];
  }

  // The scales with the least cost, rounded to float16.
  void fit() {
    double product[kLanes] = {}, square[kLanes] = {};
    add_products(pulled_, trial_.shape, group_, product);
    add_products(product_, trial_.shape, group_, square);
    for (int lane = 0; lane < kLanes; ++lane) {
      const double best = square[lane] > 0 ? product[lane] / square[lane] : 0.0;
      const double limited = std::min(std::max(best, 0.0), 65504.0);
      trial_.scale[lane] = from_half(to_half(static_cast<float>(limited)));
    }
  }

 public:
  // Copy the lanes where `mask` is all ones.
  static void take(const Block& from, const uint32_t* mask, int group, uint16_t* path,
                   float* shape) {
    for (int t = 0; t < group; ++t)
      for (int lane = 0; lane < kLanes; ++lane) {
        const int i = t * kLanes + lane;
        const auto low = static_cast<uint16_t>(mask[lane]);
        path[i] = static_cast<uint16_t>((from.path[i] & low) | (path[i] & ~low));
        shape[i] = mask[lane] ? from.shape[i] : shape[i];
      }
  }

 private:
  const FeedbackTask& task_;
  const int group_;
  const size_t size_;
  const int stems_;
  BlockEncoder plain_;
  SurvivorSpace spaces_[kTogether];
  BranchValues values_;
  Aligned<float> floats_;
  Aligned<uint16_t> paths_;
  float *pulled_, *rotated_, *product_, *wanted_;
  uint16_t* row_;
  Block best_, trial_;
};

// All groups of sixteen rows.
class Panel {
 public:
  explicit Panel(const FeedbackTask& task)
      : task_(task),
        group_(task.format.group),
        groups_(int(task.format.groups())),
        size_(size_t(task.columns) * kLanes),
        search_(task),
        floats_(size_ * 4 + 3 * size_t(group_) * kLanes),
        asked_(at(groups_ * (groups_ + 1) / 2)),
        paths_(size_),
        doubles_(size_t(groups_ + 4) * groups_ * kLanes) {
    float* f = floats_.get();
    weight_ = f, shape_ = f + size_, error_ = f + 2 * size_;
    wanted_ = f + 3 * size_, sum_ = f + 4 * size_;
    gap_ = sum_ + group_ * kLanes, part_ = gap_ + group_ * kLanes;
    system_ = doubles_.get(), right_ = system_ + groups_ * groups_ * kLanes;
    scale_ = right_ + groups_ * kLanes, fitted_ = scale_ + groups_ * kLanes;
    diagonal_ = fitted_ + groups_ * kLanes;
  }

  bool ok() const {
    return search_.ok() && floats_.get() && asked_.get() && paths_.get() && doubles_.get();
  }

  bool run(int64_t panel) {
    load(panel);
    if (!feed_forward()) return false;
    for (int group = 0; group < groups_; ++group)
      gather(task_.moments, weight_, group, groups_, wanted_ + at(group));
    ask_earlier();
    refit(false);
    for (int sweep = 0; sweep < task_.sweeps; ++sweep) {
      if (sweep > 0) ask_earlier();
      if (!this->sweep()) return false;
      refit(true);
    }
    store(panel);
    return true;
  }

 private:
  size_t at(int group) const { return size_t(group) * group_ * kLanes; }

  void load(int64_t panel) {
    const int64_t row = panel * kLanes, length = task_.format.length;
    const int64_t rows = std::min<int64_t>(kLanes, task_.format.rows - row);
    std::fill(weight_, weight_ + size_, 0.0f);
    for (int64_t lane = 0; lane < rows; ++lane)
      for (int64_t t = 0; t < length; ++t)
        weight_[t * kLanes + lane] = task_.weight[(row + lane) * length + t];
  }

  // What columns of the groups before `end` ask of one group, by a matrix of all columns.
  void gather(const float* matrix, const float* columns, int group, int end, float* sum) {
    std::fill(sum, sum + group_ * kLanes, 0.0f);
    for (int other = 0; other < end; ++other) {
      multiply(task_.block(matrix, group, 0) + int64_t{other} * group_, task_.columns, group_, group_,
               columns + at(other), part_);
      add_to(sum, part_, group_);
    }
  }

  // What a shape asks by the moments, of one of two groups, by the shape of the other one. Before a
  // sweep comes to the earlier group that is what the later one asks of it, and then the reverse: so
  // each product of a shape is found once.
  float* asked(int earlier, int later) const {
    return asked_.get() + at(later * (later + 1) / 2 + earlier);
  }

  void ask(int from, int of, float* found) const {
    multiply(task_.block(task_.moments, of, 0) + int64_t{from} * group_, task_.columns, group_,
             group_, shape_ + at(from), found);
  }

  // What shapes ask of the groups before theirs, and of their own.
  void ask_earlier() {
    for (int later = 0; later < groups_; ++later)
      for (int earlier = 0; earlier <= later; ++earlier) ask(later, earlier, asked(earlier, later));
  }

  // sum_ = the slope of the objective by the errors of a group that a sweep has come to.
  void find_slope(int group) {
    std::memcpy(sum_, wanted_ + at(group), size_t(group_) * kLanes * sizeof(float));
    for (int other = 0; other < groups_; ++other) {
      const float* part = asked(std::min(group, other), std::max(group, other));
      float scale[kLanes];
      for (int lane = 0; lane < kLanes; ++lane)
        scale[lane] = static_cast<float>(scale_[other * kLanes + lane]);
      for (int t = 0; t < group_; ++t)
        for (int lane = 0; lane < kLanes; ++lane)
          sum_[t * kLanes + lane] -= scale[lane] * part[t * kLanes + lane];
    }
  }

  // Encode the groups in order, each with the errors of those before it carried into it.
  bool feed_forward() {
    for (int group = 0; group < groups_; ++group) {
      gather(task_.behind, error_, group, group, sum_);
      add_to(sum_, weight_ + at(group), group_);
      std::memcpy(search_.targets(), sum_, size_t(group_) * kLanes * sizeof(float));
      if (!search_.run(task_.cost(group, true))) return false;
      uint32_t all[kLanes];
      std::fill(all, all + kLanes, 0xFFFFFFFF);
      take(group, all);
    }
    return true;
  }

  // Encode each group again for its best error given the other groups.
  bool sweep() {
    for (int group = 0; group < groups_; ++group) {
      find_slope(group);
      multiply(task_.inverse + group * task_.square(), group_, group_, group_, sum_, gap_);
      double before[kLanes] = {};
      add_products(sum_, gap_, group_, before);
      for (int i = 0; i < group_ * kLanes; ++i) {
        const float decoded = weight_[at(group) + i] - error_[at(group) + i];
        search_.targets()[i] = decoded + gap_[i];
      }
      if (!search_.run(task_.cost(group, false))) return false;
      uint32_t better[kLanes];
      for (int lane = 0; lane < kLanes; ++lane)
        better[lane] = search_.found().cost[lane] < before[lane] ? 0xFFFFFFFF : 0;
      take(group, better);
      for (int later = group; later < groups_; ++later) ask(group, later, asked(group, later));
    }
    return true;
  }

  void take(int group, const uint32_t* lanes) {
    const Block& found = search_.found();
    GroupSearch::take(found, lanes, group_, paths_.get() + at(group), shape_ + at(group));
    for (int lane = 0; lane < kLanes; ++lane)
      if (lanes[lane]) scale_[group * kLanes + lane] = found.scale[lane];
    set_errors(group);
  }

  // Columns of padding have no error.
  void set_errors(int group) {
    const int64_t width = std::min<int64_t>(group_, task_.format.length - group * group_);
    for (int64_t t = 0; t < width; ++t)
      for (int lane = 0; lane < kLanes; ++lane) {
        const size_t i = at(group) + t * kLanes + lane;
        error_[i] = weight_[i] - shape_[i] * static_cast<float>(scale_[group * kLanes + lane]);
      }
    std::fill(error_ + at(group) + width * kLanes, error_ + at(group + 1), 0.0f);
  }

  // Give each row the scales that suit its codes best: a linear least-squares problem. `swept` tells
  // whether a sweep has come to all groups.
  void refit(bool swept) {
    std::fill(system_, scale_, 0.0);
    for (int i = 0; i < groups_; ++i) {
      for (int j = 0; j <= i; ++j)
        add_products(asked(j, i), shape_ + at(swept ? i : j), group_, system(i, j));
      add_products(wanted_ + at(i), shape_ + at(i), group_, right_ + i * kLanes);
    }
    for (int i = 0; i < groups_; ++i)
      for (int lane = 0; lane < kLanes; ++lane)
        if (!(system(i, i)[lane] > 0)) {  // a group of zeros keeps its scale
          system(i, i)[lane] = 1.0;
          right_[i * kLanes + lane] = scale_[i * kLanes + lane];
        }
    solve();
    for (int lane = 0; lane < kLanes; ++lane) rescale(lane);
    for (int group = 0; group < groups_; ++group) set_errors(group);
  }

  double* system(int i, int j) const { return system_ + (i * groups_ + j) * kLanes; }
  // The system is in the lower triangle; its Cholesky factor takes the upper one.
  double* factor(int i, int j) const { return i == j ? diagonal_ + i * kLanes : system(j, i); }

  // Factor the system, then both substitutions.
  void solve() {
    for (int i = 0; i < groups_; ++i)
      for (int j = 0; j <= i; ++j) {
        double rest[kLanes];
        std::memcpy(rest, system(i, j), sizeof rest);
        if (i == j)
          for (double& value : rest) value += value * 1e-9;
        for (int k = 0; k < j; ++k) subtract(rest, factor(i, k), factor(j, k));
        for (int lane = 0; lane < kLanes; ++lane)
          factor(i, j)[lane] =
              i == j ? std::sqrt(rest[lane]) : rest[lane] / factor(j, j)[lane];
      }
    std::memcpy(fitted_, right_, size_t(groups_) * kLanes * sizeof(double));
    for (int i = 0; i < groups_; ++i) {
      for (int k = 0; k < i; ++k) subtract(fitted_ + i * kLanes, factor(i, k), fitted_ + k * kLanes);
      divide(fitted_ + i * kLanes, factor(i, i));
    }
    for (int i = groups_ - 1; i >= 0; --i) {
      for (int k = i + 1; k < groups_; ++k)
        subtract(fitted_ + i * kLanes, factor(k, i), fitted_ + k * kLanes);
      divide(fitted_ + i * kLanes, factor(i, i));
    }
  }

  static void subtract(double* x, const double* a, const double* b) {
    for (int lane = 0; lane < kLanes; ++lane) x[lane] -= a[lane] * b[lane];
  }
  static void divide(double* x, const double* by) {
    for (int lane = 0; lane < kLanes; ++lane) x[lane] /= by[lane];
  }

  // Take over the scales of a row where all are valid and the row is better for them.
  void rescale(int lane) {
    double change = 0.0;
    for (int i = 0; i < groups_; ++i) {
      double& scale = fitted_[i * kLanes + lane];
      const uint16_t half = to_half(static_cast<float>(scale));
      if (!(scale >= 0) || half >= 0x7C00) return;
      scale = from_half(half);
    }
    for (int i = 0; i < groups_; ++i) {
      double slope = 0.0;
      for (int j = 0; j < groups_; ++j) {
        const double both = fitted_[j * kLanes + lane] + scale_[j * kLanes + lane];
        slope += system(std::max(i, j), std::min(i, j))[lane] * both;
      }
      const double step = fitted_[i * kLanes + lane] - scale_[i * kLanes + lane];
      change += step * (slope - 2.0 * right_[i * kLanes + lane]);
    }
    if (!(change < 0)) return;
    for (int i = 0; i < groups_; ++i) scale_[i * kLanes + lane] = fitted_[i * kLanes + lane];
  }

  void store(int64_t panel) {
    const int64_t bytes = task_.format.block_bytes() * kLanes;
    for (int group = 0; group < groups_; ++group) {
      const int64_t job = panel * groups_ + group;
      pack(task_.format, paths_.get() + at(group), task_.codes + job * bytes);
      for (int lane = 0; lane < kLanes; ++lane)
        task_.scales[job * kLanes + lane] =
            to_half(static_cast<float>(scale_[group * kLanes + lane]));
    }
  }

  const FeedbackTask& task_;
  const int group_, groups_;
  const size_t size_;
  GroupSearch search_;
  Aligned<float> floats_, asked_;
  Aligned<uint16_t> paths_;
  Aligned<double> doubles_;
  float *weight_, *shape_, *error_, *wanted_, *sum_, *gap_, *part_;
  double *system_, *right_, *scale_, *fitted_, *diagonal_;
};

int32_t encode(int64_t panels, int threads, const FeedbackTask& task) {
  return for_each_job<Panel>(panels, threads, task, 1);
}

constexpr Kernels kernels = {find_survivor_search, encode};

}  // namespace
}  // namespace ONNXCOMP_ISA
