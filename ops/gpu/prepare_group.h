// Activations rotated for products of warpgroups, in the order in which these read them.
//
// One block for each row: one power of two for the row brings it to float16, since float16 keeps 11
// bits over a range of 2^29. For each tile of kColumns rows of x and each group of 128 weights there
// are two matrices (kColumns, 64), in the swizzle that gpu/wgmma.h describes. Weight 32 q + 4 s + j of
// the group is term 16 s + 2 q + (j mod 2) + 8 (j div 2): the four terms of a lane in step s are four
// neighbours of its run.
#pragma once

#include "gpu/launch.h"
#include "gpu/rotate.h"

namespace onnxcomp::gpu {

template <int kColumns>
struct PrepareGroup {
  static constexpr int kBlocks = 2;
  static constexpr int kLine = 272;  // bytes of a group in shared memory, free of bank conflicts
  static constexpr int kStaging = kRotatedTogether * kLine;  // of a warp
  static constexpr int kTogether = kWarps * kRotatedTogether;

  Type type;      // float16 or bfloat16
  const void* x;  // (batch, length)
  int64_t batch, length;
  int groups;
  bool aligned;
  char* values;    // (tiles, groups, 2, kColumns, 64) float16
  float* factors;  // (batch,)
  int* counters;   // that the product needs at zero
  int count;

  static constexpr int64_t kSharedBytes = kWarps * kStaging + 64;

  ONNXCOMP_THREAD void operator()(Block& block) const {
    StartNextGrid();
    const int warp = ThreadIndex() / kWarp;
    const int lane = ThreadIndex() % kWarp;
    const bool exists = block.x < batch;
    AwaitPreviousGrid();
    if (block.x == 0) {
      for (int i = ThreadIndex(); i < count; i += kThreads) counters[i] = 0;
    }
    Vector run[4] = {};
    uint32_t most = 0;  // bits of magnitudes
    for (int first = warp * kRotatedTogether; first < groups; first += kTogether) {
      Load(block.x, exists, first + lane / 4, lane, run);
      ONNXCOMP_UNROLL
      for (int i = 0; i < 16; ++i) {
        const uint32_t word = run[i / 4].word[i % 4];
        const uint32_t low = word & 0x7fffu;
        const uint32_t high = word >> 16 & 0x7fffu;
        most = low > most ? low : most;
        most = high > most ? high : most;
      }
    }
    most = Most(block, warp, lane, most);
    const float inverse = Scale(block.x, exists, most);
    for (int first = warp * kRotatedTogether; first < groups; first += kTogether) {
      if (groups > kTogether) Load(block.x, exists, first + lane / 4, lane, run);
      float z[8][4];
      RotateEight(run, type == Type::kBfloat16, z);
      Write(block.x, first, lane, inverse, z, block.shared + warp * kStaging);
    }
  }

 private:
  ONNXCOMP_THREAD void Load(int64_t row, bool exists, int group, int lane,
                            Vector (&run)[4]) const {
    ONNXCOMP_UNROLL
    for (int r = 0; r < 4; ++r) run[r] = Vector{};
    if (exists && group < groups) {
      LoadRun(x, row, length, int64_t{128} * group + lane % 4 * 32, aligned, run);
    }
  }

  // The greatest of the block.
  static ONNXCOMP_THREAD uint32_t Most(const Block& block, int warp, int lane, uint32_t most) {
    ONNXCOMP_UNROLL
    for (int mask = 1; mask < kWarp; mask *= 2) {
      const uint32_t other = ShuffleXor(most, mask);
      most = other > most ? other : most;
    }
    auto* all = reinterpret_cast<uint32_t*>(block.shared + kWarps * kStaging);
    if (lane == 0) all[warp] = most;
    block.Sync();
    ONNXCOMP_UNROLL
    for (int i = 0; i < kWarps; ++i) most = all[i] > most ? all[i] : most;
    return most;
  }

  // The power of two that brings the rotated row below 2^15, and its inverse to memory. `most` is
  // the greatest magnitude's bits; that of z is at most 128 times as large.
  ONNXCOMP_THREAD float Scale(int64_t row, bool exists, uint32_t most) const {
    const bool brain = type == Type::kBfloat16;
    const bool finite = most < (brain ? 0x7f80u : 0x7c00u);
    const uint32_t bits =
        brain ? most << 16 : BitsOfFloat(FloatOfHalf(static_cast<uint16_t>(most)));
    const uint32_t exponent = bits >> 23 < 27u ? 27u : bits >> 23;
    if (exists && ThreadIndex() == 0) {
      const float factor = FloatOfBits((exponent - 7u) << 23) * (1.0f / 4096.0f);
      factors[row] = finite ? factor : FloatOfBits(0x7fc00000u);
    }
    return FloatOfBits((261u - exponent) << 23);
  }

  // Writes eight groups of the row: to shared memory as they are, then 128 bytes in a row.
  ONNXCOMP_THREAD void Write(int64_t row, int first, int lane, float inverse,
                             const float (&z)[8][4], char* staging) const {
    const auto n = static_cast<int>(row % kColumns);
    ONNXCOMP_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int group = lane % 4 * 2 + i % 2;
      const int out = lane / 4 + i / 2 * 8;  // of weights 8 out .. 8 out + 7
      char* line = staging + group * kLine + out % 4 / 2 * 128 + out / 4 * 4;
      ONNXCOMP_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int chunk = (out % 2 * 2 + j / 2) * 2 + j % 2;
        *reinterpret_cast<uint32_t*>(line + ((chunk ^ (n % 8)) << 4)) =
            PackHalves(z[2 * j][i] * inverse, z[2 * j + 1][i] * inverse);
      }
    }
    SyncWarp();
    const int64_t tile = row / kColumns;
    char* out = values + (tile * groups + first) * kColumns * 256 + n * 128;
    ONNXCOMP_UNROLL
    for (int k = 0; k < 4; ++k) {
      const int id = k * kWarp + lane;
      const int group = id / 16;
      const int chunk = id % 16;
      if (first + group >= groups) continue;
      char* to = out + static_cast<int64_t>(group) * kColumns * 256 + chunk / 8 * kColumns * 128;
      *reinterpret_cast<Vector*>(to + chunk % 8 * 16) =
          *reinterpret_cast<const Vector*>(staging + group * kLine + chunk * 16);
    }
    SyncWarp();
  }
};

}  // namespace onnxcomp::gpu
