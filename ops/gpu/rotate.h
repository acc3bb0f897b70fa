// Eight groups of 128 activations, rotated by one warp on tensor cores.
//
// z = H (sign x) with t = 8 i + j: H_128 is H_16 over i, one product of 16 terms for each j, and H_8
// over j, butterflies in the registers of a lane. The signs of spec.md go into the constant factor
// of the products and, for j = 3 and 7, behind them.
#pragma once

#include "gpu/bits.h"
#include "gpu/mma.h"
#include "gpu/prepare.h"

namespace onnxcomp::gpu {

constexpr int kRotatedTogether = 8;  // groups

// Lane 4 g + q brings weights 32 q .. 32 q + 31 of group g: of two-byte elements, four vectors. It
// takes z[j][i], weight 8 (g + 8 (i / 2)) + j of group 2 q + i mod 2.
ONNXCOMP_THREAD void RotateEight(const Vector (&x)[4], bool brain, float (&z)[8][4]) {
  const int lane = ThreadIndex() % kWarp;
  const uint32_t one = brain ? 0x3f80u : 0x3c00u;
  uint32_t h[4];
  ONNXCOMP_UNROLL
  for (int f = 0; f < 4; ++f) {
    h[f] = 0;
    ONNXCOMP_UNROLL
    for (int e = 0; e < 2; ++e) {
      const int i = lane % 4 * 4 + f / 2 * 2 + e;
      const int out = lane / 4 + f % 2 * 8;
      const uint32_t minus = (static_cast<uint32_t>(Ones(static_cast<uint32_t>(i & out))) ^
                              (0x7888u >> (i >> 1))) & 1u;
      h[f] |= (one | minus << 15) << (16 * e);
    }
  }
  ONNXCOMP_UNROLL
  for (int j = 0; j < 8; ++j) {
    const uint32_t flip = j < 4 ? 0u : 0x80000000u;  // of odd i
    const uint32_t half = j % 2 == 0 ? 0x5410u : 0x7632u;
    const uint32_t a[4] = {h[0] ^ flip, h[1] ^ flip, h[2] ^ flip, h[3] ^ flip};
    const uint32_t b0 = Permute(x[0].word[j / 2], x[1].word[j / 2], half);
    const uint32_t b1 = Permute(x[2].word[j / 2], x[3].word[j / 2], half);
    ONNXCOMP_UNROLL
    for (int i = 0; i < 4; ++i) z[j][i] = 0.0f;
    if (brain) {
      MmaBrains(z[j], a, b0, b1);
    } else {
      MmaHalves(z[j], a, b0, b1);
    }
    if (j % 4 != 3) continue;
    ONNXCOMP_UNROLL
    for (int i = 0; i < 4; ++i) z[j][i] = -z[j][i];
  }
  ONNXCOMP_UNROLL
  for (int stride = 1; stride < 8; stride *= 2) {
    ONNXCOMP_UNROLL
    for (int j = 0; j < 8; ++j) {
      if ((j & stride) != 0) continue;
      ONNXCOMP_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float a = z[j][i];
        const float b = z[j | stride][i];
        z[j][i] = a + b;
        z[j | stride][i] = a - b;
      }
    }
  }
}

// Columns 32 q .. 32 q + 31 of a group, from `column` of a row on, for RotateEight: zero beyond the
// row's end. `aligned`: rows begin at multiples of 16 bytes.
ONNXCOMP_THREAD void LoadRun(const void* x, int64_t row, int64_t length, int64_t column,
                             bool aligned, Vector (&run)[4]) {
  const auto* halves = static_cast<const uint16_t*>(x) + row * length + column;
  if (aligned && column + 32 <= length) {
    ONNXCOMP_UNROLL
    for (int r = 0; r < 4; ++r) run[r] = LoadFresh(reinterpret_cast<const Vector*>(halves) + r);
    return;
  }
  ONNXCOMP_UNROLL
  for (int r = 0; r < 4; ++r) {
    uint32_t* word = run[r].word;
    ONNXCOMP_ROLL
    for (int i = 8 * r; i < 8 * r + 8; ++i) {  // each one moves the others down
      const uint32_t half = column + i < length ? LoadFresh(halves + i) : 0u;
      word[0] = Funnel(word[0], word[1], 16);
      word[1] = Funnel(word[1], word[2], 16);
      word[2] = Funnel(word[2], word[3], 16);
      word[3] = word[3] >> 16 | half << 16;
    }
  }
}

}  // namespace onnxcomp::gpu
