// The hash of spec.md section 3.
//
// Internal linkage: each translation unit gets its own copy, compiled with its own flags.
#pragma once

#include <cstdint>

#include "common/device.h"

namespace onnxcomp::hash {
namespace {

// A bijection of the integers below 2^31. Arithmetic modulo 2^32 suffices: only low bits count.
ONNXCOMP_DEVICE uint32_t Mix(uint32_t key) {
  uint32_t x = key * 741103597u + 506832693u;
  for (int round = 0; round < 4; ++round) {
    x = (x * (2u * x + 1u)) & 0x7fffffffu;
    x = (x >> 15) | ((x & 0x7fffu) << 16);
  }
  return x;
}

ONNXCOMP_DEVICE int64_t Reduce(uint32_t hash, int64_t count) {
  return static_cast<int64_t>((static_cast<uint64_t>(hash) * static_cast<uint64_t>(count)) >> 31);
}

}  // namespace
}  // namespace onnxcomp::hash
