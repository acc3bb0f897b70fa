// y = x W^T for any kind of stored weight, on tensor cores.
//
// A `Source` is a stored weight, cut into panels of 16 rows and units of 4 * kRun columns. It has
//   kRun                          weights that a thread takes of each of its two rows in a unit
//   kFewForms                     SmallProduct and TiledProduct of 8 tiles suffice
//   panels, units, unit_bits      log2 of the units of a group
//   Raw, Load(panel, unit, lane)  what a thread reads from memory, ahead of its use
//   Share(warp, raws)             what threads of a warp then take from each other
//   Fill(thread, table), TableBytes()   what a block keeps in shared memory
//   Decode(raw, step, lane, table, a, b)   8 weights of two rows, as two fragments
//   Scale(raw, half)              of the thread's first or second row
//   Row(r)                        which row of the panel is row r of a fragment
#pragma once

#include "gpu/async.h"
#include "gpu/launch.h"
#include "gpu/mma.h"
#include "gpu/prepare.h"

namespace onnxcomp::gpu {

constexpr int kPanel = 16;  // rows of a panel

// Where a product goes.
struct Output {
  Type type;
  void* data;     // (batch, rows)
  int64_t batch;  // rows of activations
  int64_t rows;   // of the weight
  float factor;

  ONNXCOMP_DEVICE void Store(int64_t m, int64_t row, float value) const {
    if (m < batch && row < rows) StoreElement(type, data, m * rows + row, value * factor);
  }
};

// sums += the product of one unit; `load(step, tile, thread)` gives B and `factor(tile, i, thread)`
// the factor of sum i.
template <int kTiles, class Source, class LoadB, class FactorOf>
ONNXCOMP_DEVICE void AddUnit(const Warp& warp, const Source& source, const char* table,
                             PerThread<typename Source::Raw>& raw, const LoadB& load,
                             const FactorOf& factor, PerThread<Sums<kTiles>>& sums) {
  PerThread<Sums<kTiles>> unit;
  warp.EachLane([&](int thread) { unit[thread] = Sums<kTiles>{}; });
  ONNXCOMP_UNROLL
  for (int step = 0; step < Source::kRun / kPerVector; ++step) {
    PerThread<Fragment> a;
    PerThread<Fragment> b;
    warp.EachLane([&](int thread) {
      source.Decode(raw[thread], step, thread % kWarp, table, a[thread], b[thread]);
    });
    ONNXCOMP_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      PerThread<Vector> x;
      warp.EachLane([&](int thread) { x[thread] = load(step, tile, thread); });
      Mma(warp, a, x, 0, unit, tile);
      Mma(warp, b, x, 2, unit, tile);
    }
  }
  warp.EachLane([&](int thread) {
    ONNXCOMP_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      ONNXCOMP_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float scale = source.Scale(raw[thread], i / 2) * factor(tile, i, thread);
        sums[thread].value[tile][i] += unit[thread].value[tile][i] * scale;
      }
    }
  });
}

// At most eight columns: one panel for each block, whose warps share the units among them. Sums of
// the warps are added in order, so that the result is always the same.
template <class Source>
struct SmallProduct {
  static constexpr int kBlocks = 3;
  static constexpr int kColumns = kFewColumns;
  static constexpr int kSteps = Source::kRun / kPerVector;

  Source source;
  Columns x;  // with room for kColumns
  Output y;

  int64_t SharedBytes() const {
    return source.TableBytes() + int64_t{kWarps} * kPanel * kColumns * int64_t{sizeof(float)};
  }

  ONNXCOMP_DEVICE void operator()(Block& block) const {
    char* table = block.shared;
    auto* partial = reinterpret_cast<float*>(table + source.TableBytes());
    const int64_t panel = block.x;
    block.EachThread([&](int thread) { source.Fill(thread, table); });
    block.Sync();
    block.EachWarp([&](const Warp& warp) { Sum(warp, panel, table, partial); });
    block.Sync();
    block.EachThread([&](int thread) { Finish(thread, panel, partial); });
  }

 private:
  ONNXCOMP_DEVICE void Sum(const Warp& warp, int64_t panel, const char* table,
                           float* partial) const {
    PerThread<Sums<1>> sums;
    PerThread<typename Source::Raw> raw;
    PerThread<typename Source::Raw> next;
    warp.EachLane([&](int thread) { sums[thread] = Sums<1>{}; });
    if (warp.index < source.units) Load(warp, panel, warp.index, raw);
    for (int64_t unit = warp.index; unit < source.units; unit += kWarps) {
      Load(warp, panel, unit + kWarps < source.units ? unit + kWarps : unit, next);
      AddUnit<1>(
          warp, source, table, raw,
          [&](int step, int, int thread) { return LoadColumn(unit, step, thread % kWarp); },
          [&](int, int i, int thread) { return Factor(unit, thread % 4 * 2 + i % 2); }, sums);
      warp.EachLane([&](int thread) { raw[thread] = next[thread]; });
    }
    warp.EachLane([&](int thread) {
      const int lane = thread % kWarp;
      ONNXCOMP_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8;
        const int column = lane % 4 * 2 + i % 2;
        partial[(warp.index * kColumns + column) * kPanel + row] = sums[thread].value[0][i];
      }
    });
  }

  ONNXCOMP_DEVICE void Load(const Warp& warp, int64_t panel, int64_t unit,
                            PerThread<typename Source::Raw>& raw) const {
    warp.EachLane([&](int thread) { raw[thread] = source.Load(panel, unit, thread % kWarp); });
    source.Share(warp, raw);
  }

  ONNXCOMP_DEVICE Vector LoadColumn(int64_t unit, int step, int lane) const {
    // Lane l reads quarter l mod 4 of column l / 4, or where there is none, of the first one: what
    // comes of that goes to columns that nobody reads.
    const int place = lane / 4 < static_cast<int>(x.count) ? lane : lane % 4;
    return x.values[(unit * kSteps + step) * (4 * kColumns) + place];
  }

  ONNXCOMP_DEVICE float Factor(int64_t unit, int column) const {
    const int place = column < static_cast<int>(x.count) ? column : 0;
    return x.factors[(unit >> source.unit_bits) * kColumns + place];
  }

  ONNXCOMP_DEVICE void Finish(int thread, int64_t panel, const float* partial) const {
    const int row = thread % kPanel;
    const int m = thread / kPanel;
    if (m >= y.batch) return;
    float sum = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) {
      for (int part = 0; part < x.parts; ++part) {
        sum += partial[(warp * kColumns + m * x.parts + part) * kPanel + row];
      }
    }
    y.Store(m, panel * kPanel + source.Row(row), sum);
  }
};

// Blocks of TiledProduct for which a multiprocessor has registers.
constexpr int BlocksOf(int tiles) { return tiles > 8 ? 1 : 2; }

// More columns: a block has eight panels, one for each warp, and kTiles * 8 columns, which its
// warps read from shared memory while those of the next unit arrive. `splits` blocks share the
// units.
template <class Source, int kTiles>
struct TiledProduct {
  static constexpr int kBlocks = BlocksOf(kTiles);
  static constexpr int kColumns = kTiles * 8;
  static constexpr int kSteps = Source::kRun / kPerVector;
  static constexpr int kVectors = kSteps * kColumns * 4;

  Source source;
  Columns x;
  Output y;          // of one split: (splits, batch, rows) float32 when there are several
  int64_t splits;

  // What a block has of the activations at a time.
  struct Stage {
    Vector values[kVectors];
    float factors[kColumns];
  };

  int64_t SharedBytes() const { return source.TableBytes() + 2 * int64_t{sizeof(Stage)}; }

  ONNXCOMP_DEVICE void operator()(Block& block) const {
    char* table = block.shared;
    auto* stages = reinterpret_cast<Stage*>(table + source.TableBytes());
    const int64_t first = block.y * kColumns;
    const int64_t per_split = DivideUp(source.units, splits);
    const int64_t begin = block.z * per_split;
    const int64_t end = begin + per_split < source.units ? begin + per_split : source.units;
    PerThread<Sums<kTiles>> sums;
    PerThread<typename Source::Raw> raw;
    block.EachThread([&](int thread) {
      if (begin < end) Read(thread, begin, first, stages[0]);
      CloseCopies();
      source.Fill(thread, table);
      sums[thread] = Sums<kTiles>{};
    });
    block.EachWarp([&](const Warp& warp) {
      if (begin < end) Load(warp, block, begin, raw);
    });
    for (int64_t unit = begin; unit < end; ++unit) {
      const Stage& stage = stages[(unit - begin) % 2];
      block.EachThread([&](int thread) {
        if (unit + 1 < end) Read(thread, unit + 1, first, stages[(unit - begin + 1) % 2]);
        CloseCopies();
        AwaitCopies<1>();
      });
      block.Sync();
      block.EachWarp([&](const Warp& warp) {
        Add(warp, block, unit + 1 < end ? unit + 1 : unit, table, stage, raw, sums);
      });
      block.Sync();
    }
    block.EachThread([&](int thread) { Write(block, thread, first, sums[thread]); });
  }

 private:
  // What a warp needs of its panel; beyond the last one, that one again, whose result is dropped.
  ONNXCOMP_DEVICE void Load(const Warp& warp, const Block& block, int64_t unit,
                            PerThread<typename Source::Raw>& raw) const {
    const int64_t wanted = block.x * kWarps + warp.index;
    const int64_t panel = wanted < source.panels ? wanted : source.panels - 1;
    warp.EachLane([&](int thread) { raw[thread] = source.Load(panel, unit, thread % kWarp); });
    source.Share(warp, raw);
  }

  ONNXCOMP_DEVICE void Read(int thread, int64_t unit, int64_t first, Stage& stage) const {
    for (int i = thread; i < kVectors; i += kThreads) {
      const int64_t column = first + i / 4 % kColumns;
      const int64_t step = unit * kSteps + i / (4 * kColumns);
      if (column < x.count) {
        CopyLater(stage.values + i, x.values + (step * x.room + column) * 4 + i % 4);
      } else {
        stage.values[i] = Vector{};
      }
    }
    if (thread >= kColumns) return;
    const int64_t column = first + thread;
    if (column < x.count) {
      const int64_t group = unit >> source.unit_bits;
      CopyLater(stage.factors + thread, x.factors + group * x.room + column);
    } else {
      stage.factors[thread] = 0.0f;
    }
  }

  ONNXCOMP_DEVICE void Add(const Warp& warp, const Block& block, int64_t after, const char* table,
                           const Stage& stage, PerThread<typename Source::Raw>& raw,
                           PerThread<Sums<kTiles>>& sums) const {
    PerThread<typename Source::Raw> next;
    Load(warp, block, after, next);
    AddUnit<kTiles>(
        warp, source, table, raw,
        [&](int step, int tile, int thread) {
          return stage.values[(step * kColumns + tile * 8) * 4 + thread % kWarp];
        },
        [&](int tile, int i, int thread) {
          return stage.factors[tile * 8 + thread % 4 * 2 + i % 2];
        },
        sums);
    warp.EachLane([&](int thread) { raw[thread] = next[thread]; });
  }

  ONNXCOMP_DEVICE void Write(const Block& block, int thread, int64_t first,
                             const Sums<kTiles>& sums) const {
    const int64_t panel = block.x * kWarps + thread / kWarp;
    const int64_t offset = block.z * y.batch * y.rows;
    Output out = y;
    if (splits > 1) out.data = static_cast<float*>(y.data) + offset;
    const int lane = thread % kWarp;
    ONNXCOMP_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      const int64_t column = first + tile * 8 + lane % 4 * 2;
      ONNXCOMP_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int64_t row = panel * kPanel + source.Row(lane / 4 + 8 * half);
        const float a = sums.value[tile][2 * half];
        const float b = sums.value[tile][2 * half + 1];
        if (x.parts == 2) {
          out.Store(column / 2, row, a + b);
        } else {
          out.Store(column, row, a);
          out.Store(column + 1, row, b);
        }
      }
    }
  }
};

// y = the sum of the splits' products, in order.
struct AddSplits {
  static constexpr int kBlocks = 4;

  const float* partial;  // (splits, batch, rows)
  int64_t splits;
  Output y;

  ONNXCOMP_DEVICE void operator()(Block& block) const {
    const int64_t count = y.batch * y.rows;
    block.EachThread([&](int thread) {
      const int64_t i = block.x * kThreads + thread;
      if (i >= count) return;
      float sum = 0.0f;
      for (int64_t split = 0; split < splits; ++split) sum += partial[split * count + i];
      StoreElement(y.type, y.data, i, sum * y.factor);
    });
  }
};

}  // namespace onnxcomp::gpu
