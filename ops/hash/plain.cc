// The form that is right on every machine.

#include "common/float16.h"
#include "hash/format.h"

namespace onnxcomp::hash {
namespace {

constexpr int kTileRows = 6;
constexpr int kPanels = 1;

struct Line {
  float v[kLanes];
};

template <class Op>
inline Line Each(const Op& op) {
  Line line;
  for (int i = 0; i < kLanes; ++i) line.v[i] = op(i);
  return line;
}

inline Line Zero() { return Line{}; }
inline Line Load(const float* x) { return Each([x](int i) { return x[i]; }); }
inline void Store(const Line& a, float* x) {
  for (int i = 0; i < kLanes; ++i) x[i] = a.v[i];
}
inline Line Broadcast(float x) { return Each([x](int) { return x; }); }
inline Line Add(const Line& a, const Line& b) {
  return Each([&](int i) { return a.v[i] + b.v[i]; });
}
inline Line Multiply(const Line& a, const Line& b) {
  return Each([&](int i) { return a.v[i] * b.v[i]; });
}
inline Line MultiplyAdd(const Line& a, const Line& b, const Line& c) {
  return Each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline Line Flip(const Line& a) {
  return Each([&](int i) { return -a.v[i]; });
}
inline float WidenOne(float x) { return x; }
inline float WidenOne(uint16_t x) { return HalfToFloat(x); }
inline float WidenOne(int8_t x) { return static_cast<float>(x); }
template <class T>
inline Line Widen(const T* x) {
  return Each([x](int i) { return WidenOne(x[i]); });
}

}  // namespace
}  // namespace onnxcomp::hash

#include "hash/kernels.h"

namespace onnxcomp::hash {

const Isa& PlainIsa() {
  static const Isa isa{kTileRows, kPanels, false, Product, ProductInt8, Decode};
  return isa;
}

}  // namespace onnxcomp::hash
