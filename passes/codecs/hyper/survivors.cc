// Search of the hyperfunction encoder for errors that are weighed together: the native form of
// hyper_survivors.py, with the same bits. Every survivor of the trellis search carries its own
// targets for the weights to come, moved by the errors it has made.

#include <cstdint>
#include <exception>

#include "common/processor.h"
#include "jobs.h"

namespace {

using namespace hyper;

constexpr float kFar = 1e30f;

struct SurvivorTask {
  const float* targets;   // (rows, group), in table units
  const float* pull;      // (group, group): what an error of weight t does to targets behind it
  const float* prices;    // (group,)
  const int32_t* stems;   // (rows,): the stem before the first and after the last weight
  const int8_t* table;
  Format format;          // length == group
  uint16_t* path;         // (rows, group): states
};

// The two inner loops, compiled for several instruction sets.
struct Loops {
  // next = now + error * pull for the weights from `first` on, a multiple of 16.
  void (*extend)(float* next, const float* now, const float* pull, float error, int first,
                 int group);
  // Cost of a path through each state: its low bits are the stem it comes from.
  void (*price)(float* total, const float* cost, const float* wanted, const float* values,
                float price, int states, int stems);
};

#define ONNXCOMP_LOOPS(name, attribute)                                                       \
  attribute void extend_##name(float* __restrict next, const float* __restrict now,           \
                               const float* __restrict pull, float error, int first,          \
                               int group) {                                                   \
    for (int i = first; i < group; ++i) next[i] = now[i] + error * pull[i];                   \
  }                                                                                           \
  attribute void price_##name(float* __restrict total, const float* __restrict cost,          \
                              const float* __restrict wanted, const float* __restrict values, \
                              float price, int states, int stems) {                           \
    for (int base = 0; base < states; base += stems)                                          \
      for (int i = 0; i < stems; ++i) {                                                       \
        const float error = wanted[i] - values[base + i];                                     \
        total[base + i] = cost[i] + price * (error * error);                                  \
      }                                                                                       \
  }

ONNXCOMP_LOOPS(baseline, )
#ifdef ONNXCOMP_X86
ONNXCOMP_LOOPS(avx2, __attribute__((target("avx2"))))
ONNXCOMP_LOOPS(avx512, __attribute__((target("avx512f"))))
#endif

Loops best_loops() {
#ifdef ONNXCOMP_X86
  using onnxcomp::X86;
  if (onnxcomp::HasX86({X86::kAvx512F})) return {extend_avx512, price_avx512};
  if (onnxcomp::HasX86({X86::kAvx2})) return {extend_avx2, price_avx2};
#endif
  return {extend_baseline, price_baseline};
}

class Searcher {
 public:
  explicit Searcher(const SurvivorTask& task)
      : task_(task),
        group_(task.format.group),
        stems_(1 << (task.format.state_bits - task.format.bits)),
        branches_(1 << task.format.bits),
        loops_(best_loops()),
        now_(size_t(stems_) * group_),
        next_(size_t(stems_) * group_),
        costs_(size_t(stems_) * 3),
        totals_(size_t(stems_) * branches_),
        values_(size_t(stems_) * branches_),
        history_(size_t(stems_) * group_) {
    if (values_.get()) std::copy_n(task.table, stems_ * branches_, values_.get());
  }

  bool ok() const {
    return now_.get() && next_.get() && costs_.get() && totals_.get() && values_.get() &&
           history_.get();
  }

  bool run(int64_t row) {
    const float* targets = task_.targets + row * group_;
    const int start = task_.stems[row];
    float *now = now_.get(), *next = next_.get();
    float *cost = costs_.get(), *reached = cost + stems_, *wanted = cost + 2 * stems_;
    for (int stem = 0; stem < stems_; ++stem) {
      std::memcpy(now + stem * group_, targets, sizeof(float) * size_t(group_));
      cost[stem] = stem == start ? 0.0f : kFar;
    }
    for (int t = 0; t < group_; ++t) {
      for (int stem = 0; stem < stems_; ++stem) wanted[stem] = now[stem * group_ + t];
      loops_.price(totals_.get(), cost, wanted, values_.get(), task_.prices[t],
                   stems_ * branches_, stems_);
      for (int stem = 0; stem < stems_; ++stem) {
        const int branch = cheapest(stem, &reached[stem]);
        const int state = stem * branches_ + branch;
        history_.get()[t * stems_ + stem] = static_cast<uint8_t>(branch);
        const float error = targets[t] - values_.get()[state];
        loops_.extend(next + stem * group_, now + (state & (stems_ - 1)) * group_,
                task_.pull + t * group_, error, (t + 1) & ~15, group_);
      }
      std::swap(now, next);
      std::swap(cost, reached);
    }
    trace(row, start);
    return true;
  }

 private:
  int cheapest(int stem, float* least) const {
    const float* totals = totals_.get() + stem * branches_;
    int best = 0;
    float lowest = totals[0];
    for (int branch = 1; branch < branches_; ++branch) {
      best = totals[branch] < lowest ? branch : best;
      lowest = totals[branch] < lowest ? totals[branch] : lowest;
    }
    *least = lowest;
    return best;
  }

  void trace(int64_t row, int stem) {
    uint16_t* path = task_.path + row * group_;
    for (int t = group_ - 1; t >= 0; --t) {
      const int state = stem * branches_ + history_.get()[t * stems_ + stem];
      path[t] = static_cast<uint16_t>(state);
      stem = state & (stems_ - 1);
    }
  }

  const SurvivorTask& task_;
  const int group_, stems_, branches_;
  const Loops loops_;
  Aligned<float> now_, next_, costs_, totals_, values_;
  Aligned<uint8_t> history_;
};

}  // namespace

// Find the states path[row * group + t] of rows of one group each.
ONNXCOMP_EXPORT int32_t onnxcomp_hyper_survivors(const float* targets, const float* pull,
                                                 const float* prices, const int32_t* stems,
                                                 const int8_t* table, int64_t rows, int32_t bits,
                                                 int32_t state_bits, int32_t group,
                                                 int32_t threads, uint16_t* path) {
  const Format format = {rows, group, bits, state_bits, group};
  if (!format.valid()) return kInvalid;
  for (int64_t row = 0; row < rows; ++row)
    if (stems[row] < 0 || stems[row] >= 1 << (state_bits - bits)) return kInvalid;
  try {
    const SurvivorTask task = {targets, pull, prices, stems, table, format, path};
    return for_each_job<Searcher>(rows, threads, task);
  } catch (const std::exception&) {
    return kNoMemory;
  }
}
