// y = x W^T for one row of activations and a memory of whole tiles, without tensor cores.
//
// The memory lies in the second cache, so reading it and the arithmetic are what takes time. A lane
// reads 16 bytes of a tile at once: eight rows of one column in float16, 16 rows in int8. Places of 32
// tiles are found by 32 lanes; signs go to the activations.
#pragma once

#include "gpu/bits.h"
#include "gpu/launch.h"
#include "gpu/product.h"
#include "hash/gpu_places.h"

namespace onnxcomp::hash {

using gpu::Vector;

// PlaceOf() for chunks of a tile and no codes, in 32 bits.
ONNXCOMP_DEVICE Place TilePlace(const GpuWeight& weight, int64_t tile) {
  const auto slots = static_cast<uint32_t>(weight.slots);
  const auto run = static_cast<uint32_t>(weight.run);
  const auto number = static_cast<uint32_t>(weight.base + tile);
  const uint32_t round = number / run;
  uint32_t slot = number - round * run;
  bool minus = false;
  if (round != 0) {
    slot += static_cast<uint32_t>(
        Reduce(Mix(round + static_cast<uint32_t>(weight.rotate)), weight.slots));
    minus = weight.is_signed && Mix(number + static_cast<uint32_t>(weight.sign)) >> 30 != 0;
  }
  if (slot >= slots) slot -= slots;
  if (slot >= slots) slot %= slots;
  return {slot, minus};
}

// The bytes of a 4 x 4 matrix, turned: word j of the result has byte j of each word.
ONNXCOMP_THREAD void TurnBytes(const uint32_t (&a)[4], uint32_t (&turned)[4]) {
  const uint32_t low0 = gpu::Permute(a[0], a[1], 0x5140u);
  const uint32_t low1 = gpu::Permute(a[2], a[3], 0x5140u);
  const uint32_t high0 = gpu::Permute(a[0], a[1], 0x7362u);
  const uint32_t high1 = gpu::Permute(a[2], a[3], 0x7362u);
  turned[0] = gpu::Permute(low0, low1, 0x5410u);
  turned[1] = gpu::Permute(low0, low1, 0x7632u);
  turned[2] = gpu::Permute(high0, high1, 0x5410u);
  turned[3] = gpu::Permute(high0, high1, 0x7632u);
}

// Calls store(i, value) for every activation of the row, and zeros up to `padded`.
template <int kCount, class Store>
ONNXCOMP_THREAD void LoadRow(gpu::Type type, const void* x, int64_t length, bool aligned,
                             int padded, const Store& store) {
  if (aligned && type != gpu::Type::kFloat32) {
    const auto* vectors = static_cast<const Vector*>(x);
    const auto count = static_cast<int>(length / 8);
    for (int i = gpu::ThreadIndex(); i < padded / 8; i += kCount) {
      const Vector vector = i < count ? gpu::LoadFresh(vectors + i) : Vector{};
      ONNXCOMP_UNROLL
      for (int e = 0; e < 8; ++e) {
        const auto bits = static_cast<uint16_t>(vector.word[e / 2] >> (e % 2 * 16));
        store(8 * i + e, type == gpu::Type::kFloat16
                             ? gpu::FloatOfHalf(bits)
                             : gpu::FloatOfBits(static_cast<uint32_t>(bits) << 16));
      }
    }
    return;
  }
  for (int i = gpu::ThreadIndex(); i < padded; i += kCount) {
    store(i, i < length ? gpu::LoadElement(type, x, i) : 0.0f);
  }
}

// A memory of float16: a block for each panel, whose warps share its tiles. Float32 arithmetic.
struct OneRowHalves {
  static constexpr int kBlocks = 4;
  static constexpr int kAtOnce = 8;  // loads of a lane

  GpuWeight weight;
  const void* x;  // (length,)
  bool aligned;   // vectors of 16 bytes
  gpu::Output y;

  ONNXCOMP_DEVICE int TilesOfWarp() const {
    return static_cast<int>(gpu::DivideUp(weight.blocks, gpu::kWarps * gpu::kWarp)) * gpu::kWarp;
  }
  ONNXCOMP_DEVICE int Padded() const { return TilesOfWarp() * gpu::kWarps * 16; }
  int64_t SharedBytes() const { return Padded() * 4 + gpu::kWarps * 16 * 4; }

  ONNXCOMP_THREAD void operator()(gpu::Block& block) const {
    const int warp = gpu::ThreadIndex() / gpu::kWarp;
    const int lane = gpu::ThreadIndex() % gpu::kWarp;
    auto* values = reinterpret_cast<float*>(block.shared);
    gpu::StartNextGrid();
    gpu::AwaitPreviousGrid();
    LoadRow<gpu::kThreads>(y.type, x, weight.length, aligned, Padded(),
                           [&](int i, float value) { values[i] = value; });
    block.Sync();
    float sums[8] = {};
    const int tiles = TilesOfWarp();
    for (int first = warp * tiles; first < (warp + 1) * tiles; first += gpu::kWarp) {
      Add(block.x * weight.blocks, first, lane, values, sums);
    }
    float* all = values + Padded();
    ONNXCOMP_UNROLL
    for (int i = 0; i < 8; ++i) {
      ONNXCOMP_UNROLL
      for (int mask = 2; mask < gpu::kWarp; mask *= 2) sums[i] += gpu::ShuffleXor(sums[i], mask);
      if (lane < 2) all[warp * 16 + lane * 8 + i] = sums[i];
    }
    block.Sync();
    if (gpu::ThreadIndex() >= 16) return;
    float sum = 0.0f;
    for (int i = 0; i < gpu::kWarps; ++i) sum += all[i * 16 + gpu::ThreadIndex()];
    y.Store(0, block.x * 16 + gpu::ThreadIndex(), sum);
  }

 private:
  // 32 tiles of the panel that begins at tile `panel`. Beyond its last one activations are zero.
  ONNXCOMP_THREAD void Add(int64_t panel, int first, int lane, const float* values,
                           float (&sums)[8]) const {
    uint32_t own = 0;
    if (first + lane < weight.blocks) {
      const Place place = TilePlace(weight, panel + first + lane);
      own = static_cast<uint32_t>(place.slot) * 2u + (place.minus ? 1u : 0u);
    }
    const auto* memory = static_cast<const char*>(weight.memory) + lane * 16;
    ONNXCOMP_UNROLL_TWICE
    for (int base = 0; base < gpu::kWarp; base += kAtOnce) {
      Vector tile[kAtOnce];
      uint32_t place[kAtOnce];
      ONNXCOMP_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        place[i] = gpu::Shuffle(own, base + i);
        tile[i] = *reinterpret_cast<const Vector*>(memory + static_cast<int64_t>(place[i] >> 1) * 512);
      }
      ONNXCOMP_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        const float value = values[(first + base + i) * 16 + lane / 2];
        const float x = gpu::FloatOfBits(gpu::BitsOfFloat(value) ^ place[i] << 31);
        ONNXCOMP_UNROLL
        for (int e = 0; e < 8; ++e) {
          const auto bits = static_cast<uint16_t>(tile[i].word[e / 2] >> (e % 2 * 16));
          sums[e] += gpu::FloatOfHalf(bits) * x;
        }
      }
    }
  }
};

// A memory of int8: four tiles are four terms of a sum of bytes. Activations are 16 bits of the row's
// largest, as two bytes.
struct OneRowBytes {
  static constexpr int kWarpCount = 16;
  static constexpr int kBlockThreads = kWarpCount * gpu::kWarp;
  static constexpr int kBlocks = 1;
  static constexpr int kBatch = 8;  // tiles of a warp at a time
  static constexpr int kAhead = 3;  // batches whose loads are under way

  GpuWeight weight;
  const void* x;
  bool aligned;
  gpu::Output y;
  int panels;  // of a block: a power of two, at most 16

  ONNXCOMP_DEVICE int WarpsOfPanel() const { return kWarpCount / panels; }
  ONNXCOMP_DEVICE int TilesOfWarp() const {
    return static_cast<int>(gpu::DivideUp(weight.blocks, WarpsOfPanel() * kBatch)) * kBatch;
  }
  ONNXCOMP_DEVICE int Padded() const { return TilesOfWarp() * WarpsOfPanel() * 16; }

  // Shared memory, in bytes: activations as float, which later are high bytes and low bytes; places
  // and signs of each warp; maxima and sums.
  ONNXCOMP_DEVICE int PlacesAt() const { return Padded() * 6; }
  ONNXCOMP_DEVICE int PlaceBytes() const { return (TilesOfWarp() + 31) / 32 * 4 * 33; }
  ONNXCOMP_DEVICE int SumsAt() const { return PlacesAt() + kWarpCount * ((PlaceBytes() + 15) / 16 * 16); }
  int64_t SharedBytes() const { return SumsAt() + kWarpCount * (16 + 1) * 4; }

  ONNXCOMP_THREAD void operator()(gpu::Block& block) const {
    const int warp = gpu::ThreadIndex() / gpu::kWarp;
    const int lane = gpu::ThreadIndex() % gpu::kWarp;
    const int64_t wanted = block.x * panels + warp / WarpsOfPanel();
    const int64_t panel = wanted < weight.panels ? wanted : weight.panels - 1;
    const int first = warp % WarpsOfPanel() * TilesOfWarp();
    auto* places = reinterpret_cast<uint32_t*>(block.shared + PlacesAt() +
                                               warp * ((PlaceBytes() + 15) / 16 * 16));
    gpu::StartNextGrid();
    FindPlaces(panel * weight.blocks, first, lane, places);
    gpu::AwaitPreviousGrid();
    const float largest = Round(block, warp, lane);
    float sums[16];
    Add(block, first, lane, places, sums);
    auto* all = reinterpret_cast<float*>(block.shared + SumsAt());
    AddLanes(lane, sums);
    if (lane % 2 == 0) all[warp * 16 + lane / 2] = sums[0];
    block.Sync();
    if (gpu::ThreadIndex() >= panels * 16) return;
    const int of = gpu::ThreadIndex() / 16;
    float sum = 0.0f;
    for (int i = 0; i < WarpsOfPanel(); ++i) {
      sum += all[(of * WarpsOfPanel() + i) * 16 + gpu::ThreadIndex() % 16];
    }
    y.Store(0, (block.x * panels + of) * 16 + gpu::ThreadIndex() % 16,
            sum * (largest * (1.0f / 32767.0f)));
  }

 private:
  // Slots of the warp's tiles; then a word of signs for each 32 of them.
  ONNXCOMP_THREAD void FindPlaces(int64_t panel, int first, int lane, uint32_t* places) const {
    const int count = TilesOfWarp();
    for (int base = 0; base < count; base += gpu::kWarp) {
      const int tile = base + lane;
      Place place{0, false};
      if (tile < count && first + tile < weight.blocks) {
        place = TilePlace(weight, panel + first + tile);
      }
      if (tile < count) places[tile] = static_cast<uint32_t>(place.slot);
      const uint32_t signs = gpu::Ballot(place.minus);
      if (lane == 0) places[(count + 31) / 32 * 32 + base / 32] = signs;
    }
    gpu::SyncWarp();
  }

  // Rounds the activations: byte of column c of tile t at t / 4 * 64 + 4 c + t mod 4. Returns the
  // largest magnitude; NaN where one is not finite.
  ONNXCOMP_THREAD float Round(gpu::Block& block, int warp, int lane) const {
    auto* values = reinterpret_cast<float*>(block.shared);
    uint32_t most = 0;
    LoadRow<kBlockThreads>(y.type, x, weight.length, aligned, Padded(), [&](int i, float value) {
      values[i] = value;
      const uint32_t bits = gpu::BitsOfFloat(value) & 0x7fffffffu;
      most = bits > most ? bits : most;
    });
    ONNXCOMP_UNROLL
    for (int mask = 1; mask < gpu::kWarp; mask *= 2) {
      const uint32_t other = gpu::ShuffleXor(most, mask);
      most = other > most ? other : most;
    }
    auto* all = reinterpret_cast<uint32_t*>(block.shared + SumsAt()) + kWarpCount * 16;
    if (lane == 0) all[warp] = most;
    block.Sync();
    ONNXCOMP_UNROLL
    for (int i = 0; i < kWarpCount; ++i) most = all[i] > most ? all[i] : most;
    if (most >= 0x7f800000u) return gpu::FloatOfBits(0x7fc00000u);
    const float largest = gpu::FloatOfBits(most < 0x0da24260u ? 0x0da24260u : most);  // 1e-30
    const float inverse = 32767.0f / largest;
    auto* high = reinterpret_cast<int8_t*>(block.shared + Padded() * 4);
    auto* low = reinterpret_cast<uint8_t*>(block.shared + Padded() * 5);
    for (int i = gpu::ThreadIndex(); i < Padded(); i += kBlockThreads) {
      constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: integers end at the last bit
      const uint32_t rounded = gpu::BitsOfFloat(values[i] * inverse + kRound);
      const int place = i / 64 * 64 + i % 16 * 4 + i / 16 % 4;
      high[place] = static_cast<int8_t>(rounded >> 8);
      low[place] = static_cast<uint8_t>(rounded);
    }
    block.Sync();
    return largest;
  }

  // Half a warp takes four tiles at a time, a lane one column of them.
  ONNXCOMP_THREAD void Add(const gpu::Block& block, int first, int lane, const uint32_t* places,
                           float (&sums)[16]) const {
    const int half = lane / 16;
    const int column = lane % 16;
    const int count = TilesOfWarp();
    const uint32_t* signs = places + (count + 31) / 32 * 32;
    const auto* memory = static_cast<const char*>(weight.memory) + column * 16;
    const char* high = block.shared + Padded() * 4;
    const char* low = block.shared + Padded() * 5;
    int above[16] = {};
    int below[16] = {};
    Vector ring[4][4];
    const auto load = [&](int batch, Vector(&tiles)[4]) {
      const Vector slots = *reinterpret_cast<const Vector*>(places + batch * kBatch + half * 4);
      ONNXCOMP_UNROLL
      for (int i = 0; i < 4; ++i) {
        tiles[i] =
            *reinterpret_cast<const Vector*>(memory + static_cast<int64_t>(slots.word[i]) * 256);
      }
    };
    const int batches = count / kBatch;
    ONNXCOMP_UNROLL
    for (int batch = 0; batch < kAhead; ++batch) {
      if (batch < batches) load(batch, ring[batch]);
    }
    for (int base = 0; base < batches; base += 4) {
      ONNXCOMP_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int batch = base + i;
        if (batch >= batches) break;
        if (batch + kAhead < batches) load(batch + kAhead, ring[(i + kAhead) % 4]);
        const uint32_t four = signs[batch / 4] >> (batch % 4 * 8 + half * 4) & 15u;
        const uint32_t flip = ((four * 0x00204081u) & 0x01010101u) * 255u;
        const int at = ((first / 4) + batch * 2 + half) * 64 + column * 4;
        // Inverting 16 bits negates and subtracts one, which is below what rounding leaves.
        const uint32_t x_high = *reinterpret_cast<const uint32_t*>(high + at) ^ flip;
        const uint32_t x_low = *reinterpret_cast<const uint32_t*>(low + at) ^ flip;
        ONNXCOMP_UNROLL
        for (int word = 0; word < 4; ++word) {
          const uint32_t rows[4] = {ring[i][0].word[word], ring[i][1].word[word],
                                    ring[i][2].word[word], ring[i][3].word[word]};
          uint32_t turned[4];
          TurnBytes(rows, turned);
          ONNXCOMP_UNROLL
          for (int j = 0; j < 4; ++j) {
            int& up = above[4 * word + j];
            int& down = below[4 * word + j];
            up = gpu::DotBytes(turned[j], x_high, up);
            down = gpu::DotUnsigned(turned[j], x_low, down);
          }
        }
      }
    }
    ONNXCOMP_UNROLL
    for (int i = 0; i < 16; ++i) {
      sums[i] = static_cast<float>(above[i]) * 256.0f + static_cast<float>(below[i]);
    }
  }

  // Adds 16 sums of all lanes: lane 2 i then has sum i as its first.
  template <int kCount = 8>
  static ONNXCOMP_THREAD void AddLanes(int lane, float (&sums)[16]) {
    const bool upper = (lane & (2 * kCount)) != 0;
    ONNXCOMP_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const float send = upper ? sums[i] : sums[i + kCount];
      const float keep = upper ? sums[i + kCount] : sums[i];
      sums[i] = keep + gpu::ShuffleXor(send, 2 * kCount);
    }
    if constexpr (kCount > 1) {
      AddLanes<kCount / 2>(lane, sums);
    } else {
      sums[0] += gpu::ShuffleXor(sums[0], 1);
    }
  }
};

}  // namespace onnxcomp::hash
