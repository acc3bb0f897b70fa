// Where chunks lie and which sign they have: the arithmetic of spec.md section 2.
//
// Internal linkage throughout: each translation unit gets its own copy, compiled with its own flags.
#pragma once

#include "hash/format.h"

namespace onnxcomp::hash {
namespace {

// A bijection of the integers below 2^31. Arithmetic modulo 2^32 suffices: only low bits count.
inline uint32_t Mix(uint32_t key) {
  uint32_t x = key * 741103597u + 506832693u;
  for (int round = 0; round < 4; ++round) {
    x = (x * (2u * x + 1u)) & kWord;
    x = (x >> 15) | ((x & 0x7fffu) << 16);
  }
  return x;
}

inline int64_t Reduce(uint32_t hash, int64_t count) {
  return static_cast<int64_t>((static_cast<uint64_t>(hash) * static_cast<uint64_t>(count)) >> 31);
}

// Walks over the slots of consecutive chunks.
class Walk {
 public:
  Walk(const Weight& weight, int64_t chunk)
      : run_(weight.map.run),
        slots_(weight.slots),
        rotate_(weight.map.rotate),
        partition_(chunk / run_),
        offset_(chunk % run_) {
    Enter();
  }

  int64_t slot() const { return slot_; }
  int64_t partition() const { return partition_; }

  void Next() {
    if (++offset_ == run_) {
      offset_ = 0;
      ++partition_;
      return Enter();
    }
    if (++slot_ == slots_) slot_ = 0;
  }

 private:
  void Enter() {
    const auto key = static_cast<uint32_t>(partition_ + rotate_);
    slot_ = (offset_ + (partition_ == 0 ? 0 : Reduce(Mix(key), slots_))) % slots_;
  }

  int64_t run_, slots_, rotate_;
  int64_t partition_, offset_;
  int64_t slot_;
};

// 2 * slot + (1 for a minus) of `count` chunks that are whole tiles, from a tile on.
inline void TileSteps(const Weight& weight, int64_t panel, int64_t block, int count,
                      uint64_t* steps) {
  const int64_t tile = weight.map.base + panel * weight.blocks + block;
  const auto key = static_cast<uint32_t>(tile + weight.map.sign);
  const auto is_signed = static_cast<uint32_t>(weight.map.is_signed);
  uint32_t minus[kSpan];
  for (int b = 0; b < kSpan; ++b) minus[b] = (Mix(key + static_cast<uint32_t>(b)) >> 30) & is_signed;
  Walk walk(weight, tile);
  for (int b = 0; b < count; ++b, walk.Next()) {
    steps[b] = static_cast<uint64_t>(walk.slot()) * 2 + (walk.partition() == 0 ? 0 : minus[b]);
  }
}

// Calls take(part, slot, minus) for the parts of one tile.
template <class Take>
inline void ForParts(const Weight& weight, int64_t panel, int64_t block, const Take& take) {
  const int parts = weight.parts();
  const int64_t local = panel * weight.blocks + block;
  const int64_t tile = weight.map.base + local;
  const auto key = static_cast<uint32_t>(tile + weight.map.sign);
  const bool hashed = weight.map.is_signed != 0 && (Mix(key) >> 30) != 0;
  Walk walk(weight, tile * parts);
  for (int part = 0; part < parts; ++part, walk.Next()) {
    int64_t slot = walk.slot();
    bool minus = hashed && walk.partition() != 0;
    if (weight.codes != nullptr) {
      const int code = weight.codes[local * parts + part];
      slot = (slot + code / 2 * weight.map.stride) % weight.slots;
      minus = minus != (code % 2 != 0);
    }
    take(part, slot, minus);
  }
}

}  // namespace
}  // namespace onnxcomp::hash
