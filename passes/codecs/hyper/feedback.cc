// Calibrated encoder of the hyperfunction format: the native form of feedback.py and survivors.py,
// with the same bytes.
//
// One job is sixteen rows of the whole weight, so the result does not depend on the number of
// threads. Sums have one fixed order, and each product is added with one rounding, so it does not
// depend on the instruction set either.

#include <cmath>
#include <exception>

#include "encode.h"
#include "instruction_sets.h"
#include "jobs.h"
#include "trellis.h"

namespace {

using namespace hyper;

// Cost of a forbidden start.
constexpr float kFar = 1e30f;
// Weights for which the targets of all survivors are moved at once.
constexpr int kSurvivorBlock = 8;
// Rows that are searched in step.
constexpr int kTogether = 2;
// Searches of a group: from its first weight and from its middle.
constexpr int kStarts = 2;

// One search, in the order in which it goes around the group.
struct SurvivorSearch {
  int group;
  int stem;              // before the first and after the last weight
  const float* targets;  // (group,), in table units
  const float* pull;     // (group, group): what an error of weight t does to targets behind it
  const float* prices;   // (group,)
  const float* values;   // (branches, stems)
  uint16_t* path;        // (group,): states
};

// Its working memory; rows of all stems.
struct SurvivorMemory {
  float* common;          // (group,): targets moved by errors that all survivors share
  float* costs;           // 1
  float* arranged;        // 2
  float* windows;         // 2 blocks
  float* errors;          // group
  int32_t* history;       // group
  int32_t* predecessors;  // 1 block
  int32_t* origins;       // 2
};

using SearchSurvivors = void (*)(const SurvivorSearch* searches, const SurvivorMemory* memories,
                                 int count);

class SurvivorSpace {
 public:
  SurvivorSpace(int group, int stems)
      : floats_(size_t(group) + size_t(stems) * (3 + 2 * kSurvivorBlock + group)),
        integers_(size_t(stems) * (group + kSurvivorBlock + 2)) {
    float* f = floats_.get();
    int32_t* i = integers_.get();
    memory_.common = f, f += group;
    memory_.windows = f, f += 2 * kSurvivorBlock * stems;
    memory_.errors = f, f += group * stems;
    memory_.arranged = f, f += 2 * stems;
    memory_.costs = f;
    memory_.history = i, i += group * stems;
    memory_.predecessors = i, i += kSurvivorBlock * stems;
    memory_.origins = i;
  }

  bool ok() const { return floats_.get() && integers_.get(); }
  const SurvivorMemory& memory() const { return memory_; }

 private:
  Aligned<float> floats_;
  Aligned<int32_t> integers_;
  SurvivorMemory memory_;
};

// The table as searches read it: (branches, stems).
class BranchValues {
 public:
  BranchValues(const int8_t* table, int bits, int state_bits) : values_(size_t{1} << state_bits) {
    const int stems = 1 << (state_bits - bits), branches = 1 << bits;
    for (int s = 0; s < stems && values_.get(); ++s)
      for (int j = 0; j < branches; ++j) values_.get()[j * stems + s] = table[s * branches + j];
  }
  const float* get() const { return values_.get(); }

 private:
  Aligned<float> values_;
};

// What errors of one group cost; matrices are (group, group).
struct GroupCost {
  const float* moments;
  const float* pull[kStarts];
  const float* prices[kStarts];
};

// What to encode and for which inputs; `columns` is the padded length.
struct FeedbackTask {
  Format format;
  int64_t columns;
  const float* weight;   // (rows, length)
  const float* moments;  // (columns, columns), symmetric
  const float* behind;   // (columns, columns): what errors before its group ask of a column
  const float* inverse;  // (groups, group, group): of the diagonal blocks of the moments
  const float* ahead;    // (groups, group, group): costs when later groups make up for errors
  const float* alone;    // (groups, group, group): costs when all other groups are fixed
  const float* pulls;    // (groups, 4, group, group): ahead and alone, from each start
  const float* prices;   // (groups, 4, group)
  PlainCode plain;
  int sweeps;
  SearchSurvivors search;
  uint8_t* codes;
  uint16_t* scales;

  int64_t square() const { return int64_t{format.group} * format.group; }
  const float* block(const float* matrix, int64_t row, int64_t column) const {
    return matrix + (row * columns + column) * format.group;
  }
  GroupCost cost(int64_t group, bool is_ahead) const {
    GroupCost found = {(is_ahead ? ahead : alone) + group * square(), {}, {}};
    for (int start = 0; start < kStarts; ++start) {
      const int64_t number = group * 2 * kStarts + (is_ahead ? 0 : kStarts) + start;
      found.pull[start] = pulls + number * square();
      found.prices[start] = prices + number * format.group;
    }
    return found;
  }
};

struct Kernels {
  SearchSurvivors (*find_search)(int bits, int state_bits);
  int32_t (*encode)(int64_t panels, int threads, const FeedbackTask& task);
};

}  // namespace

#define ONNXCOMP_ISA feedback_baseline
#include "product.h"
#include "survivors.h"
#include "panel.h"
#undef ONNXCOMP_ISA

#ifdef ONNXCOMP_X86
ONNXCOMP_TARGET(ONNXCOMP_AVX2_SETS)
#define ONNXCOMP_ISA feedback_avx2
#define ONNXCOMP_AVX2
#include "product.h"
#include "survivors.h"
#include "panel.h"
#undef ONNXCOMP_AVX2
#undef ONNXCOMP_ISA
ONNXCOMP_END_TARGET

ONNXCOMP_TARGET(ONNXCOMP_AVX512_SETS)
#define ONNXCOMP_ISA feedback_avx512
#define ONNXCOMP_AVX512
#include "product.h"
#include "survivors.h"
#include "panel.h"
#undef ONNXCOMP_AVX512
#undef ONNXCOMP_ISA
ONNXCOMP_END_TARGET
#endif

namespace {

// Kernels for a number of `chosen_isa`.
const Kernels* feedback_kernels(int32_t isa) {
  isa = chosen_isa(isa);
#ifdef ONNXCOMP_X86
  if (isa == 2) return &feedback_avx512::kernels;
  if (isa == 1) return &feedback_avx2::kernels;
#endif
  return isa == 0 ? &feedback_baseline::kernels : nullptr;
}

// Searches alone, for tests and for encoders that are not native.
struct SearchTask {
  SurvivorSearch search;  // of the first row
  const int32_t* stems;
  int kept;
  SearchSurvivors run;
};

class Searcher {
 public:
  explicit Searcher(const SearchTask& task) : task_(task), space_(task.search.group, task.kept) {}
  bool ok() const { return space_.ok(); }
  bool run(int64_t row) {
    SurvivorSearch search = task_.search;
    search.stem = task_.stems[row];
    search.targets += row * search.group;
    search.path += row * search.group;
    task_.run(&search, &space_.memory(), 1);
    return true;
  }

 private:
  const SearchTask& task_;
  SurvivorSpace space_;
};

}  // namespace

// Find the states path[row * group + t] of rows of one group each.
ONNXCOMP_EXPORT int32_t onnxcomp_hyper_survivors(const float* targets, const float* pull,
                                                 const float* prices, const int32_t* stems,
                                                 const int8_t* table, int64_t rows, int32_t bits,
                                                 int32_t state_bits, int32_t group,
                                                 int32_t threads, int32_t isa, uint16_t* path) {
  const Format format = {rows, group, bits, state_bits, group};
  const Kernels* kernels = feedback_kernels(isa);
  if (!format.valid() || !kernels) return kInvalid;
  const int kept = 1 << (state_bits - bits);
  for (int64_t row = 0; row < rows; ++row)
    if (stems[row] < 0 || stems[row] >= kept) return kInvalid;
  try {
    const BranchValues values(table, bits, state_bits);
    if (!values.get()) return kNoMemory;
    const SurvivorSearch first = {group, 0, targets, pull, prices, values.get(), path};
    const SearchTask task = {first, stems, kept, kernels->find_search(bits, state_bits)};
    return for_each_job<Searcher>(rows, threads, task);
  } catch (const std::exception&) {
    return kNoMemory;
  }
}

// Encode weight[row * length + column] for inputs with given second moments. `metric` points to
// the seven arrays of FeedbackTask from `moments` to `prices`, padded with zeros to whole groups.
// Returns a Status; with kOutOfRange some scales do not fit float16.
ONNXCOMP_EXPORT int32_t onnxcomp_hyper_feedback(const float* weight, int64_t rows, int64_t length,
                                                int32_t bits, int32_t state_bits, int32_t group,
                                                const float* const* metric, const int8_t* table,
                                                double spread, int32_t passes, int32_t sweeps,
                                                int32_t threads, int32_t isa, uint8_t* codes,
                                                uint16_t* scales) {
  const Format format = {rows, length, bits, state_bits, group};
  const Kernels* kernels = feedback_kernels(isa);
  if (!format.valid() || !kernels || !(spread > 0) || passes < 2 || sweeps < 0) return kInvalid;
  const PlainCode plain = {table, spread, passes, isa};
  const FeedbackTask task = {format,
                             format.groups() * group,
                             weight,
                             metric[0],
                             metric[1],
                             metric[2],
                             metric[3],
                             metric[4],
                             metric[5],
                             metric[6],
                             plain,
                             sweeps,
                             kernels->find_search(bits, state_bits),
                             codes,
                             scales};
  try {
    return kernels->encode(format.panels(), threads, task);
  } catch (const std::exception&) {
    return kNoMemory;
  }
}
