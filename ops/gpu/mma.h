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

#if ONNXCOMP_IN_EMULATOR
inline float HalfAt(uint32_t word, int place) {
  return HalfToFloat(static_cast<uint16_t>(word >> (16 * place)));
}

// What a lane brings to a product.
struct MmaLane {
  uint32_t a[4], b[2];
  float* sums;
};

inline void EmulateMma(void* const* lanes) {
  float a[16][16];
  float b[8][16];
  const auto lane = [&](int l) { return static_cast<MmaLane*>(lanes[l]); };
  for (int l = 0; l < kWarp; ++l) {
    for (int word = 0; word < 4; ++word) {
      for (int e = 0; e < 2; ++e) {
        const int term = l % 4 * 2 + e + word / 2 * 8;
        a[l / 4 + word % 2 * 8][term] = HalfAt(lane(l)->a[word], e);
        if (word % 2 == 0) b[l / 4][term] = HalfAt(lane(l)->b[word / 2], e);
      }
    }
  }
  for (int l = 0; l < kWarp; ++l) {
    for (int i = 0; i < 4; ++i) {
      const float* row = a[l / 4 + i / 2 * 8];
      const float* column = b[2 * (l % 4) + i % 2];
      double sum = static_cast<double>(lane(l)->sums[i]);
      for (int term = 0; term < 16; ++term) sum += static_cast<double>(row[term]) * column[term];
      lane(l)->sums[i] = static_cast<float>(sum);
    }
  }
}
#endif

// sums[tile] += a * (words `first` and `first` + 1 of b), by all threads of a warp.
template <int kTiles>
ONNXCOMP_DEVICE void Mma(const Warp&, PerThread<Fragment>& a, PerThread<Vector>& b, int first,
                         PerThread<Sums<kTiles>>& sums, int tile) {
  const uint32_t* x = a[0].word;
  const uint32_t* y = b[0].word + first;
  float* s = sums[0].value[tile];
#if ONNXCOMP_ON_GPU
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
#elif ONNXCOMP_IN_EMULATOR
  MmaLane lane{{x[0], x[1], x[2], x[3]}, {y[0], y[1]}, s};
  emulator::MeetWarp("mma", &lane, EmulateMma);
#else
  (void)x, (void)y, (void)s;
#endif
}

}  // namespace onnxcomp::gpu
