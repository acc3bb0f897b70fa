// Products of small tiles on tensor cores: float16 factors, float32 sums.
//
// The shape m16n8k16: A (16 rows, 16 terms), B (16 terms, 8 columns). Lane l has g = l / 4 and
// q = l mod 4:
//   A word 0: row g,     terms 2q, 2q + 1      B word 0: terms 2q, 2q + 1 of column g
//   A word 1: row g + 8, terms 2q, 2q + 1      B word 1: terms 2q + 8, 2q + 9 of column g
//   A word 2: row g,     terms 2q + 8, 2q + 9  sums 0, 1: row g,     columns 2q, 2q + 1
//   A word 3: row g + 8, terms 2q + 8, 2q + 9  sums 2, 3: row g + 8, columns 2q, 2q + 1
// (PTX ISA, "Matrix fragments for mma.m16n8k16"). Which term is which does not matter as long as A
// and B agree: here the four terms of a lane are four neighbours.
#pragma once

#include "gpu/simt.h"

namespace onnxcomp::gpu {

struct Fragment {
  uint32_t word[4];
};

// Sums of kTiles tiles of 8 columns.
template <int kTiles>
struct Sums {
  float value[kTiles][4];
};

#if !ONNXCOMP_ON_GPU
inline float HalfAt(uint32_t word, int place) {
  return HalfToFloat(static_cast<uint16_t>(word >> (16 * place)));
}

template <int kTiles>
inline void EmulateMma(const Warp& warp, PerThread<Fragment>& a, PerThread<Vector>& b, int first,
                       PerThread<Sums<kTiles>>& sums, int tile) {
  const int base = warp.index * kWarp;
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4;  // of eight; i / 2 says which eight
      const int column = 2 * (lane % 4) + i % 2;
      double sum = sums[base + lane].value[tile][i];
      for (int quarter = 0; quarter < 4; ++quarter) {
        const Fragment& left = a[base + row * 4 + quarter];
        const Vector& right = b[base + column * 4 + quarter];
        for (int term = 0; term < 4; ++term) {
          const float x = HalfAt(left.word[i / 2 + term / 2 * 2], term % 2);
          sum += static_cast<double>(x) * HalfAt(right.word[first + term / 2], term % 2);
        }
      }
      sums[base + lane].value[tile][i] = static_cast<float>(sum);
    }
  }
}
#endif

// sums[tile] += a * (words `first` and `first` + 1 of b), by all threads of a warp.
template <int kTiles>
ONNXCOMP_DEVICE void Mma(const Warp& warp, PerThread<Fragment>& a, PerThread<Vector>& b, int first,
                         PerThread<Sums<kTiles>>& sums, int tile) {
#if ONNXCOMP_ON_GPU
  const uint32_t* x = a[0].word;
  const uint32_t* y = b[0].word + first;
  float* s = sums[0].value[tile];
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3])
      : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]));
#else
  ONNXCOMP_UNROLL
  for (int half = 0; half < 2; ++half) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
        "{%0, %1, %2, %3};"
        : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3])
        : "r"(x[2 * half]), "r"(x[2 * half + 1]), "r"(y[half]));
  }
#endif
#else
  EmulateMma(warp, a, b, first, sums, tile);
#endif
}

}  // namespace onnxcomp::gpu
