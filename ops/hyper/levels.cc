#include "hyper/levels.h"

namespace onnxcomp::hyper {
namespace {

constexpr int kUnknown = -128;  // no entry of a table

// Tries one multiplier; gives up at the first state that contradicts the ones before.
bool Fits(const int8_t* table, int states, uint32_t multiplier, int8_t* values) {
  const uint32_t size = 1u << states;
  for (int v = 0; v < 256; ++v) values[v] = kUnknown;
  uint32_t u = (multiplier - 1) / 2;
  for (uint32_t s = 0; s < size; ++s, u = (u + multiplier) & (size - 1)) {
    int8_t& value = values[u >> (states - 8)];
    if (value == kUnknown) value = table[s];
    if (value != table[s]) return false;
  }
  for (int v = 0; v < 128; ++v) {
    if (values[255 - v] != -values[v]) return false;
  }
  return true;
}

}  // namespace

bool Levels::Find(const int8_t* table, int states) {
  if (states <= 8) return false;
  const uint32_t size = 1u << states;
  for (uint32_t a = 1; a < size; a += 2) {
    if (!Fits(table, states, a, values)) continue;
    multiplier = static_cast<uint16_t>(a << (16 - states));
    offset = static_cast<uint16_t>((a - 1) / 2 << (16 - states));
    return true;
  }
  return false;
}

}  // namespace onnxcomp::hyper
