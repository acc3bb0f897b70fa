// A weight of the codec hash as a source of gpu/product.h.
#pragma once

#include "gpu/mma.h"
#include "gpu/prepare.h"
#include "hash/gpu_places.h"

namespace onnxcomp::hash {

// Two rows 2g and 2g + 1 of one column, as float16: one word of memory.
ONNXCOMP_DEVICE uint32_t LoadPair(const uint16_t* elements) {
  return *reinterpret_cast<const uint32_t*>(elements);
}

// Of int8: with 0x64 above it, a byte b is the float16 1024 + b; what is taken away again gives
// exactly its value, since b is the value plus 128.
ONNXCOMP_DEVICE uint32_t LoadPair(const int8_t* elements) {
  const uint32_t bytes = *reinterpret_cast<const uint16_t*>(elements) ^ 0x8080u;
#if ONNXCOMP_ON_GPU
  const uint32_t word = __byte_perm(bytes, 0x64646464u, 0x4140);
  const uint32_t offset = 0x64806480u;  // 1152, twice
  uint32_t result;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(result) : "r"(word), "r"(offset));
  return result;
#else
  const float low = HalfToFloat(static_cast<uint16_t>(0x6400u | (bytes & 0xffu))) - 1152.0f;
  const float high = HalfToFloat(static_cast<uint16_t>(0x6400u | bytes >> 8)) - 1152.0f;
  return FloatToHalf(low) | static_cast<uint32_t>(FloatToHalf(high)) << 16;
#endif
}

// kWhole: a slot is a tile, and chunks do not choose. Units are 8 tiles, 128 columns.
template <class Memory, bool kWhole>
struct Source {
  static constexpr int kRun = 32;
  static constexpr bool kFewForms = !kWhole;
  static constexpr int kTiles = 8;

  GpuWeight weight;
  int64_t panels, units;
  int unit_bits;

  explicit Source(const GpuWeight& weight_in)
      : weight(weight_in),
        panels(weight_in.panels),
        units(gpu::DivideUp(weight_in.blocks, kTiles)),
        unit_bits(0) {}

  // Twice the slot of each tile, plus 1 for a minus; or, where tiles are no slots, only their panel
  // and unit.
  struct Raw {
    uint32_t place[kWhole ? kTiles : 1];
    int64_t tile;  // the unit's first one
    int count;     // tiles that exist
  };

  ONNXCOMP_DEVICE int64_t TableBytes() const { return 0; }

  ONNXCOMP_DEVICE void Fill(int, char*) const {}

  ONNXCOMP_DEVICE Raw Load(int64_t panel, int64_t unit, int lane) const {
    Raw raw;
    raw.tile = panel * weight.blocks + unit * kTiles;
    const int64_t left = weight.blocks - unit * kTiles;
    raw.count = left < kTiles ? static_cast<int>(left) : kTiles;
    raw.place[0] = 0;
    if (kWhole && lane % kTiles < raw.count) {
      const Place place = PlaceOf(weight, raw.tile + lane % kTiles, 0);
      raw.place[0] = static_cast<uint32_t>(place.slot) * 2u + (place.minus ? 1u : 0u);
    }
    return raw;
  }

  // Each of eight threads found one tile.
  ONNXCOMP_DEVICE void Share(const gpu::Warp& warp, gpu::PerThread<Raw>& raw) const {
    if constexpr (kWhole) {
      gpu::PerThread<uint32_t> own;
      warp.EachLane([&](int thread) { own[thread] = raw[thread].place[0]; });
      ONNXCOMP_UNROLL
      for (int i = 0; i < kTiles; ++i) {
        const uint32_t place = warp.ValueOf(own, i);
        warp.EachLane([&](int thread) { raw[thread].place[i] = place; });
      }
    }
  }

  // Two tiles of 16 columns: four neighbouring columns of two neighbouring rows of each.
  ONNXCOMP_DEVICE void Decode(const Raw& raw, int step, int lane, const char*, gpu::Fragment& a,
                              gpu::Fragment& b) const {
    Tile(raw, 2 * step, lane, a);
    Tile(raw, 2 * step + 1, lane, b);
  }

  ONNXCOMP_DEVICE float Scale(const Raw&, int) const { return 1.0f; }

  ONNXCOMP_DEVICE int Row(int row) const { return row < 8 ? 2 * row : 2 * row - 15; }

 private:
  ONNXCOMP_DEVICE void Tile(const Raw& raw, int tile, int lane, gpu::Fragment& fragment) const {
    uint32_t pairs[4] = {};
    if (tile < raw.count) {
      ONNXCOMP_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int element = (lane % 4 * 4 + i) * 16 + lane / 4 * 2;
        pairs[i] = Pair(raw, tile, element);
      }
    }
    fragment.word[0] = gpu::PackLow(pairs[0], pairs[1]);
    fragment.word[1] = gpu::PackHigh(pairs[0], pairs[1]);
    fragment.word[2] = gpu::PackLow(pairs[2], pairs[3]);
    fragment.word[3] = gpu::PackHigh(pairs[2], pairs[3]);
  }

  ONNXCOMP_DEVICE uint32_t Pair(const Raw& raw, int tile, int element) const {
    const auto* memory = static_cast<const typename Memory::Element*>(weight.memory);
    if constexpr (kWhole) {
      const uint32_t place = raw.place[tile];
      const uint32_t sign = (place & 1u) != 0 ? 0x80008000u : 0u;
      return LoadPair(memory + static_cast<int64_t>(place >> 1) * kGpuTile + element) ^ sign;
    } else {
      const Place place = PlaceOf(weight, raw.tile + tile, element / weight.chunk);
      const int64_t at = place.slot * weight.chunk + element % weight.chunk;
      return LoadPair(memory + at) ^ (place.minus ? 0x80008000u : 0u);
    }
  }
};

}  // namespace onnxcomp::hash
