// Decoder of the hyperfunction format for the compiler: what `hyper_format.decode` computes, to the
// bit. The operators have their own kernels in ops/hyper.

#include "jobs.h"

namespace {

using namespace hyper;

struct DecodeTask {
  Format format;
  const uint8_t* codes;
  const uint16_t* scales;
  const int8_t* table;
  float* weight;
};

class Decoder {
 public:
  explicit Decoder(const DecodeTask& task) : task_(task) {
    for (int t = 0; t < task.format.group; ++t) signs_[t] = sign_is_negative(t) ? -1 : 1;
  }
  bool ok() const { return true; }

  bool run(int64_t job) {
    const Format& format = task_.format;
    for (int lane = 0; lane < kLanes; ++lane) look_up(job, lane);
    transform();
    const int64_t row = job / format.groups() * kLanes;
    const int64_t column = job % format.groups() * format.group;
    const int64_t rows = std::min<int64_t>(kLanes, format.rows - row);
    const int64_t columns = std::min<int64_t>(format.group, format.length - column);
    for (int64_t lane = 0; lane < rows; ++lane) {
      const float factor = from_half(task_.scales[job * kLanes + lane]) * 0x1p-12f;
      float* target = task_.weight + (row + lane) * format.length + column;
      for (int64_t t = 0; t < columns; ++t) {
        target[t] = static_cast<float>(values_[t * kLanes + lane] * signs_[t]) * factor;
      }
    }
    return true;
  }

 private:
  // The bits that begin there, the first one lowest; machines are little-endian.
  static uint32_t window_at(const uint8_t* bytes) {
    uint32_t window;
    std::memcpy(&window, bytes, sizeof window);
    return window;
  }

  void look_up(int64_t job, int lane) {
    const Format& format = task_.format;
    const int size = int(format.block_bytes());
    const uint8_t* codes = task_.codes + job * size * kLanes + lane * 4;
    uint8_t string[kMaxGroup * 6 / 8 + 8];  // the last four bytes, the block, four of zeros
    for (int i = 0; i < size; i += 4) std::memcpy(string + 4 + i, codes + i * kLanes, 4);
    std::memcpy(string, string + size, 4);
    std::memset(string + size + 4, 0, 4);
    const uint32_t mask = (1u << format.state_bits) - 1;
    unsigned first = 32 + format.bits - format.state_bits;
    for (int t = 0; t < format.group; ++t, first += format.bits) {
      const uint32_t window = window_at(string + first / 8);
      values_[t * kLanes + lane] = task_.table[(window >> (first % 8)) & mask];
    }
  }

  void transform() {
    const int group = task_.format.group;
    for (int half = 1; half < group; half *= 2)
      for (int start = 0; start < group; start += 2 * half)
        for (int i = start * kLanes; i < (start + half) * kLanes; ++i) {
          const int16_t a = values_[i], b = values_[i + half * kLanes];
          values_[i] = static_cast<int16_t>(a + b);
          values_[i + half * kLanes] = static_cast<int16_t>(a - b);
        }
  }

  const DecodeTask& task_;
  int16_t values_[kMaxGroup * kLanes];
  int16_t signs_[kMaxGroup];
};

}  // namespace

// Decode to weight[row * length + column].
ONNXCOMP_EXPORT int32_t onnxcomp_hyper_decode(const uint8_t* codes, const uint16_t* scales,
                                              const int8_t* table, int64_t rows, int64_t length,
                                              int32_t bits, int32_t state_bits, int32_t group,
                                              int32_t threads, float* weight) {
  const Format format = {rows, length, bits, state_bits, group};
  if (!format.valid()) return kInvalid;
  try {
    const DecodeTask task = {format, codes, scales, table, weight};
    return for_each_job<Decoder>(format.jobs(), threads, task);
  } catch (const std::exception&) {
    return kNoMemory;
  }
}
