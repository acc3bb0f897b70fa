// Instructions on words that compilers do not find by themselves.
#pragma once

#include "gpu/async.h"

namespace onnxcomp::gpu {

// Byte i of the result is byte `nibble i of selector & 7` of the eight bytes high:low, or, where bit
// 3 of the nibble is set, eight copies of that byte's top bit.
ONNXCOMP_THREAD uint32_t Permute(uint32_t low, uint32_t high, uint32_t selector) {
#if defined(__CUDACC__)
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selector));
  return result;
#else
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> (4 * i) & 15u;
    auto byte = static_cast<uint32_t>(bytes >> (8 * (nibble & 7u))) & 255u;
    if (nibble & 8u) byte = (byte & 128u) != 0 ? 255u : 0u;
    result |= byte << (8 * i);
  }
  return result;
#endif
}

// (a & b) | c as one instruction; nvcc makes two of it.
ONNXCOMP_THREAD uint32_t AndOr(uint32_t a, uint32_t b, uint32_t c) {
#if defined(__CUDACC__)
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
#else
  return (a & b) | c;
#endif
}

// Keeps a value in its register: without it nvcc computes lane offsets anew in every round.
ONNXCOMP_THREAD void Pin(uint32_t& value) {
#if defined(__CUDACC__)
  asm volatile("" : "+r"(value));
#else
  (void)value;
#endif
}

// Two float32 as float16, a in the low half.
ONNXCOMP_THREAD uint32_t PackHalves(float a, float b) {
#if defined(__CUDACC__)
  const __half2 pair = __floats2half2_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&pair);
#else
  return HalfOfFloat(a) | static_cast<uint32_t>(HalfOfFloat(b)) << 16;
#endif
}

// Both float16 of `pair` times `factor` (a float16 in both halves).
ONNXCOMP_THREAD uint32_t MultiplyHalves(uint32_t pair, uint32_t factor) {
#if defined(__CUDACC__)
  uint32_t result;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(pair), "r"(factor));
  return result;
#else
  const auto at = [](uint32_t word, int i) { return HalfToFloat(static_cast<uint16_t>(word >> (16 * i))); };
  return PackHalves(at(pair, 0) * at(factor, 0), at(pair, 1) * at(factor, 1));
#endif
}

// Four products of bytes added to `sum`: of signed ones, or with unsigned b.
ONNXCOMP_THREAD int DotBytes(uint32_t a, uint32_t b, int sum) {
#if defined(__CUDACC__)
  int result;
  asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(sum));
  return result;
#else
  for (int i = 0; i < 32; i += 8) sum += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
  return sum;
#endif
}

ONNXCOMP_THREAD int DotUnsigned(uint32_t a, uint32_t b, int sum) {
#if defined(__CUDACC__)
  int result;
  asm("dp4a.s32.u32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(sum));
  return result;
#else
  for (int i = 0; i < 32; i += 8) sum += static_cast<int8_t>(a >> i) * static_cast<uint8_t>(b >> i);
  return sum;
#endif
}

// The number of set bits.
ONNXCOMP_DEVICE int Ones(uint32_t word) {
#if ONNXCOMP_ON_GPU
  return __popc(word);
#else
  int count = 0;
  for (; word != 0; word &= word - 1) ++count;
  return count;
#endif
}

// One bit of each lane: bit l of the result is lane l's.
ONNXCOMP_DEVICE uint32_t Ballot(bool bit) {
#if ONNXCOMP_ON_GPU
  return __ballot_sync(0xffffffffu, bit);
#else
  uint32_t word = 0;
  for (int lane = 0; lane < kWarp; ++lane) word |= Shuffle(bit ? 1u : 0u, lane) << lane;
  return word;
#endif
}

}  // namespace onnxcomp::gpu
