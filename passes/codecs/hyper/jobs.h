// What encoder and decoder of the hyperfunction format (ops/hyper/spec.md) share: sizes, float16,
// signs, and the work of one (panel, group) at a time on several threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#ifdef _WIN32
#define ONNXCOMP_EXPORT extern "C" __declspec(dllexport)
#else
#define ONNXCOMP_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace hyper {

constexpr int kLanes = 16;
constexpr int kMaxGroup = 256;
constexpr int kJobsAtOnce = 4;
enum Status : int32_t { kDone = 0, kInvalid = -1, kOutOfRange = -2, kNoMemory = -3 };

struct Format {
  int64_t rows;
  int64_t length;
  int bits;
  int state_bits;
  int group;

  int64_t panels() const { return (rows + kLanes - 1) / kLanes; }
  int64_t groups() const { return (length + group - 1) / group; }
  int64_t jobs() const { return panels() * groups(); }
  int64_t block_bytes() const { return group * bits / 8; }

  bool valid() const {
    const bool sizes = rows > 0 && length > 0 && bits >= 1 && bits <= 6;
    const bool state = state_bits >= bits + 2 && state_bits >= 6 && state_bits <= 12 &&
                       state_bits != 9 && state_bits != 11;
    return sizes && state && (group == 32 || group == 64 || group == 128 || group == 256);
  }
};

// Bit strings of sixteen rows, dwords of [lane][4], from their states [t][lane].
inline void pack(const Format& format, const uint16_t* path, uint8_t* codes) {
  const int bits = format.bits, stem_bits = format.state_bits - bits;
  uint32_t dword[kLanes] = {};
  int filled = 0;
  for (int t = 0; t < format.group; ++t) {
    for (int lane = 0; lane < kLanes; ++lane)
      dword[lane] |= uint32_t(path[t * kLanes + lane] >> stem_bits) << filled;
    filled += bits;
    if (filled < 32) continue;
    filled -= 32;
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int i = 0; i < 4; ++i) *codes++ = static_cast<uint8_t>(dword[lane] >> (8 * i));
      dword[lane] = uint32_t(path[t * kLanes + lane] >> stem_bits) >> (bits - filled);
    }
  }
}

// sign_t of the specification: x0 x1 + x2 x3 on both halves of the index.
inline bool bent(int i) { return (((i & 1) & (i >> 1)) ^ ((i >> 2) & (i >> 3) & 1)) != 0; }
inline bool sign_is_negative(int t) { return bent(t / 16) != bent(t % 16); }

// Nearest float16, ties to even; values from 65520 on give infinity.
inline uint16_t to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  bits &= 0x7FFFFFFF;
  if (bits >= 0x7F800000) return sign | (bits > 0x7F800000 ? 0x7E00 : 0x7C00);
  if (bits < 0x38800000) {  // below 2^-14: the float adder rounds to a multiple of 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    const float rounded = magnitude + 0.5f;
    std::memcpy(&bits, &rounded, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3F000000));
  }
  const uint32_t rounded = bits + 0xFFF + ((bits >> 13) & 1);
  const uint32_t half = (rounded - 0x38000000) >> 13;
  return static_cast<uint16_t>(sign | std::min<uint32_t>(half, 0x7C00));
}

inline float from_half(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t magnitude = half & 0x7FFF;
  float value;
  if (magnitude < 0x400) {
    value = static_cast<float>(magnitude) * 0x1p-24f;
  } else {
    const uint32_t bits = magnitude >= 0x7C00 ? 0x7F800000 | (magnitude & 0x3FF) << 13
                                              : (magnitude << 13) + 0x38000000;
    std::memcpy(&value, &bits, 4);
  }
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits |= sign;
  std::memcpy(&value, &bits, 4);
  return value;
}

// a b + c with one rounding, for processors without an instruction for it: the product is exact, and
// the sum is rounded to its odd neighbour before it is rounded to a float, as fused.py says.
inline float fused(float a, float b, float c) {
#ifdef __FP_FAST_FMAF
  return __builtin_fmaf(a, b, c);
#else
  const double product = double(a) * double(b), more = double(c), total = product + more;
  const double moved = total - product, error = (product - (total - moved)) + (more - moved);
  int64_t bits;
  std::memcpy(&bits, &total, sizeof bits);
  const int64_t step = (error > 0) == (total > 0) ? 1 : -1;
  bits += (error > 0 || error < 0) && (bits & 1) == 0 ? step : 0;
  double odd;
  std::memcpy(&odd, &bits, sizeof odd);
  return static_cast<float>(odd);
#endif
}

// Cache-line aligned array; empty when memory is short.
template <class T>
class Aligned {
 public:
  explicit Aligned(size_t size)
      : data_(static_cast<T*>(::operator new(std::max<size_t>(size, 1) * sizeof(T), kLine,
                                             std::nothrow))) {}
  ~Aligned() { ::operator delete(data_, kLine); }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
  T* get() const { return data_; }

 private:
  static constexpr std::align_val_t kLine{64};
  T* data_;
};

// Give every job to one of `threads` workers, each made from the task: Worker(task), ok(),
// run(job). Nothing in a worker throws but its constructor, when memory is short.
template <class Worker, class Task>
int32_t for_each_job(int64_t jobs, int threads, const Task& task, int at_once = kJobsAtOnce) {
  std::atomic<int64_t> next{0};
  std::atomic<int32_t> status{kDone};
  const auto work = [&] {
    std::unique_ptr<Worker> worker;
    try {
      worker.reset(new Worker(task));
    } catch (const std::bad_alloc&) {
    }
    if (!worker || !worker->ok()) {
      status = kNoMemory;
      return;
    }
    for (int64_t first; (first = next.fetch_add(at_once)) < jobs;)
      for (int64_t job = first; job < std::min(first + at_once, jobs); ++job)
        if (!worker->run(job)) status = kOutOfRange;
  };
  const int64_t wanted = std::min<int64_t>(threads, (jobs + at_once - 1) / at_once);
  std::vector<std::thread> others;
  others.reserve(static_cast<size_t>(std::max<int64_t>(wanted, 1)));
  try {
    for (int64_t i = 1; i < wanted; ++i) others.emplace_back(work);
  } catch (const std::system_error&) {
    // No more threads to be had: those that run do all the jobs.
  }
  work();
  for (std::thread& other : others) other.join();
  return status;
}

}  // namespace hyper
