// Tile units of x86 (AMX): whether this process may use them, and their instructions.
//
// With ONNXCOMP_AMX_MODEL the instructions are a model in plain C++ that follows Intel's Software
// Developer's Manual, volume 2 (LDTILECFG, TILELOADD, TDPBSUD, TILESTORED, TILEZERO): tests run the
// kernels on it, because no machine of the project has these units.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef ONNXCOMP_AMX_MODEL
#include "common/error.h"
#endif

namespace onnxcomp::amx {

constexpr int kTiles = 8;      // registers
constexpr int kTileRows = 16;  // of a register, at most
constexpr int kTileBytes = 64; // of a row of a register, at most

// Whether the processor has the units and the system lets this process use them, which it is asked
// once. Only Linux is asked.
bool Available();

// The operand of LDTILECFG, palette 1.
struct alignas(64) Shapes {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes[16] = {};  // of a row, by register
  uint8_t rows[16] = {};

  void Set(int tile, int count, int width) {
    rows[tile] = static_cast<uint8_t>(count);
    bytes[tile] = static_cast<uint16_t>(width);
  }
};
static_assert(sizeof(Shapes) == 64);

#ifdef ONNXCOMP_AMX_MODEL

// The state of a thread.
struct State {
  bool configured = false;
  Shapes shapes{};
  uint8_t tiles[kTiles][kTileRows][kTileBytes] = {};
};

inline State& ThreadState() {
  static thread_local State state;
  return state;
}

// What the processor would answer with a fault.
inline void Require(bool holds, const char* what) {
  if (!holds) Fail("tile units: ", what);
}

// A register whose shape was given.
inline State& Configured(int tile) {
  State& state = ThreadState();
  Require(state.configured, "no shapes are loaded");
  Require(state.shapes.rows[tile] > 0 && state.shapes.bytes[tile] > 0, "a register has no shape");
  return state;
}

inline void Configure(const Shapes& shapes) {
  for (int i = 0; i < 16; ++i) {
    Require(shapes.rows[i] <= kTileRows && shapes.bytes[i] <= kTileBytes, "a shape is too large");
    Require((shapes.rows[i] == 0) == (shapes.bytes[i] == 0), "a shape has one size only");
    Require(i < kTiles || shapes.rows[i] == 0, "there are eight registers");
  }
  ThreadState() = State{true, shapes, {}};
}

inline void Release() { ThreadState() = State{}; }

template <int Tile>
void Zero() {
  std::memset(Configured(Tile).tiles[Tile], 0, sizeof State{}.tiles[Tile]);
}

template <int Tile>
void Load(const void* from, int64_t stride) {
  State& state = Configured(Tile);
  const auto* bytes = static_cast<const uint8_t*>(from);
  std::memset(state.tiles[Tile], 0, sizeof state.tiles[Tile]);
  for (int r = 0; r < state.shapes.rows[Tile]; ++r) {
    std::memcpy(state.tiles[Tile][r], bytes + r * stride, state.shapes.bytes[Tile]);
  }
}

template <int Tile>
void Store(void* to, int64_t stride) {
  const State& state = Configured(Tile);
  auto* bytes = static_cast<uint8_t*>(to);
  for (int r = 0; r < state.shapes.rows[Tile]; ++r) {
    std::memcpy(bytes + r * stride, state.tiles[Tile][r], state.shapes.bytes[Tile]);
  }
}

// Sum += A B: A holds signed bytes, B unsigned ones, four of the axis of the sum in each dword.
template <int Sum, int A, int B>
void Dot() {
  static_assert(Sum != A && Sum != B && A != B);
  Configured(A);
  Configured(B);
  State& state = Configured(Sum);
  const Shapes& shapes = state.shapes;
  Require(shapes.rows[Sum] == shapes.rows[A] && shapes.bytes[Sum] == shapes.bytes[B] &&
              shapes.bytes[A] == 4 * shapes.rows[B],
          "shapes do not fit together");
  for (int m = 0; m < shapes.rows[A]; ++m) {
    for (int n = 0; n < shapes.bytes[B]; n += 4) {
      uint32_t sum = 0;
      std::memcpy(&sum, &state.tiles[Sum][m][n], sizeof sum);
      for (int k = 0; k < shapes.bytes[A]; ++k) {
        const auto a = static_cast<int8_t>(state.tiles[A][m][k]);
        sum += static_cast<uint32_t>(a * state.tiles[B][k / 4][n + k % 4]);
      }
      std::memcpy(&state.tiles[Sum][m][n], &sum, sizeof sum);
    }
  }
}

#else

// As assembly: gcc's intrinsics take the number of a register as text only.

inline void Configure(const Shapes& shapes) { asm volatile("ldtilecfg %0" : : "m"(shapes)); }
inline void Release() { asm volatile("tilerelease"); }

template <int Tile>
void Zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(Tile));
}

template <int Tile>
void Load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(Tile) : "memory");
}

template <int Tile>
void Store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(Tile) : "memory");
}

// Sum += A B: A holds signed bytes, B unsigned ones, four of the axis of the sum in each dword.
template <int Sum, int A, int B>
void Dot() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sum), "i"(A), "i"(B));
}

#endif

}  // namespace onnxcomp::amx
