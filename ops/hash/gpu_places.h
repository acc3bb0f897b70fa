// Where weights of the codec hash lie, on a GPU: the arithmetic of spec.md section 2.
#pragma once

#include "gpu/simt.h"
#include "hash/mix.h"

namespace onnxcomp::hash {

constexpr int kGpuTile = 256;  // weights of a tile: 16 columns of 16 rows

// A weight in device memory.
struct GpuWeight {
  int64_t rows, length, panels, blocks;
  int64_t slots;
  int chunk;
  const void* memory;
  const uint8_t* codes;  // or null
  float scale;
  int64_t base, run, stride, rotate, sign;
  bool is_signed;
};

struct Place {
  int64_t slot;
  bool minus;
};

// Quotient and remainder; numbers below 2^32 take the short way.
struct Division {
  int64_t quotient, remainder;

  ONNXCOMP_DEVICE Division(int64_t number, int64_t by) {
    if (number >> 32 == 0) {
      const auto small = static_cast<uint32_t>(number);
      quotient = small / static_cast<uint32_t>(by);
    } else {
      quotient = number / by;
    }
    remainder = number - quotient * by;
  }
};

// Where chunk `part` of a weight's tile lies; `tile` counts from the weight's first one.
ONNXCOMP_DEVICE Place PlaceOf(const GpuWeight& weight, int64_t tile, int part) {
  const int parts = kGpuTile / weight.chunk;
  const int64_t number = weight.base + tile;
  const Division at(number * parts + part, weight.run);
  int64_t slot = at.remainder;
  bool minus = false;
  if (at.quotient != 0) {
    slot += Reduce(Mix(static_cast<uint32_t>(at.quotient + weight.rotate)), weight.slots);
    minus = weight.is_signed && Mix(static_cast<uint32_t>(number + weight.sign)) >> 30 != 0;
  }
  if (weight.codes != nullptr) {
    const int code = weight.codes[tile * parts + part];
    slot += code / 2 * weight.stride;
    minus = minus != (code % 2 != 0);
  }
  if (slot >= weight.slots) slot -= weight.slots;
  if (slot >= weight.slots) slot %= weight.slots;
  return {slot, minus};
}

// Element types of a memory.
struct Halves {
  using Element = uint16_t;
  static ONNXCOMP_DEVICE float Float(Element element) { return gpu::FloatOfHalf(element); }
};
struct Bytes {
  using Element = int8_t;
  static ONNXCOMP_DEVICE float Float(Element element) { return static_cast<float>(element); }
};
struct Floats {
  using Element = float;
  static ONNXCOMP_DEVICE float Float(Element element) { return element; }
};

// One weight, without the scale; element 16 j + i of a tile is row i of column j.
template <class Memory>
ONNXCOMP_DEVICE float WeightAt(const GpuWeight& weight, int64_t tile, int element) {
  const Place place = PlaceOf(weight, tile, element / weight.chunk);
  const auto* memory = static_cast<const typename Memory::Element*>(weight.memory);
  const float value = Memory::Float(memory[place.slot * weight.chunk + element % weight.chunk]);
  return place.minus ? -value : value;
}

}  // namespace onnxcomp::hash
