// Where chunks lie and which sign they have: the arithmetic of spec.md section 2.
//
// Internal linkage throughout: each translation unit gets its own copy, compiled with its own flags.
#pragma once

#include <algorithm>

#include "hash/format.h"
#include "hash/mix.h"

namespace onnxcomp::hash {
namespace {

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

  // Chunks from here on, at most `most`, whose slots are consecutive.
  int64_t Stretch(int64_t most) const {
    const int64_t left = std::min(run_ - offset_, slots_ - slot_);
    return std::min(left, most);
  }

  // Moves on inside a stretch, or to its end.
  void Skip(int64_t count) {
    offset_ += count - 1;
    slot_ += count - 1;
    Next();
  }

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

// 2 * slot + (1 for a minus) of consecutive whole tiles of one panel, some hundred at a time: the
// hashes of their signs are independent of each other and make one vector loop.
class Steps {
 public:
  Steps(const Weight& weight, int64_t panel) : weight_(weight), panel_(panel) {}

  // Those of the eight tiles, or fewer, from a block on. Blocks are asked for in order.
  const uint64_t* At(int64_t block) {
    if (block >= end_) Fill(block);
    return steps_ + (block - begin_);
  }

 private:
  static constexpr int kAtOnce = 16 * kSpan;

  void Fill(int64_t block) {
    begin_ = block;
    end_ = block + kAtOnce < weight_.blocks ? block + kAtOnce : weight_.blocks;
    const int64_t tile = weight_.map.base + panel_ * weight_.blocks + block;
    const auto key = static_cast<uint32_t>(tile + weight_.map.sign);
    const auto is_signed = static_cast<uint32_t>(weight_.map.is_signed);
    uint32_t minus[kAtOnce];
    for (int b = 0; b < kAtOnce; ++b) {
      minus[b] = (Mix(key + static_cast<uint32_t>(b)) >> 30) & is_signed;
    }
    Walk walk(weight_, tile);
    for (int64_t b = 0, count = 0; b < end_ - begin_; b += count, walk.Skip(count)) {
      count = walk.Stretch(end_ - begin_ - b);
      const uint32_t hashed = walk.partition() == 0 ? 0 : 1;
      const auto first = static_cast<uint64_t>(walk.slot());
      for (int64_t i = 0; i < count; ++i) {
        steps_[b + i] = (first + static_cast<uint64_t>(i)) * 2 + (minus[b + i] & hashed);
      }
    }
  }

  const Weight& weight_;
  int64_t panel_;
  int64_t begin_ = 0;
  int64_t end_ = 0;
  uint64_t steps_[kAtOnce];
};

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
