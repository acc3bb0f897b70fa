// Encoder of the hyperfunction format (ops/hyper/spec.md) for the compiler.
//
// One job is sixteen rows times one group. Every job stands alone, so the result does not depend
// on the number of threads; every decision is made in integers or in float operations with one
// fixed order, so it does not depend on the instruction set either. The numpy form of the same
// algorithm is hyper_viterbi.py; the two give equal bytes.

#include <cmath>

#include "encode.h"
#include "instruction_sets.h"
#include "jobs.h"
#include "trellis.h"

namespace {

using namespace hyper;

// Targets carry four bits after the point, in table units.
constexpr int kFraction = 16;
// Cost of a forbidden start: more than any difference that the first weights can make up.
constexpr int32_t kFar = 1 << 29;

// What one state adds to a path, in the forms the instruction sets want.
struct StateCost {
  int32_t pair;    // int16 (value << K, value^2), low half first
  int32_t slope;   // value << K
  int32_t square;  // value^2 << (K + 3)
};

// The working memory of one search; arrays are [.][kLanes].
struct Trial {
  int group;
  const StateCost* states;
  int32_t* costs;  // two times all stems
  uint8_t* history;
  uint16_t* path;
};

using Search = void (*)(const int32_t* targets, const Trial& trial, int start, bool open);

struct Kernels {
  void (*rotate)(float* x, int group);
  void (*set_targets)(const float* x, const float* factor, int group, int32_t unit, int16_t* y,
                      int32_t* targets);
  void (*correlate)(const uint16_t* path, const int8_t* table, const int16_t* y, int group,
                    int32_t* product, int32_t* square);
  Search (*find_search)(int bits, int state_bits);
};

}  // namespace

#define ONNXCOMP_ISA isa_baseline
#include "viterbi.h"
#undef ONNXCOMP_ISA

#ifdef ONNXCOMP_X86
ONNXCOMP_TARGET("avx2")
#define ONNXCOMP_ISA isa_avx2
#define ONNXCOMP_AVX2
#include "viterbi.h"
#undef ONNXCOMP_AVX2
#undef ONNXCOMP_ISA
ONNXCOMP_END_TARGET

ONNXCOMP_TARGET("avx2,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#define ONNXCOMP_ISA isa_avx512
#define ONNXCOMP_AVX512
#include "viterbi.h"
#undef ONNXCOMP_AVX512
#undef ONNXCOMP_ISA
ONNXCOMP_END_TARGET
#endif

namespace {

// Kernels for a number of `chosen_isa`.
const Kernels* kernels_of(int32_t isa) {
  isa = chosen_isa(isa);
#ifdef ONNXCOMP_X86
  if (isa == 2) return &isa_avx512::kernels;
  if (isa == 1) return &isa_avx2::kernels;
#endif
  return isa == 0 ? &isa_baseline::kernels : nullptr;
}

// What to encode and where to put it.
struct EncodeTask {
  Format format;
  const float* weight;
  int64_t row_stride;
  int64_t column_stride;
  double spread;
  int passes;
  const int8_t* table;
  const StateCost* states;
  const Kernels* kernels;
  Search search;
  uint8_t* codes;
  uint16_t* scales;
};

class Encoder {
 public:
  explicit Encoder(const EncodeTask& task)
      : task_(task),
        group_(task.format.group),
        x_(group_ * kLanes),
        targets_(2 * group_ * kLanes),
        y_(group_ * kLanes),
        path_(group_ * kLanes),
        kept_(group_ * kLanes),
        costs_(2 * stems() * kLanes),
        history_(stems() * kLanes * group_) {}

  bool ok() const {
    return x_.get() && targets_.get() && y_.get() && path_.get() && kept_.get() && costs_.get() &&
           history_.get();
  }

  // States of the last block, [t][lane].
  const uint16_t* path() const { return kept_.get(); }

  // Returns false when a scale does not fit float16.
  bool run(int64_t job) {
    read(job);
    bool fits = start_scales();
    task_.kernels->rotate(x_.get(), group_);
    std::fill(chosen_, chosen_ + kLanes, 0);
    std::fill(kept_.get(), kept_.get() + group_ * kLanes, 0);
    std::fill(least_, least_ + kLanes, 0.0);
    for (int pass = 0; pass < task_.passes; ++pass) fits &= search(pass);
    write(job);
    return fits;
  }

 private:
  size_t stems() const { return size_t{1} << (task_.format.state_bits - task_.format.bits); }

  void read(int64_t job) {
    const Format& format = task_.format;
    const int64_t row = job / format.groups() * kLanes;
    const int64_t column = job % format.groups() * group_;
    const int64_t rows = std::min<int64_t>(kLanes, format.rows - row);
    const int64_t columns = std::min<int64_t>(group_, format.length - column);
    float* x = x_.get();
    std::fill(x, x + group_ * kLanes, 0.0f);
    const float* corner = task_.weight + row * task_.row_stride + column * task_.column_stride;
    // The nearer neighbours in memory go first.
    if (std::abs(task_.row_stride) < std::abs(task_.column_stride)) {
      for (int64_t t = 0; t < columns; ++t)
        for (int64_t lane = 0; lane < rows; ++lane)
          x[t * kLanes + lane] = corner[lane * task_.row_stride + t * task_.column_stride];
    } else {
      for (int64_t lane = 0; lane < rows; ++lane)
        for (int64_t t = 0; t < columns; ++t)
          x[t * kLanes + lane] = corner[lane * task_.row_stride + t * task_.column_stride];
    }
  }

  // Scales that bring the targets to the spread the table is made for.
  bool start_scales() {
    double energy[kLanes] = {};
    const float* x = x_.get();
    for (int t = 0; t < group_; ++t)
      for (int lane = 0; lane < kLanes; ++lane)
        energy[lane] += double(x[t * kLanes + lane]) * double(x[t * kLanes + lane]);
    bool fits = true;
    for (int lane = 0; lane < kLanes; ++lane) {
      const double scale = std::sqrt(energy[lane]) * 4096.0 / (group_ * task_.spread);
      fits &= set_scale(lane, scale);
    }
    return fits;
  }

  bool set_scale(int lane, double scale) {
    half_[lane] = to_half(static_cast<float>(scale));
    const bool fits = half_[lane] < 0x7C00;
    if (!fits) half_[lane] = 0;
    scale_[lane] = double(from_half(half_[lane]));
    const double factor = half_[lane] ? kFraction * 4096.0 / (group_ * scale_[lane]) : 0.0;
    factor_[lane] = static_cast<float>(factor);
    return fits;
  }

  // Search with the present scales, refit them, and keep what is better than before. The first
  // pass is open; the others close the cycle, in turn at its middle and at its end.
  bool search(int pass) {
    const int32_t unit = 8 << task_.format.bits;
    task_.kernels->set_targets(x_.get(), factor_, group_, unit, y_.get(), targets_.get());
    const Trial trial = {group_, task_.states, costs_.get(), history_.get(), path_.get()};
    task_.search(targets_.get(), trial, pass % 2 * group_ / 2, pass == 0);
    int32_t product[kLanes] = {}, square[kLanes] = {};
    task_.kernels->correlate(path_.get(), task_.table, y_.get(), group_, product, square);
    bool fits = true;
    for (int lane = 0; lane < kLanes; ++lane) fits &= refit(lane, product[lane], square[lane], pass > 0);
    if (pass > 0) keep();
    return fits;
  }

  bool refit(int lane, int32_t product, int32_t square, bool closed) {
    better_[lane] = 0;
    if (half_[lane] == 0 || product <= 0) return true;  // zero is the better approximation
    const double projection = scale_[lane] * (double(product) / kFraction);
    const bool fits = set_scale(lane, projection / square);
    const double error = scale_[lane] * (scale_[lane] * square - 2.0 * projection);
    if (closed && error < least_[lane]) {
      better_[lane] = 0xFFFF;
      least_[lane] = error;
      chosen_[lane] = half_[lane];
    }
    return fits;
  }

  // Take over the path in the lanes where it is better than what was kept before.
  void keep() {
    uint16_t* kept = kept_.get();
    const uint16_t* path = path_.get();
    for (int t = 0; t < group_; ++t)
      for (int lane = 0; lane < kLanes; ++lane) {
        const int i = t * kLanes + lane;
        kept[i] = static_cast<uint16_t>((path[i] & better_[lane]) | (kept[i] & ~better_[lane]));
      }
  }

  // A block without a scale has codes of zeros.
  void write(int64_t job) {
    uint16_t used[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      task_.scales[job * kLanes + lane] = chosen_[lane];
      used[lane] = chosen_[lane] ? 0xFFFF : 0;
    }
    for (int i = 0; i < group_ * kLanes; ++i) kept_.get()[i] &= used[i % kLanes];
    if (!task_.codes) return;
    pack(task_.format, kept_.get(), task_.codes + job * task_.format.block_bytes() * kLanes);
  }

  const EncodeTask& task_;
  const int group_;
  Aligned<float> x_;
  Aligned<int32_t> targets_;
  Aligned<int16_t> y_;
  Aligned<uint16_t> path_;
  Aligned<uint16_t> kept_;
  Aligned<int32_t> costs_;
  Aligned<uint8_t> history_;
  uint16_t half_[kLanes];
  double scale_[kLanes];
  float factor_[kLanes];
  uint16_t chosen_[kLanes];
  uint16_t better_[kLanes];
  double least_[kLanes];
};

std::vector<StateCost> state_costs(const int8_t* table, const Format& format) {
  std::vector<StateCost> states(size_t{1} << format.state_bits);
  for (size_t s = 0; s < states.size(); ++s) {
    const int32_t value = table[s], slope = value * (1 << format.bits), square = value * value;
    const uint32_t pair = uint32_t(slope & 0xFFFF) | uint32_t(square) << 16;
    states[s] = {static_cast<int32_t>(pair), slope, square << (format.bits + 3)};
  }
  return states;
}

}  // namespace

namespace hyper {

// One block, read as a matrix of sixteen rows whose columns lie one after the other.
class BlockEncoder::Block {
 public:
  Block(const Format& format, const PlainCode& code)
      : states(state_costs(code.table, format)),
        x(size_t(format.group) * kLanes),
        task(make_task(format, code)),
        encoder(task) {}

  std::vector<StateCost> states;
  Aligned<float> x;
  uint16_t scales[kLanes];
  EncodeTask task;
  Encoder encoder;

 private:
  EncodeTask make_task(const Format& format, const PlainCode& code) {
    const Format block = {kLanes, format.group, format.bits, format.state_bits, format.group};
    const Kernels* kernels = kernels_of(code.isa);
    return {block,   x.get(), 1, kLanes, code.spread, code.passes, code.table, states.data(),
            kernels, kernels->find_search(format.bits, format.state_bits), nullptr, scales};
  }
};

BlockEncoder::BlockEncoder(const Format& format, const PlainCode& code)
    : block_(new Block(format, code)) {}
BlockEncoder::~BlockEncoder() = default;
bool BlockEncoder::ok() const { return block_->x.get() && block_->encoder.ok(); }
float* BlockEncoder::targets() { return block_->x.get(); }
bool BlockEncoder::run() { return block_->encoder.run(0); }
const uint16_t* BlockEncoder::path() const { return block_->encoder.path(); }
const uint16_t* BlockEncoder::scales() const { return block_->scales; }

}  // namespace hyper

// Version of this interface.
ONNXCOMP_EXPORT int32_t onnxcomp_encoders_version() { return 3; }

// Encode weight[row * row_stride + column * column_stride], strides in elements. `spread` is the
// root mean square of the targets in table units that the start scale aims at; `passes` is the
// number of searches, at least 2.
// Returns a Status; with kOutOfRange the blocks whose scale does not fit float16 are zero.
ONNXCOMP_EXPORT int32_t onnxcomp_hyper_encode(
    const float* weight, int64_t rows, int64_t length, int64_t row_stride, int64_t column_stride,
    int32_t bits, int32_t state_bits, int32_t group, const int8_t* table, double spread,
    int32_t passes, int32_t threads, int32_t isa, uint8_t* codes,
    uint16_t* scales) {
  const Format format = {rows, length, bits, state_bits, group};
  const Kernels* kernels = kernels_of(isa);
  if (!format.valid() || !kernels || !(spread > 0) || passes < 2)
    return kInvalid;
  try {
    const std::vector<StateCost> states = state_costs(table, format);
    const EncodeTask task = {format,
                             weight,
                             row_stride,
                             column_stride,
                             spread,
                             passes,
                             table,
                             states.data(),
                             kernels,
                             kernels->find_search(bits, state_bits),
                             codes,
                             scales};
    return for_each_job<Encoder>(format.jobs(), threads, task);
  } catch (const std::exception&) {
    return kNoMemory;
  }
}
