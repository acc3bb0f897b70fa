// The whole weight, decoded, for groups of 128 weights: half of the transform on tensor cores.
//
// Lane 4 g + q decodes weights 32 q + 4 s + j of rows g and g + 8 as fragments of eight products
// (s = 0 .. 7), whose right matrix is H_16 over (q, j); H_8 over s is butterflies in registers. All
// sums are integers below 2^15, so that float32 has them exactly. A lane ends with 32 neighbours of
// its two rows; rows pass through shared memory so that 16 or 32 lanes write 256 or 512 bytes in a row.
#pragma once

#include "gpu/launch.h"
#include "gpu/mma.h"
#include "hyper/gpu_ring.h"

namespace onnxcomp::hyper {

template <class TableOf, int kStagesOf>
struct DecodePairs {
  using Table = TableOf;
  static constexpr int K = Table::kBits;
  static constexpr int kStages = kStagesOf;
  static constexpr int kWarpCount = 16;
  static constexpr int kBlockThreads = kWarpCount * gpu::kWarp;
  static constexpr int kBlocks = 1;
  static constexpr int kTransit = 4096;  // bytes of a warp's rows: 16 of two bytes, or 8 of four
  using Ring = CodeRing<K, 1, kStages>;
  using Words = typename Ring::Words;

  static constexpr int kRingsAt = Table::kBytes;
  static constexpr int kTransitAt = kRingsAt + kWarpCount * Ring::kBytes;
  static constexpr int kStagedAt = kTransitAt + kWarpCount * kTransit;
  static constexpr int kSharedBytes = kStagedAt + Table::kStaged;

  PairWeight weight;
  gpu::Type type;
  void* out;     // (rows, length)
  bool aligned;  // rows begin at multiples of 16 bytes
  int blocks;

  // Sums of the products: [s][tile of 8 columns][two of each row].
  struct Sums {
    float value[8][2][4];
  };

  ONNXCOMP_THREAD void operator()(gpu::Block& block) const {
    const int warp = gpu::ThreadIndex() / gpu::kWarp;
    const int lane = gpu::ThreadIndex() % gpu::kWarp;
    const int64_t units = weight.panels * weight.groups;
    const int64_t stride = static_cast<int64_t>(blocks) * kWarpCount;
    const Ring ring(block.shared + kRingsAt + warp * Ring::kBytes, lane, 0);
    int64_t copied = block.x * kWarpCount + warp;
    const auto copy = [&](uint32_t stage) {
      if (copied < units) {
        ring.Copy(stage, weight.codes + copied * Ring::kPanelBytes, weight.scales + copied * 32,
                  true, lane, 0);
        copied += stride;
      }
      gpu::CloseCopies();
    };
    auto* staged = reinterpret_cast<int8_t*>(block.shared + kStagedAt);
    Table::Stage(weight, staged, gpu::ThreadIndex(), kBlockThreads);
    ONNXCOMP_UNROLL
    for (int i = 0; i < kStages - 1; ++i) copy(static_cast<uint32_t>(i * Ring::kUnitBytes));
    block.Sync();
    Table::Fill(weight, staged, block.shared, gpu::ThreadIndex(), kBlockThreads);
    block.Sync();
    uint32_t table_copy = Table::Copy(lane);
    gpu::Pin(table_copy);
    uint32_t hadamard[2][2];
    MakeHadamard(lane, hadamard);
    char* transit = block.shared + kTransitAt + warp * kTransit;
    uint32_t stage = 0;
    uint32_t next = (kStages - 1) * Ring::kUnitBytes;
    for (int64_t unit = block.x * kWarpCount + warp; unit < units; unit += stride) {
      gpu::AwaitCopies<kStages - 2>();
      gpu::SyncWarp();
      copy(next);
      next += Ring::kUnitBytes;
      if (next == Ring::kBytes) next = 0;
      Words words;
      ring.Read(stage, words);
      Sums sums;
      Transform(block.shared, table_copy, words, hadamard, sums);
      const int64_t panel = unit / weight.groups;
      const auto group = static_cast<int>(unit - panel * weight.groups);
      Write(panel, group, lane, words, sums, transit);
      stage += Ring::kUnitBytes;
      if (stage == Ring::kBytes) stage = 0;
    }
  }

 private:
  // H_16 as the right matrix: column c of tile n is (q, j) = (c / 2, 2 n + c mod 2), and term (q, j)
  // is the lane's weight j of its four.
  static ONNXCOMP_THREAD void MakeHadamard(int lane, uint32_t (&b)[2][2]) {
    const int c = lane / 4;
    ONNXCOMP_UNROLL
    for (int n = 0; n < 2; ++n) {
      ONNXCOMP_UNROLL
      for (int word = 0; word < 2; ++word) {
        b[n][word] = 0;
        ONNXCOMP_UNROLL
        for (int e = 0; e < 2; ++e) {
          const int j = 2 * word + e;
          const int minus = gpu::Ones(static_cast<uint32_t>(lane % 4 & c / 2)) +
                            gpu::Ones(static_cast<uint32_t>(j & (2 * n + c % 2)));
          b[n][word] |= (minus % 2 != 0 ? 0xbc00u : 0x3c00u) << (16 * e);
        }
      }
    }
  }

  static ONNXCOMP_THREAD void Transform(const char* table, uint32_t copy, const Words& words,
                                        const uint32_t (&hadamard)[2][2], Sums& sums) {
    auto& value = sums.value;
    ONNXCOMP_UNROLL
    for (int s = 0; s < 8; ++s) {
      uint32_t a[4];
      ONNXCOMP_UNROLL
      for (int i = 0; i < 4; ++i) {
        a[i] = Table::Pair(table, copy, words.word[0][i % 2], 2 * s + i / 2);
      }
      ONNXCOMP_UNROLL
      for (int n = 0; n < 2; ++n) {
        ONNXCOMP_UNROLL
        for (int i = 0; i < 4; ++i) value[s][n][i] = 0.0f;
        gpu::MmaHalves(value[s][n], a, hadamard[n][0], hadamard[n][1]);
      }
    }
    ONNXCOMP_UNROLL
    for (int stride = 1; stride < 8; stride *= 2) {
      ONNXCOMP_UNROLL
      for (int s = 0; s < 8; ++s) {
        if ((s & stride) != 0) continue;
        ONNXCOMP_UNROLL
        for (int i = 0; i < 8; ++i) {
          const float a = value[s][i / 4][i % 4];
          const float b = value[s | stride][i / 4][i % 4];
          value[s][i / 4][i % 4] = a + b;
          value[s | stride][i / 4][i % 4] = a - b;
        }
      }
    }
  }

  // Weight 32 q + t of the lane's row g + 8 half, with its sign, times `scale`: signs of t = 4 s + 2 n
  // + e are those of spec.md. A zero stays positive.
  static ONNXCOMP_THREAD float At(const Sums& sums, int half, int t, float low, float high) {
    const float h = sums.value[t / 4][t / 2 % 2][2 * half + t % 2];
    const float scale = t < 16 ? low : high;
    const bool minus = ((0x7888u >> (t % 16)) & 1u) != 0;
#if ONNXCOMP_ON_GPU
    return __fmaf_rn(h, minus ? -scale : scale, 0.0f);
#else
    return h * (minus ? -scale : scale) + 0.0f;
#endif
  }

  ONNXCOMP_THREAD void Write(int64_t panel, int group, int lane, const Words& words,
                             const Sums& sums, char* transit) const {
    const int q = lane % 4;
    ONNXCOMP_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float scale =
          gpu::FloatOfHalf(static_cast<uint16_t>(words.scale[0][half])) * (1.0f / 4096.0f);
      const float low = ((0x7888u >> (2 * q)) & 1u) != 0 ? -scale : scale;
      const float high = ((0x7888u >> (2 * q + 1)) & 1u) != 0 ? -scale : scale;
      if (type == gpu::Type::kFloat32) {
        StageFloats(sums, half, lane, low, high, transit);
        gpu::SyncWarp();
        StoreFloats(panel * 16 + 8 * half, group, lane, transit);
        gpu::SyncWarp();
      } else {
        StageHalves(sums, half, lane, low, high, transit);
      }
    }
    if (type == gpu::Type::kFloat32) return;
    gpu::SyncWarp();
    StoreHalves(panel * 16, group, lane, transit);
    gpu::SyncWarp();
  }

  // Where chunk c of 16 bytes of a row lies: lanes that write or read at once meet in no bank.
  static ONNXCOMP_THREAD int HalfPlace(int row, int c) {
    return row * 256 + ((c & 12) | ((c & 3) ^ (c >> 3 | (row & 1) << 1))) * 16;
  }
  static ONNXCOMP_THREAD int FloatPlace(int row, int c) {
    return row * 512 + (c ^ (c >> 3 | (row & 1) << 2)) * 16;
  }

  ONNXCOMP_THREAD void StageHalves(const Sums& sums, int half, int lane, float low, float high,
                                   char* transit) const {
    const int row = lane / 4 + 8 * half;
    ONNXCOMP_UNROLL
    for (int v = 0; v < 4; ++v) {
      Vector vector;
      ONNXCOMP_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float a = At(sums, half, 8 * v + 2 * i, low, high);
        const float b = At(sums, half, 8 * v + 2 * i + 1, low, high);
        vector.word[i] = type == gpu::Type::kFloat16
                             ? gpu::PackHalves(a, b)
                             : gpu::PackLow(gpu::BrainOfFloat(a), gpu::BrainOfFloat(b));
      }
      *reinterpret_cast<Vector*>(transit + HalfPlace(row, lane % 4 * 4 + v)) = vector;
    }
  }

  static ONNXCOMP_THREAD void StageFloats(const Sums& sums, int half, int lane, float low,
                                          float high, char* transit) {
    ONNXCOMP_UNROLL
    for (int v = 0; v < 8; ++v) {
      Vector vector;
      ONNXCOMP_UNROLL
      for (int i = 0; i < 4; ++i) {
        vector.word[i] = gpu::BitsOfFloat(At(sums, half, 4 * v + i, low, high));
      }
      *reinterpret_cast<Vector*>(transit + FloatPlace(lane / 4, lane % 4 * 8 + v)) = vector;
    }
  }

  // 16 rows from `first` on: half a warp writes one.
  ONNXCOMP_THREAD void StoreHalves(int64_t first, int group, int lane, const char* transit) const {
    const int c = lane % 16;
    const int64_t column = group * int64_t{kPairGroup} + 8 * c;
    int64_t row = first + lane / 16;
    auto* to = static_cast<uint16_t*>(out) + row * weight.length + column;
    if (IsWhole(first + 16, group)) {
      ONNXCOMP_UNROLL
      for (int i = 0; i < 8; ++i) {
        const char* from = transit + HalfPlace(2 * i + lane / 16, c);
        *reinterpret_cast<Vector*>(to) = *reinterpret_cast<const Vector*>(from);
        to += 2 * weight.length;
      }
      return;
    }
    ONNXCOMP_ROLL
    for (int i = 0; i < 8; ++i) {
      Store(to, row, column, transit + HalfPlace(2 * i + lane / 16, c));
      to += 2 * weight.length;
      row += 2;
    }
  }

  // Eight rows, one after the other.
  ONNXCOMP_THREAD void StoreFloats(int64_t first, int group, int lane, const char* transit) const {
    const int64_t column = group * int64_t{kPairGroup} + 4 * lane;
    auto* to = static_cast<uint32_t*>(out) + first * weight.length + column;
    if (IsWhole(first + 8, group)) {
      ONNXCOMP_UNROLL
      for (int i = 0; i < 8; ++i) {
        *reinterpret_cast<Vector*>(to) =
            *reinterpret_cast<const Vector*>(transit + FloatPlace(i, lane));
        to += weight.length;
      }
      return;
    }
    ONNXCOMP_ROLL
    for (int i = 0; i < 8; ++i) {
      Store(to, first + i, column, transit + FloatPlace(i, lane));
      to += weight.length;
    }
  }

  // Whether rows below `end` and all columns of a group exist, in vectors of 16 bytes.
  ONNXCOMP_THREAD bool IsWhole(int64_t end, int group) const {
    return aligned && end <= weight.rows && (group + int64_t{1}) * kPairGroup <= weight.length;
  }

  // 16 bytes to `to`, which is `column` of a row, as far as they are in the weight.
  template <class Element>
  ONNXCOMP_THREAD void Store(Element* to, int64_t row, int64_t column, const char* from) const {
    if (row >= weight.rows) return;
    ONNXCOMP_ROLL
    for (int i = 0; i < static_cast<int>(16 / sizeof(Element)); ++i) {
      if (column + i < weight.length) to[i] = reinterpret_cast<const Element*>(from)[i];
    }
  }
};

}  // namespace onnxcomp::hyper
