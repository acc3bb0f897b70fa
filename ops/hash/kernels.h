// The products and the decoder, for any instruction set.
//
// Whoever includes this file defines, in its own anonymous namespace, `Line` (16 floats) with Zero,
// Load, Store, Broadcast, Add, Multiply, MultiplyAdd, Flip, Widen for the three types of a memory;
// and the constants kTileRows and kPanels of the product for many rows.
#pragma once

#include <cstring>
#include <utility>

#include "hash/places.h"

namespace onnxcomp::hash {
namespace {

template <class T>
inline const T* Slot(const Weight& weight, uint64_t slot) {
  return static_cast<const T*>(weight.memory) + slot * static_cast<uint64_t>(weight.chunk);
}

// Where the rows of one tile of activations start, in units of one row's span.
struct Rows {
  int64_t unit;
  int count;
};

inline Rows RowsAt(const Activations& x, int64_t row, int64_t span) {
  const int64_t left = x.rows - row;
  const int count = static_cast<int>(left < x.tile ? left : x.tile);
  return {row * x.spans + span * count, count};
}

inline int BlocksOf(const Weight& weight, int64_t span) {
  const int64_t left = weight.blocks - span * kSpan;
  return static_cast<int>(left < kSpan ? left : kSpan);
}

// Sums of one tile for M interleaved rows of activations, 16 columns of 16 lanes.
template <int M, class T>
inline void SumTile(const T* tile, const float* x, Line* sums) {
  constexpr int kChains = M == 1 ? 4 : M == 2 ? 2 : 1;  // to hide the latency of an addition
  constexpr int kAhead = 2048 / static_cast<int>(sizeof(T));  // slots mostly follow one another
#pragma GCC unroll 16
  for (int t = 0; t < kLanes; ++t) {
    if (t * kLanes * sizeof(T) % 64 == 0) __builtin_prefetch(tile + t * kLanes + kAhead);
    const Line weights = Widen(tile + t * kLanes);
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) {
      Line& sum = sums[i * kChains + t % kChains];
      sum = MultiplyAdd(weights, Broadcast(x[t * M + i]), sum);
    }
  }
}

// Few rows of activations: whole tiles are multiplied where they lie.
template <int M, class T>
void StreamPanel(const Weight& weight, const Activations& x, int64_t panel, int64_t first,
                 float* out) {
  constexpr int kChains = M == 1 ? 4 : M == 2 ? 2 : 1;
  Line sums[M * kChains];
  for (int i = 0; i < M * kChains; ++i) sums[i] = Zero();
  Steps all(weight, panel);
  for (int64_t span = 0; span < x.spans; ++span) {
    const int count = BlocksOf(weight, span);
    const uint64_t* steps = all.At(span * kSpan);
    const float* values = x.values + RowsAt(x, first, span).unit * kGroup;
    for (int b = 0; b < count; ++b, values += kLanes * M) {
      const int64_t sign = (steps[b] & 1) != 0 ? x.negated : 0;
      SumTile<M>(Slot<T>(weight, steps[b] >> 1), values + sign, sums);
    }
  }
  for (int i = 0; i < M; ++i) {
    Line sum = sums[i * kChains];
    for (int c = 1; c < kChains; ++c) sum = Add(sum, sums[i * kChains + c]);
    Store(sum, out + i * 2 * kLanes);
  }
}

template <class T>
void Stream(const Weight& weight, const Activations& x, int64_t panel, int panels, int64_t first,
            int64_t rows, float* out) {
  for (int p = 0; p < panels; ++p, out += kLanes) {
    switch (rows) {
      case 1: StreamPanel<1, T>(weight, x, panel + p, first, out); break;
      case 2: StreamPanel<2, T>(weight, x, panel + p, first, out); break;
      case 3: StreamPanel<3, T>(weight, x, panel + p, first, out); break;
      default: StreamPanel<4, T>(weight, x, panel + p, first, out); break;
    }
  }
}

// One chunk, signed, to out[t * stride + lane].
template <class T>
inline void CopyChunk(const T* chunk, int size, int part, bool minus, float* out, int stride) {
  int at = part * size;
  if (size >= kLanes) {
    for (int i = 0; i < size; i += kLanes, at += kLanes) {
      const Line values = Widen(chunk + i);
      Store(minus ? Flip(values) : values, out + at / kLanes * stride);
    }
    return;
  }
  for (int i = 0; i < size; ++i, ++at) {
    const float value = WidenOne(chunk[i]);
    out[at / kLanes * stride + at % kLanes] = minus ? -value : value;
  }
}

template <class T>
void DecodeBlocks(const Weight& weight, int64_t panel, int64_t block, int count, float* out,
                  int stride) {
  for (int b = 0; b < count; ++b, out += kLanes * stride) {
    ForParts(weight, panel, block + b, [&](int part, int64_t slot, bool minus) {
      const T* chunk = Slot<T>(weight, static_cast<uint64_t>(slot));
      CopyChunk(chunk, weight.chunk, part, minus, out, stride);
    });
  }
}

void DecodeAny(const Weight& weight, int64_t panel, int64_t block, int count, float* out,
               int stride) {
  switch (weight.type) {
    case Memory::kFloat32: return DecodeBlocks<float>(weight, panel, block, count, out, stride);
    case Memory::kFloat16: return DecodeBlocks<uint16_t>(weight, panel, block, count, out, stride);
    case Memory::kInt8: return DecodeBlocks<int8_t>(weight, panel, block, count, out, stride);
  }
}

void Decode(const Weight& weight, int64_t panel, int64_t block, int count, float* out) {
  DecodeAny(weight, panel, block, count, out, kLanes);
}

// M rows of activations times NP panels over `columns` decoded columns w[(t * 2 + p) * 16 + lane].
// Adds to `out`; with scales, the sum of the span is multiplied first.
template <int M, int NP>
void MultiplySpan(const float* w, int columns, const float* x, const float* scales, float* out) {
  Line sums[M][NP];
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 2
    for (int p = 0; p < NP; ++p) sums[i][p] = Zero();
  }
  for (int t = 0; t < columns; ++t, w += 2 * kLanes, x += M) {
    Line weights[NP];
#pragma GCC unroll 2
    for (int p = 0; p < NP; ++p) weights[p] = Load(w + p * kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i) {
      const Line value = Broadcast(x[i]);
#pragma GCC unroll 2
      for (int p = 0; p < NP; ++p) sums[i][p] = MultiplyAdd(weights[p], value, sums[i][p]);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 2
    for (int p = 0; p < NP; ++p) {
      float* y = out + i * 2 * kLanes + p * kLanes;
      // Two roundings on every machine: int8 results do not depend on the instruction set.
      const Line sum = scales == nullptr ? sums[i][p] : Multiply(sums[i][p], Broadcast(scales[i]));
      Store(Add(Load(y), sum), y);
    }
  }
}

using MultiplyFn = void (*)(const float*, int, const float*, const float*, float*);

template <int NP, int... M>
MultiplyFn MultiplyOf(int rows, std::integer_sequence<int, M...>) {
  static constexpr MultiplyFn kByRows[] = {MultiplySpan<M + 1, NP>...};
  return kByRows[rows - 1];
}

template <int NP>
MultiplyFn MultiplyFor(int rows) {
  return MultiplyOf<NP>(rows, std::make_integer_sequence<int, kTileRows>());
}

// Asks for the tiles of a span, for the time when it is decoded.
inline void FetchSpan(const Weight& weight, int64_t panel, int64_t span) {
  if (weight.chunk != kTile || span * kSpan >= weight.blocks) return;
  const int sizes[] = {4, 2, 1};
  const int64_t bytes = kTile * sizes[static_cast<int>(weight.type)];
  Walk walk(weight, weight.map.base + panel * weight.blocks + span * kSpan);
  for (int b = BlocksOf(weight, span); b > 0; --b, walk.Next()) {
    const char* tile = static_cast<const char*>(weight.memory) + walk.slot() * bytes;
    for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(tile + line, 0, 2);
  }
}

// Many rows of activations: a span of columns is decoded into the first-level cache and used by
// all rows. With int8 activations their integers are exact in float32: 128 * 127 * 127 < 2^24.
void Tiles(const Weight& weight, const Activations& x, int64_t panel, int panels, int64_t first,
           int64_t rows, bool scaled, float* out) {
  alignas(64) float w[kGroup * 2 * kLanes];
  std::memset(out, 0, static_cast<size_t>(rows) * 2 * kLanes * sizeof(float));
  for (int64_t span = 0; span < x.spans; ++span) {
    const int count = BlocksOf(weight, span);
    for (int p = 0; p < panels; ++p) {
      DecodeAny(weight, panel + p, span * kSpan, count, w + p * kLanes, 2 * kLanes);
      FetchSpan(weight, panel + p, span + 1);
    }
    for (int64_t m = 0; m < rows; m += kTileRows) {
      const Rows tile = RowsAt(x, first + m, span);
      const float* scales = scaled ? x.scales + tile.unit : nullptr;
      const float* values = x.values + tile.unit * kGroup;
      float* y = out + m * 2 * kLanes;
      if (kPanels == 2 && panels == 2) {
        MultiplyFor<kPanels>(tile.count)(w, count * kLanes, values, scales, y);
        continue;
      }
      for (int p = 0; p < panels; ++p) {
        MultiplyFor<1>(tile.count)(w + p * kLanes, count * kLanes, values, scales, y + p * kLanes);
      }
    }
  }
}

void Product(const Weight& weight, const Activations& x, int64_t panel, int panels, int64_t first,
             int64_t rows, float* out) {
  // Few rows in all: of the last of many there is no copy with opposite signs.
  if (x.rows > kStreamRows || weight.chunk != kTile) {
    return Tiles(weight, x, panel, panels, first, rows, false, out);
  }
  switch (weight.type) {
    case Memory::kFloat32: return Stream<float>(weight, x, panel, panels, first, rows, out);
    case Memory::kFloat16: return Stream<uint16_t>(weight, x, panel, panels, first, rows, out);
    case Memory::kInt8: return Stream<int8_t>(weight, x, panel, panels, first, rows, out);
  }
}

void ProductInt8(const Weight& weight, const Activations& x, int64_t panel, int panels,
                 int64_t first, int64_t rows, float* out) {
  Tiles(weight, x, panel, panels, first, rows, true, out);
}

}  // namespace
}  // namespace onnxcomp::hash
