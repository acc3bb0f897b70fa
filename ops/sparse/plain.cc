// The form that is right on every machine.

#include <cstring>

#include "common/float16.h"
#include "sparse/format.h"

namespace onnxcomp::sparse {
namespace {

constexpr bool kBiased = false;

struct Line {
  float v[kLanes];
};
struct Sums {
  int32_t v[kLanes];
};
struct Word {
  const int8_t* codes;
};

template <class To, class Op>
inline To Each(const Op& op) {
  To to;
  for (int i = 0; i < kLanes; ++i) to.v[i] = op(i);
  return to;
}

inline Line Zero() { return Line{}; }
inline Line Load(const float* x) { return Each<Line>([x](int i) { return x[i]; }); }
inline void Store(const Line& a, float* x) {
  for (int i = 0; i < kLanes; ++i) x[i] = a.v[i];
}
inline Line LoadCodes(const int8_t* codes) {
  return Each<Line>([codes](int i) { return static_cast<float>(codes[i]); });
}
inline Line Broadcast(float x) { return Each<Line>([x](int) { return x; }); }
inline Line Add(const Line& a, const Line& b) {
  return Each<Line>([&](int i) { return a.v[i] + b.v[i]; });
}
inline Line Multiply(const Line& a, const Line& b) {
  return Each<Line>([&](int i) { return a.v[i] * b.v[i]; });
}
inline Line MultiplyAdd(const Line& a, const Line& b, const Line& c) {
  return Each<Line>([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline float Sum(Line a) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) a.v[i] += a.v[i + half];
  }
  return a.v[0];
}

inline Sums Nothing() { return Sums{}; }
inline Word LoadWord(const int8_t* codes) { return {codes}; }
inline Sums Bias(const Sums& sums, const Word&) { return sums; }
inline Sums Minus(const Sums& sums, const Sums&) { return sums; }
inline Sums Dot(const Sums& sums, const Word& word, const int8_t* x) {
  return Each<Sums>([&](int i) {
    int32_t sum = sums.v[i];
    for (int k = 4 * i; k < 4 * i + 4; ++k) sum += word.codes[k] * x[k];
    return sum;
  });
}
inline Line ToLine(const Sums& sums) {
  return Each<Line>([&](int i) { return static_cast<float>(sums.v[i]); });
}

void Expand(const uint8_t* bits, int64_t words, const int8_t* codes, int8_t* out) {
  for (int64_t i = 0; i < words; ++i, bits += 8, out += kWord) {
    uint64_t word = 0;
    std::memcpy(&word, bits, sizeof word);
    std::memset(out, 0, kWord);
    for (; word != 0; word &= word - 1) out[__builtin_ctzll(word)] = *codes++;
  }
}

void FromHalf(const uint16_t* halves, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = HalfToFloat(halves[i]);
}

}  // namespace
}  // namespace onnxcomp::sparse

#include "sparse/products.h"

namespace onnxcomp::sparse {

const Isa& PlainIsa() {
  static const Isa isa{"plain", 0, 0, Expand, FromHalf, ProductInt8, ProductExact};
  return isa;
}

}  // namespace onnxcomp::sparse
