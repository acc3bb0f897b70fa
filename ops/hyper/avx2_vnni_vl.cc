// AVX2 with AVX-512 VNNI and VL at 256 bits: machines with AVX-512 but without VBMI.

#include "hyper/avx2.h"

#include <immintrin.h>

#include <cstdint>

namespace onnxcomp::hyper {
namespace {

constexpr uint8_t kBias = 0x80;
constexpr const char* kIsaName = "avx2vnni";

inline void Dot(__m256i& sums, __m256i weights, __m256i x) {
  asm("vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(weights), "x"(x));
}

}  // namespace
}  // namespace onnxcomp::hyper

#include "hyper/avx2_kernels.h"

namespace onnxcomp::hyper {

const Isa& Avx2VnniVlIsa() { return ThisIsa(); }

}  // namespace onnxcomp::hyper
