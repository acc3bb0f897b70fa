// y = x W^T for one to eight columns: a block for each multiprocessor, for the whole product.
//
// A tile is the rows of one panel or two; a block takes every grid-th tile, and its warps take the
// tile's units (one group of 128 columns) in turn. The first half of the warps rotates the
// activations into shared memory while the others fill the table of pairs; codes are under way
// from the beginning, since they do not depend on the kernel before. The sums of the warps are added
// in their order at the end, so that the result is always the same.
//
// Activations are float16 in one part, or, where weights are bytes, int8 in kParts parts, each part a
// column of the product: m / 127, a 254th of that, ...; m is the largest value of the group. Sums of
// bytes are exact.
#pragma once

#include "gpu/launch.h"
#include "gpu/product.h"
#include "gpu/rotate.h"
#include "hyper/gpu_ring.h"

namespace onnxcomp::hyper {

constexpr int kPartStep = 254;  // of int8: what is left of a part is at most half of a step

template <class TableOf, int kWarpsOf, int kPanelsOf, int kStagesOf, int kPartsOf>
struct FewRows {
  using Table = TableOf;
  static constexpr int K = Table::kBits;
  static constexpr bool kInteger = Table::kInteger;
  static constexpr int kWarpCount = kWarpsOf;
  static constexpr int kBlockThreads = kWarpCount * gpu::kWarp;
  static constexpr int kBlocks = 1;
  static constexpr int kPanels = kPanelsOf;
  static constexpr int kStages = kStagesOf;
  static constexpr int kParts = kPartsOf;
  static constexpr int kTileRows = kPanels * gpu::kPanel;
  static constexpr int kGroupBytes = kInteger ? 128 : 256;  // of a column's activations
  static constexpr int kSteps = kInteger ? 2 : 4;           // 64 bytes each
  static constexpr int kRotating = kWarpCount / 2;          // warps
  static constexpr int kFilled = 1;                         // the barrier of the others
  using Ring = CodeRing<K, kPanels, kStages>;
  using Words = typename Ring::Words;

  PairWeight weight;
  const void* x;  // (batch, length) of float16 or bfloat16
  bool aligned;   // rows of x begin at multiples of 16 bytes
  gpu::Output y;
  int tiles, blocks;

  // What lies in shared memory, in this order, in bytes from its beginning.
  struct Layout {
    int rings, activations, factors, staged, partial;
    int64_t bytes;
  };

  ONNXCOMP_DEVICE Layout Place() const {
    const int batch = static_cast<int>(y.batch);
    Layout at{};
    at.rings = Table::kBytes;
    at.activations = at.rings + kWarpCount * Ring::kBytes;
    at.factors = at.activations + weight.groups * batch * kParts * kGroupBytes;
    at.staged = at.factors + (weight.groups * batch + 3) / 4 * 16;
    at.partial = at.staged + Table::kStaged;
    const int64_t own = (tiles + blocks - 1) / blocks;  // tiles of a block
    at.bytes = at.partial + own * kWarpCount * kTileRows * batch * 4;
    return at;
  }

  ONNXCOMP_THREAD void operator()(gpu::Block& block) const {
    const int warp = gpu::ThreadIndex() / gpu::kWarp;
    const int lane = gpu::ThreadIndex() % gpu::kWarp;
    const Layout at = Place();
    const uint32_t panel_step = static_cast<uint32_t>(weight.groups) * Ring::kPanelBytes;
    Reader reader(*this, block, warp, lane, panel_step, block.shared + at.rings);
    gpu::StartNextGrid();
    ONNXCOMP_UNROLL
    for (int i = 0; i < kStages; ++i) reader.Copy(*this, static_cast<uint32_t>(i * Ring::kUnitBytes));
    if (warp >= kRotating) {
      auto* staged = reinterpret_cast<int8_t*>(block.shared + at.staged);
      const int thread = gpu::ThreadIndex() - kRotating * gpu::kWarp;
      const int count = (kWarpCount - kRotating) * gpu::kWarp;
      Table::Stage(weight, staged, thread, count);
      gpu::SyncNamed(kFilled, count);
      Table::Fill(weight, staged, block.shared, thread, count);
    } else {
      gpu::AwaitPreviousGrid();
      Rotate(warp, lane, block.shared + at.activations,
             reinterpret_cast<float*>(block.shared + at.factors));
    }
    block.Sync();
    Sum(block, reader, warp, lane, at);
    block.Sync();
    Finish(block, reinterpret_cast<const float*>(block.shared + at.partial));
  }

 private:
  // Brings units of the block's tiles, in the order in which one warp takes them.
  struct Reader {
    Ring ring;
    const char* codes;
    const char* scales;
    int group, unit, units, tile, lane;
    uint32_t panel_step;

    ONNXCOMP_THREAD Reader(const FewRows& of, const gpu::Block& block, int warp, int lane_in,
                           uint32_t panel_step_in, char* rings)
        : ring(rings + warp * Ring::kBytes, lane_in, panel_step_in),
          group(warp),
          unit(warp),
          units((of.tiles - static_cast<int>(block.x) + of.blocks - 1) / of.blocks *
                of.weight.groups),
          tile(static_cast<int>(block.x)),
          lane(lane_in),
          panel_step(panel_step_in) {
      const int64_t first = block.x * kPanels * of.weight.groups + warp;
      codes = of.weight.codes + first * Ring::kPanelBytes;
      scales = of.weight.scales + first * 32;
      Wrap(of);
    }

    // A batch of copies for each unit, empty beyond the last one.
    ONNXCOMP_THREAD void Copy(const FewRows& of, uint32_t stage) {
      if (unit < units) {
        const bool both = kPanels == 1 || tile * kPanels + 1 < static_cast<int>(of.weight.panels);
        ring.Copy(stage, codes, scales, both, lane, panel_step);
        unit += kWarpCount;
        group += kWarpCount;
        codes += kWarpCount * Ring::kPanelBytes;
        scales += kWarpCount * 32;
        Wrap(of);
      }
      gpu::CloseCopies();
    }

    // From behind the end of one tile to the next tile of the block.
    ONNXCOMP_THREAD void Wrap(const FewRows& of) {
      const int64_t units_between =
          (static_cast<int64_t>(of.blocks) * kPanels - 1) * of.weight.groups;
      while (group >= of.weight.groups) {
        group -= of.weight.groups;
        tile += of.blocks;
        codes += units_between * Ring::kPanelBytes;
        scales += units_between * 32;
      }
    }
  };

  // Rotates the activations, eight groups at a time for each warp, into `to`: for each step of a
  // group 64 bytes for each column, 16 for each quarter of the group.
  ONNXCOMP_THREAD void Rotate(int warp, int lane, char* to, float* factors) const {
    const int batch = static_cast<int>(y.batch);
    const int pieces = weight.groups * batch;
    for (int first = warp * gpu::kRotatedTogether; first < pieces;
         first += kRotating * gpu::kRotatedTogether) {
      Vector run[4] = {};
      const int mine = first + lane / 4;
      if (mine < pieces) {
        const int row = batch == 1 ? 0 : mine / weight.groups;
        const int64_t column = static_cast<int64_t>(mine - row * weight.groups) * kPairGroup;
        gpu::LoadRun(x, row, weight.length, column + lane % 4 * 32, aligned, run);
      }
      float z[8][4];
      gpu::RotateEight(run, y.type == gpu::Type::kBfloat16, z);
      uint32_t most[2] = {0, 0};  // bits of magnitudes, those of NaN above all
      ONNXCOMP_UNROLL
      for (int j = 0; j < 8; ++j) {
        ONNXCOMP_UNROLL
        for (int i = 0; i < 4; ++i) {
          const uint32_t bits = gpu::BitsOfFloat(z[j][i]) & 0x7fffffffu;
          most[i & 1] = bits > most[i & 1] ? bits : most[i & 1];
        }
      }
      ONNXCOMP_UNROLL
      for (int which = 0; which < 2; ++which) {
        ONNXCOMP_UNROLL
        for (int mask = 4; mask < gpu::kWarp; mask *= 2) {
          const uint32_t other = gpu::ShuffleXor(most[which], mask);
          most[which] = other > most[which] ? other : most[which];
        }
        const int piece = first + lane % 4 * 2 + which;
        if (piece >= pieces) continue;
        const int row = batch == 1 ? 0 : piece / weight.groups;
        Write(z, which, most[which], row, piece - row * weight.groups, lane / 4, to, factors);
      }
    }
  }

  // Writes weights 8 out .. 8 out + 7 of group g, out = lane / 4 and 8 more. A group that is not
  // finite has a factor of NaN, so that its row of y is NaN.
  ONNXCOMP_THREAD void Write(float (&z)[8][4], int which, uint32_t most, int row, int g, int out,
                             char* to, float* factors) const {
    const int columns = static_cast<int>(y.batch) * kParts;
    const bool finite = most < 0x7f800000u;
    const uint32_t exponent = most >> 23 < 27u ? 27u : most >> 23;
    const float largest = gpu::FloatOfBits(most < 0x0da24260u ? 0x0da24260u : most);  // 1e-30
    const float factor = kInteger ? largest * (1.0f / 127.0f / 4096.0f)
                                  : gpu::FloatOfBits((exponent - 14u) << 23) * (1.0f / 4096.0f);
    const float inverse =
        kInteger ? 127.0f / largest : gpu::FloatOfBits((268u - exponent) << 23);
    if (out == 0) {
      factors[g * static_cast<int>(y.batch) + row] =
          finite ? factor : gpu::FloatOfBits(0x7fc00000u);
    }
    ONNXCOMP_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int place = out + 8 * half;
      float value[8];
      ONNXCOMP_UNROLL
      for (int j = 0; j < 8; ++j) value[j] = z[j][2 * half + which] * inverse;
      ONNXCOMP_UNROLL
      for (int part = 0; part < kParts; ++part) {
        const int column = row * kParts + part;
        if constexpr (kInteger) {
          char* at = to + ((g * kSteps + place % 4 / 2) * columns + column) * 64;
          auto* words = reinterpret_cast<uint32_t*>(at + place / 4 * 16 + place % 2 * 8);
          words[0] = TakeBytes(value);
          words[1] = TakeBytes(value + 4);
        } else {
          char* at = to + ((g * kSteps + place % 4) * columns + column) * 64;
          Vector halves;
          ONNXCOMP_UNROLL
          for (int j = 0; j < 4; ++j) {
            halves.word[j] = gpu::PackHalves(value[2 * j], value[2 * j + 1]);
          }
          *reinterpret_cast<Vector*>(at + place / 4 * 16) = halves;
        }
      }
    }
  }

  // Four values as int8, to nearest even; leaves what is left of them, for the next part.
  static ONNXCOMP_THREAD uint32_t TakeBytes(float* values) {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: integers end at the last bit
    uint32_t bits[4];
    ONNXCOMP_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float rounded = values[i] + kRound;
      bits[i] = gpu::BitsOfFloat(rounded);
      values[i] = (values[i] - (rounded - kRound)) * static_cast<float>(kPartStep);
    }
    return Permute(Permute(bits[0], bits[1], 0x0040u), Permute(bits[2], bits[3], 0x0040u), 0x5410u);
  }

  // Where a warp stands.
  struct Lane {
    const char* table;
    const char* activations;  // of the lane, at the warp's group
    const float* factors[2];  // of sums 0 and 2, 1 and 3
    float part[2];            // what a part of theirs counts
    uint32_t copy;
    int group, tile;
    float sums[kPanels][4];
  };

  ONNXCOMP_THREAD void Sum(gpu::Block& block, Reader& reader, int warp, int lane,
                           const Layout& at) const {
    const int batch = static_cast<int>(y.batch);
    const int columns = batch * kParts;
    Lane here{};
    here.table = block.shared;
    here.copy = Table::Copy(lane);
    gpu::Pin(here.copy);
    here.group = warp;
    const int column = lane / 4 < columns ? lane / 4 : 0;  // those that do not exist read the first
    here.activations = block.shared + at.activations +
                       ((warp * kSteps * columns + column) * 4 + lane % 4) * 16;
    ONNXCOMP_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int wanted = lane % 4 * 2 + i;
      const int of = wanted < columns ? wanted : columns - 1;
      here.factors[i] =
          reinterpret_cast<const float*>(block.shared + at.factors) + warp * batch + of / kParts;
      here.part[i] = 1.0f;
      for (int part = of % kParts; part > 0; --part) here.part[i] *= 1.0f / kPartStep;
    }
    Wrap(here);
    auto* partial = reinterpret_cast<float*>(block.shared + at.partial);
    Words words[2];
    gpu::AwaitCopies<kStages - 1>();
    gpu::SyncWarp();
    reader.ring.Read(0, words[0]);
    gpu::SyncWarp();
    uint32_t stage = 0;
    for (int unit = warp; unit < reader.units; unit += 2 * kWarpCount) {
      Add(reader, words[0], words[1], unit, warp, lane, stage, here, partial);
      if (unit + kWarpCount >= reader.units) break;
      Add(reader, words[1], words[0], unit + kWarpCount, warp, lane, stage, here, partial);
    }
  }

  // Adds one unit, whose words are in registers, and reads those of the next one.
  ONNXCOMP_THREAD void Add(Reader& reader, const Words& words, Words& next, int unit, int warp,
                           int lane, uint32_t& stage, Lane& here, float* partial) const {
    const int batch = static_cast<int>(y.batch);
    const int columns = batch * kParts;
    reader.Copy(*this, stage);
    stage += Ring::kUnitBytes;
    if (stage == Ring::kBytes) stage = 0;
    gpu::AwaitCopies<kStages - 1>();
    gpu::SyncWarp();
    reader.ring.Read(stage, next);
    const float factor[2] = {*here.factors[0] * here.part[0], *here.factors[1] * here.part[1]};
    using Value = std::conditional_t<kInteger, int, float>;
    Value sums[kPanels][4] = {};
    ONNXCOMP_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      const Vector b = *reinterpret_cast<const Vector*>(here.activations + step * columns * 64);
      ONNXCOMP_UNROLL
      for (int e = 0; e < 2; ++e) {
        ONNXCOMP_UNROLL
        for (int panel = 0; panel < kPanels; ++panel) {
          uint32_t a[4];
          Decode(here, words.word[panel], 2 * step + e, a);
          if constexpr (kInteger) {
            gpu::MmaBytes(sums[panel], a, b.word[2 * e], b.word[2 * e + 1]);
          } else {
            gpu::MmaHalves(sums[panel], a, b.word[2 * e], b.word[2 * e + 1]);
          }
        }
      }
    }
    ONNXCOMP_UNROLL
    for (int panel = 0; panel < kPanels; ++panel) {
      ONNXCOMP_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float scale =
            gpu::FloatOfHalf(static_cast<uint16_t>(words.scale[panel][i / 2])) * factor[i % 2];
        here.sums[panel][i] += static_cast<float>(sums[panel][i]) * scale;
      }
    }
    gpu::SyncWarp();
    Advance(unit, warp, lane, reader.units, here, partial);
  }

  static ONNXCOMP_THREAD void Decode(const Lane& here, const uint32_t (&words)[2][K + 1],
                                     int step, uint32_t (&a)[4]) {
    ONNXCOMP_UNROLL
    for (int half = 0; half < 2; ++half) {
      if constexpr (kInteger) {
        Table::Eight(here.table, here.copy, words[half], step, a[half], a[2 + half]);
      } else {
        a[half] = Table::Pair(here.table, here.copy, words[half], 2 * step);
        a[2 + half] = Table::Pair(here.table, here.copy, words[half], 2 * step + 1);
      }
    }
  }

  // To the warp's next unit; at the end of a tile its sums go to shared memory.
  ONNXCOMP_THREAD void Advance(int unit, int warp, int lane, int units, Lane& here,
                               float* partial) const {
    const int batch = static_cast<int>(y.batch);
    const int columns = batch * kParts;
    here.activations += kWarpCount * kGroupBytes * columns;
    here.factors[0] += kWarpCount * batch;
    here.factors[1] += kWarpCount * batch;
    here.group += kWarpCount;
    const bool last = unit + kWarpCount >= units;
    if (here.group < weight.groups && !last) return;
    Flush(warp, lane, here, partial);
    Wrap(here);
  }

  // From behind the end of a tile to the warp's next one: with more warps than groups it has
  // nothing of some tiles.
  ONNXCOMP_THREAD void Wrap(Lane& here) const {
    const int batch = static_cast<int>(y.batch);
    while (here.group >= weight.groups) {
      here.group -= weight.groups;
      here.activations -= weight.groups * kGroupBytes * batch * kParts;
      here.factors[0] -= weight.groups * batch;
      here.factors[1] -= weight.groups * batch;
      ++here.tile;
    }
  }

  // The parts of a row of x are added here; lane q then has row q.
  ONNXCOMP_THREAD void Flush(int warp, int lane, Lane& here, float* partial) const {
    const int batch = static_cast<int>(y.batch);
    float* out = partial + (here.tile * kWarpCount + warp) * kTileRows * batch;
    const int q = lane % 4;
    ONNXCOMP_UNROLL
    for (int panel = 0; panel < kPanels; ++panel) {
      ONNXCOMP_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row = panel * gpu::kPanel + lane / 4 + 8 * half;
        const float* sums = here.sums[panel] + 2 * half;
        if constexpr (kParts == 1) {
          if (2 * q < batch) out[row * batch + 2 * q] = sums[0];
          if (2 * q + 1 < batch) out[row * batch + 2 * q + 1] = sums[1];
        } else {
          float sum = 0.0f;
          ONNXCOMP_UNROLL
          for (int part = 0; part < kParts; ++part) {
            const int column = q * kParts + part;
            const int from = lane / 4 * 4 + column / 2 % 4;
            const float even = gpu::Shuffle(sums[0], from);
            const float odd = gpu::Shuffle(sums[1], from);
            sum += column % 2 == 0 ? even : odd;
          }
          if (q < batch) out[row * batch + q] = sum;
        }
      }
      ONNXCOMP_UNROLL
      for (int i = 0; i < 4; ++i) here.sums[panel][i] = 0.0f;
    }
  }

  // Adds the warps' sums, in their order.
  ONNXCOMP_THREAD void Finish(const gpu::Block& block, const float* partial) const {
    const int batch = static_cast<int>(y.batch);
    const int own = (tiles - static_cast<int>(block.x) + blocks - 1) / blocks;
    const int rows = own * kTileRows;
    for (int i = gpu::ThreadIndex(); i < rows * batch; i += kBlockThreads) {
      const int m = i / rows;
      const int tile = (i - m * rows) / kTileRows;
      const int row = (i - m * rows) % kTileRows;
      float sum = 0.0f;
      for (int warp = 0; warp < kWarpCount; ++warp) {
        if (Skips(warp, tile)) continue;
        sum += partial[((tile * kWarpCount + warp) * kTileRows + row) * batch + m];
      }
      y.Store(m, (block.x + static_cast<int64_t>(tile) * blocks) * kTileRows + row, sum);
    }
  }

  // Whether a warp has no unit of a tile, which happens where there are fewer groups than warps.
  ONNXCOMP_THREAD bool Skips(int warp, int tile) const {
    if (weight.groups >= kWarpCount) return false;
    const int first = tile * weight.groups;  // unit
    const int next = (warp - first % kWarpCount + kWarpCount) % kWarpCount;
    return next >= weight.groups;
  }
};

}  // namespace onnxcomp::hyper
