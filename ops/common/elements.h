// Element types of activations, and memory for one call.
#pragma once

#include <cstddef>
#include <cstdint>
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
constexpr int kTypeOf<float> = kFloat;
template <>
constexpr int kTypeOf<Half> = kFloat16;
template <>
constexpr int kTypeOf<Brain> = kBfloat16;
template <>
constexpr int kTypeOf<int8_t> = kInt8;
template <>
constexpr int kTypeOf<int32_t> = kInt32;
template <>
constexpr int kTypeOf<int64_t> = kInt64;

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

}  // namespace onnxcomp
