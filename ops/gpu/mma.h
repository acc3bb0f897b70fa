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

#include <type_traits>

#include "gpu/async.h"

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
// What a lane brings to a product.
struct MmaLane {
  uint32_t a[4], b[2];
  void* sums;
};

// Products of all lanes, with `kTerms` terms in a word that `term(word, i)` takes out.
template <int kTerms, class Sum, class Term>
void EmulateMmaOf(void* const* lanes, const Term& term) {
  constexpr int kDepth = 8 * kTerms;
  Sum a[16][kDepth];
  Sum b[8][kDepth];
  const auto lane = [&](int l) { return static_cast<MmaLane*>(lanes[l]); };
  for (int l = 0; l < kWarp; ++l) {
    for (int word = 0; word < 4; ++word) {
      for (int i = 0; i < kTerms; ++i) {
        const int k = l % 4 * kTerms + i + word / 2 * (kDepth / 2);
        a[l / 4 + word % 2 * 8][k] = term(lane(l)->a[word], i);
        if (word % 2 == 0) b[l / 4][k] = term(lane(l)->b[word / 2], i);
      }
    }
  }
  using Result = std::conditional_t<std::is_same_v<Sum, int>, int, float>;
  for (int l = 0; l < kWarp; ++l) {
    auto* sums = static_cast<Result*>(lane(l)->sums);
    for (int i = 0; i < 4; ++i) {
      const Sum* row = a[l / 4 + i / 2 * 8];
      const Sum* column = b[2 * (l % 4) + i % 2];
      Sum sum = sums[i];
      for (int k = 0; k < kDepth; ++k) sum += row[k] * column[k];
      sums[i] = static_cast<Result>(sum);
    }
  }
}

inline void EmulateMma(void* const* lanes) {
  EmulateMmaOf<2, double>(lanes, [](uint32_t word, int i) {
    return static_cast<double>(HalfToFloat(static_cast<uint16_t>(word >> (16 * i))));
  });
}

inline void EmulateMmaBrains(void* const* lanes) {
  EmulateMmaOf<2, double>(lanes, [](uint32_t word, int i) {
    return static_cast<double>(BitsToFloat(i == 0 ? word << 16 : word & 0xffff0000u));
  });
}

inline void EmulateMmaBytes(void* const* lanes) {
  EmulateMmaOf<4, int>(lanes, [](uint32_t word, int i) {
    return static_cast<int>(static_cast<int8_t>(word >> (8 * i)));
  });
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

// The same on registers, for compute capability 8.0 and newer: sums (4) += a (4 words) * (b0, b1).
ONNXCOMP_THREAD void MmaHalves(float* s, const uint32_t* a, uint32_t b0, uint32_t b1) {
#if ONNXCOMP_ON_GPU && __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#elif ONNXCOMP_IN_EMULATOR
  MmaLane lane{{a[0], a[1], a[2], a[3]}, {b0, b1}, s};
  emulator::MeetWarp("mma", &lane, EmulateMma);
#else
  (void)s, (void)a, (void)b0, (void)b1;
#endif
}

// Of bfloat16.
ONNXCOMP_THREAD void MmaBrains(float* s, const uint32_t* a, uint32_t b0, uint32_t b1) {
#if ONNXCOMP_ON_GPU && __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#elif ONNXCOMP_IN_EMULATOR
  MmaLane lane{{a[0], a[1], a[2], a[3]}, {b0, b1}, s};
  emulator::MeetWarp("mma bf16", &lane, EmulateMmaBrains);
#else
  (void)s, (void)a, (void)b0, (void)b1;
#endif
}

// m16n8k32 of int8, summed in int32. A word has four neighbouring terms where float16 has two.
ONNXCOMP_THREAD void MmaBytes(int* s, const uint32_t* a, uint32_t b0, uint32_t b1) {
#if ONNXCOMP_ON_GPU && __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(s[0]), "+r"(s[1]), "+r"(s[2]), "+r"(s[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#elif ONNXCOMP_IN_EMULATOR
  MmaLane lane{{a[0], a[1], a[2], a[3]}, {b0, b1}, s};
  emulator::MeetWarp("mma s8", &lane, EmulateMmaBytes);
#else
  (void)s, (void)a, (void)b0, (void)b1;
#endif
}

}  // namespace onnxcomp::gpu
