#include "hyper/structure.h"

#include <algorithm>

namespace onnxcomp::hyper {
namespace {

constexpr int kCells = 16;
constexpr int kNarrowEntry = 31;
// Turns that are tried before a table counts as one of a freer kind, or as unstructured.
constexpr int kMaxTries = 1 << 14;

// Solves for F, P and G one c after the other. Where the windows of N and c overlap, not every pair
// of them exists: values of c then meet in separate classes of F, each of which may be shifted.
class Solver {
 public:
  Solver(const int8_t* table, int states, int32_t lowest, int shift)
      : table_(table), states_(states), lowest_(lowest), shift_(shift) {}

  // The first kind that fits. (Six state bits leave so much freedom that twists are hard to find.)
  bool Solve() {
    if (!SkipsBetween()) return false;
    if (PlaceLevel()) return true;
    twisted_ = true;
    if (states_ > 6 && Place(0, 0u)) return true;
    twisted_ = false;
    tries_ = 0;
    return Place(0, 0u);
  }

  bool twisted() const { return twisted_; }

  uint8_t cells[kCells] = {};
  uint8_t turns[kCells] = {};
  uint8_t steps[kCells] = {};

 private:
  // Whether bits between N and c do not count.
  bool SkipsBetween() const {
    const int between = states_ > 8 ? ((1 << (states_ - 4)) - 1) & ~15 : 0;
    for (int s = 0; s < 1 << states_; ++s) {
      if (table_[s] != table_[s & ~between]) return false;
    }
    return true;
  }

  // With P[c] = c.
  bool PlaceLevel() {
    uint32_t known = 0;
    for (int c = 0; c < kCells; ++c) {
      if (!Fill(c, c, &known)) return false;
    }
    return true;
  }

  // Finds P and G of `c` and all after it; `known` has a bit for every cell that holds a value. Only
  // what fits no known cells may have new ones, which there would not be enough of otherwise.
  bool Place(int c, uint32_t known) {
    if (c == kCells) return true;
    for (bool fresh : {false, true}) {
      for (int turn = 0; turn < kCells; ++turn) {
        const int cell = (First(c) + turn) % kCells;
        if (((known >> cell & 1u) == 0) != fresh) continue;
        if (++tries_ > kMaxTries) return false;
        uint32_t now = known;
        if (Fill(c, turn, &now) && Place(c + 1, now)) return true;
      }
    }
    return false;
  }

  // Values of N that meet this c begin here and are Apart() apart: all their cells are known or none.
  int First(int c) const { return (c >> (states_ - 4)) & (Apart() - 1); }
  int Apart() const { return states_ < 8 ? 1 << (8 - states_) : 1; }

  // Takes over the cells that `c` alone knows; false when one that is known contradicts it.
  bool Fill(int c, int turn, uint32_t* known) {
    turns[c] = static_cast<uint8_t>(turn);
    const int first = (First(c) + turn) % kCells;
    const bool here = (*known >> first & 1u) != 0;
    if (twisted_) {
      steps[c] = static_cast<uint8_t>(-turn);
    } else {
      steps[c] = static_cast<uint8_t>(here ? Entry(First(c), c) - cells[first] : 0);
    }
    for (int top = First(c); top < kCells; top += Apart()) {
      const int cell = (top + turn) % kCells;
      const auto entry = static_cast<uint8_t>(Entry(top, c) - steps[c]);
      if (here && cells[cell] != entry) return false;
      cells[cell] = entry;
      *known |= 1u << cell;
    }
    return true;
  }

  // u of the state with these windows.
  uint8_t Entry(int top, int c) const {
    const int state = (top << (states_ - 4)) | (c & ((1 << (states_ - 4)) - 1));
    return static_cast<uint8_t>((table_[state] - lowest_) >> shift_);
  }

  const int8_t* table_;
  int states_;
  int32_t lowest_;
  int shift_;
  int tries_ = 0;
  bool twisted_ = false;
};

}  // namespace

bool Structure::Find(const int8_t* table, int states, int bits) {
  if (!Known(states, bits)) return false;
  const int size = 1 << states;
  const auto [low, high] = std::minmax_element(table, table + size);
  beta = *low;
  uint32_t ones = 0;
  for (int s = 0; s < size; ++s) ones |= static_cast<uint32_t>(table[s] - beta);
  if (ones == 0) return false;
  for (shift = 0; (ones >> shift & 1u) == 0;) ++shift;
  const int largest = (*high - beta) >> shift;
  if (largest > kMaxEntry) return false;
  narrow = largest <= kNarrowEntry;
  Solver solver(table, states, beta, shift);
  if (!solver.Solve()) return false;
  std::copy_n(solver.cells, kCells, cells);
  std::copy_n(solver.turns, kCells, turns);
  std::copy_n(solver.steps, kCells, steps);
  bool level = true;
  bool falling = true;
  for (int c = 0; c < kCells; ++c) {
    level = level && turns[c] == c;
    falling = falling && states >= 8 && steps[c] == static_cast<uint8_t>(steps[0] - c);
  }
  if (level) {
    kind = falling ? kFalling : kSloped;
  } else {
    kind = solver.twisted() ? kTwisted : kTurned;
  }
  if (states > 8 && (kind != kFalling || shift != 1)) return false;
  for (int i = 0; i < kCells; ++i) {
    if (kind == kFalling) {
      cells[i] = static_cast<uint8_t>(cells[i] + solver.steps[0]);
      steps[i] = static_cast<uint8_t>(-i);
    }
    whole_cells[i] = static_cast<uint8_t>((cells[i] << shift) + beta);
    whole_steps[i] = static_cast<uint8_t>(steps[i] << shift);
  }
  return true;
}

}  // namespace onnxcomp::hyper
