// Element types of activations, and memory for one call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#include "abi.h"

namespace onnxcomp {

struct Half {
  uint16_t bits;
};
struct Brain {
  uint16_t bits;
};

template <class T>
constexpr int kTypeOf = kUndefined;
template <>
inline constexpr int kTypeOf<float> = kFloat;
template <>
inline constexpr int kTypeOf<Half> = kFloat16;
template <>
inline constexpr int kTypeOf<Brain> = kBfloat16;
template <>
inline constexpr int kTypeOf<int8_t> = kInt8;
template <>
inline constexpr int kTypeOf<int32_t> = kInt32;
template <>
inline constexpr int kTypeOf<int64_t> = kInt64;

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory for one call, aligned to cache lines, not initialised.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(count == 0 ? nullptr
                         : static_cast<T*>(::operator new(static_cast<size_t>(count) * sizeof(T),
                                                          std::align_val_t{64}))) {}
  ~Scratch() { ::operator delete(data_, std::align_val_t{64}); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

// Uninitialised memory of one run, kept for the next one on the same thread: small runs allocate
// nothing and find it in the cache. Only one at a time may live on a thread; large ones are not kept.
class ThreadScratch {
 public:
  ThreadScratch() = default;
  ThreadScratch(const ThreadScratch&) = delete;
  ThreadScratch& operator=(const ThreadScratch&) = delete;

  void Reserve(int64_t bytes) {
    if (bytes > kKept) {
      own_ = std::make_unique<Scratch<char>>(bytes);
      data_ = own_->get();
      return;
    }
    thread_local std::unique_ptr<Scratch<char>> kept;
    thread_local int64_t size = 0;
    if (bytes > size) {
      size = 0;
      kept.reset();
      kept = std::make_unique<Scratch<char>>(bytes);
      size = bytes;
    }
    data_ = kept == nullptr ? nullptr : kept->get();
  }

  template <class T>
  T* As(int64_t offset) const {
    return reinterpret_cast<T*>(data_ + offset);
  }

 private:
  static constexpr int64_t kKept = int64_t{1} << 22;  // bytes

  std::unique_ptr<Scratch<char>> own_;
  char* data_ = nullptr;
};

}  // namespace onnxcomp
