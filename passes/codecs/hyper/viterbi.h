// Encoder of sixteen (row, group) blocks at a time; included once per instruction set by
// hyper_encode.cc, which defines ONNXCOMP_ISA (a namespace) and one of ONNXCOMP_AVX512,
// ONNXCOMP_AVX2 or neither. No include guard on purpose.
//
// Costs are exact integers, so every instruction set finds the same path. With y the target in
// 1/16 of a table unit, the cost of state s is 2^(K+3) (q^2 - 2 (y/16) q), a multiple of 2^K: the
// K low bits carry the index of the predecessor through every minimum for free.
//
// Names: state s has L bits; its K top bits are the symbol, its L - K low bits are the `stem`, the
// part shared with the previous state. Each stem has 2^K predecessors, (stem << K) | j.
//
// `store_history` keeps the low bytes of the costs of four stems, which end in the indices; what is
// above these does not matter. `history_at` is where the byte of a stem lies.

#include "rotation.h"

namespace ONNXCOMP_ISA {

#if defined(ONNXCOMP_AVX512)

// The zero-masked forms spare GCC 12 a false warning; they compile to the plain instructions.
struct Lanes {
  __m512i v;
};
inline Lanes load(const int32_t* p) { return {_mm512_load_si512(p)}; }
inline void store(int32_t* p, Lanes a) { _mm512_store_si512(p, a.v); }
inline Lanes splat(int32_t a) { return {_mm512_set1_epi32(a)}; }
inline Lanes min(Lanes a, Lanes b) { return {_mm512_maskz_min_epi32(0xFFFF, a.v, b.v)}; }
inline Lanes add(Lanes a, Lanes b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Lanes sub(Lanes a, Lanes b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline Lanes bit_and(Lanes a, Lanes b) { return {_mm512_and_si512(a.v, b.v)}; }
inline void store_history(uint8_t* p, const int32_t* costs) {
  for (int i = 0; i < 4; ++i, p += kLanes, costs += kLanes)
    _mm_store_si128(reinterpret_cast<__m128i*>(p),
                    _mm512_maskz_cvtepi32_epi8(0xFFFF, load(costs).v));
}
inline int history_at(int32_t stem, int lane) { return stem * kLanes + lane; }
inline Lanes advance(Lanes cost, Lanes target, const StateCost& state) {
  return {_mm512_dpwssd_epi32(cost.v, target.v, _mm512_set1_epi32(state.pair))};
}
inline int32_t pack_target(int32_t y, int32_t unit) { return (-y & 0xFFFF) | (unit << 16); }

#elif defined(ONNXCOMP_AVX2)

struct Lanes {
  __m256i a, b;
};
inline Lanes load(const int32_t* p) {
  return {_mm256_load_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_load_si256(reinterpret_cast<const __m256i*>(p) + 1)};
}
inline void store(int32_t* p, Lanes x) {
  _mm256_store_si256(reinterpret_cast<__m256i*>(p), x.a);
  _mm256_store_si256(reinterpret_cast<__m256i*>(p) + 1, x.b);
}
inline Lanes splat(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Lanes min(Lanes x, Lanes y) {
  return {_mm256_min_epi32(x.a, y.a), _mm256_min_epi32(x.b, y.b)};
}
inline Lanes add(Lanes x, Lanes y) {
  return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)};
}
inline Lanes sub(Lanes x, Lanes y) {
  return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)};
}
inline Lanes bit_and(Lanes x, Lanes y) {
  return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)};
}
// Costs of one stem as words with the low bytes, lanes 0-3 8-11 4-7 12-15.
inline __m256i low_bytes(const int32_t* costs) {
  const __m256i octet = _mm256_set1_epi32(0xFF);
  const Lanes x = load(costs);
  return _mm256_packs_epi32(_mm256_and_si256(x.a, octet), _mm256_and_si256(x.b, octet));
}
inline void store_history(uint8_t* p, const int32_t* costs) {
  for (int i = 0; i < 2; ++i, p += 2 * kLanes, costs += 2 * kLanes) {
    const __m256i two = _mm256_packus_epi16(low_bytes(costs), low_bytes(costs + kLanes));
    _mm256_store_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(two, 0xD8));
  }
}
inline int history_at(int32_t stem, int lane) {
  return stem * kLanes + ((lane & 4) << 1 | (lane & 8) >> 1 | (lane & 3));
}
inline Lanes advance(Lanes cost, Lanes target, const StateCost& state) {
  const __m256i pair = _mm256_set1_epi32(state.pair);
  return {_mm256_add_epi32(cost.a, _mm256_madd_epi16(target.a, pair)),
          _mm256_add_epi32(cost.b, _mm256_madd_epi16(target.b, pair))};
}
inline int32_t pack_target(int32_t y, int32_t unit) { return (-y & 0xFFFF) | (unit << 16); }

#else

typedef int32_t Quad __attribute__((vector_size(16)));
struct Lanes {
  Quad v[4];
};
template <class Operation>
inline Lanes each(Operation operation) {
  return {{operation(0), operation(1), operation(2), operation(3)}};
}
inline Lanes load(const int32_t* p) {
  const Quad* quads = reinterpret_cast<const Quad*>(p);
  return each([&](int i) { return quads[i]; });
}
inline void store(int32_t* p, const Lanes& a) {
  for (int i = 0; i < 4; ++i) reinterpret_cast<Quad*>(p)[i] = a.v[i];
}
inline Lanes splat(int32_t a) {
  return each([&](int) { return Quad{a, a, a, a}; });
}
inline Lanes min(const Lanes& a, const Lanes& b) {
  return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline Lanes add(const Lanes& a, const Lanes& b) {
  return each([&](int i) { return a.v[i] + b.v[i]; });
}
inline Lanes sub(const Lanes& a, const Lanes& b) {
  return each([&](int i) { return a.v[i] - b.v[i]; });
}
inline Lanes bit_and(const Lanes& a, const Lanes& b) {
  return each([&](int i) { return a.v[i] & b.v[i]; });
}
inline void store_history(uint8_t* p, const int32_t* costs) {
  for (int i = 0; i < 4 * kLanes; ++i) p[i] = static_cast<uint8_t>(costs[i]);
}
inline int history_at(int32_t stem, int lane) { return stem * kLanes + lane; }
inline Lanes advance(const Lanes& cost, const Lanes& target, const StateCost& state) {
  return each([&](int i) { return cost.v[i] + state.square - target.v[i] * state.slope; });
}
inline int32_t pack_target(int32_t y, int32_t) { return y; }

#endif

template <int K, int L>
struct Trellis {
  static constexpr int kStems = 1 << (L - K);
  static constexpr int32_t kBranches = 1 << K;
  static constexpr int32_t kIndex = kBranches - 1;
  // Stems that are `kRuns` apart share their predecessors.
  static constexpr int kRuns = L - K > K ? 1 << (L - 2 * K) : 1;
  // Predecessors held in registers at a time.
  static constexpr int kHeld = kBranches < 16 ? kBranches : 16;
  // Without this, 256 steps of the largest costs could pass 2^31.
  static constexpr bool kNormalise = K >= 5;

  // Costs of `kHeld` predecessors from `first` on, each with its index in the low bits.
  static void hold(const int32_t* costs, int run, int first, Lanes* held) {
    const Lanes clean = splat(~kIndex);
#pragma GCC unroll 16
    for (int i = 0; i < kHeld; ++i) {
      const int stem = (run * kBranches + first + i) & (kStems - 1);
      held[i] = bit_and(load(costs + stem * kLanes), clean);
      if (kNormalise) held[i] = sub(held[i], bit_and(load(costs), clean));
      held[i] = add(held[i], splat(first + i));
    }
  }

  // One weight: from the costs of all stems to the next ones, the best index in their low bits.
  static void step(const int32_t* target, const StateCost* states, const int32_t* costs,
                   int32_t* next) {
    const Lanes y = load(target);
    for (int run = 0; run < kRuns; ++run)
      for (int first = 0; first < kBranches; first += kHeld) {
        Lanes held[kHeld];
        hold(costs, run, first, held);
        for (int stem = run; stem < kStems; stem += kRuns) {
          const StateCost* state = states + stem * kBranches + first;
          Lanes least = advance(held[0], y, state[0]);
#pragma GCC unroll 16
          for (int i = 1; i < kHeld; ++i) least = min(least, advance(held[i], y, state[i]));
          if (first > 0) least = min(least, load(next + stem * kLanes));
          store(next + stem * kLanes, least);
        }
      }
  }

  static void cheapest(const int32_t* costs, int32_t* stem) {
    for (int lane = 0; lane < kLanes; ++lane) {
      int32_t least = costs[lane] & ~kIndex;
      stem[lane] = 0;
      for (int32_t i = 1; i < kStems; ++i) {
        const int32_t cost = costs[i * kLanes + lane] & ~kIndex;
        if (cost < least) least = cost, stem[lane] = i;
      }
    }
  }

  // The best path over the cycle of targets that begins at weight `start` (`targets` holds the
  // group twice). An open path begins and ends anywhere; any other one begins and ends with the
  // stem that the path found before has there, so that it bites its own tail.
  static void search(const int32_t* targets, const Trial& trial, int start, bool open) {
    const int group = trial.group;
    alignas(64) int32_t stem[kLanes];
    int32_t *costs = trial.costs, *next = costs + kStems * kLanes;
    std::fill(costs, next, open ? 0 : kFar);
    for (int lane = 0; lane < kLanes && !open; ++lane) {
      stem[lane] = trial.path[(start + group - 1) % group * kLanes + lane] >> K;
      costs[stem[lane] * kLanes + lane] = 0;
    }
    for (int t = 0; t < group; ++t) {
      step(targets + (start + t) * kLanes, trial.states, costs, next);
      std::swap(costs, next);
      uint8_t* history = trial.history + size_t(t) * kStems * kLanes;
      for (int i = 0; i < kStems * kLanes; i += 4 * kLanes) store_history(history + i, costs + i);
    }
    if (open) cheapest(costs, stem);
    trace(trial, start, stem);
  }

  // Follow the path back from the stems it ends with.
  static void trace(const Trial& trial, int start, int32_t* stem) {
    for (int t = trial.group - 1; t >= 0; --t) {
      const uint8_t* history = trial.history + size_t(t) * kStems * kLanes;
      uint16_t* path = trial.path + (start + t) % trial.group * kLanes;
      for (int lane = 0; lane < kLanes; ++lane) {
        const int32_t index = history[history_at(stem[lane], lane)] & kIndex;
        const int32_t state = (stem[lane] << K) | index;
        path[lane] = static_cast<uint16_t>(state);
        stem[lane] = state & (kStems - 1);
      }
    }
  }
};

// Targets in 1/16 of a table unit, twice in a row so that any window of the cycle is contiguous.
inline void set_targets(const float* x, const float* factor, int group, int32_t unit,
                        int16_t* y, int32_t* targets) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to nearest even
  for (int t = 0; t < group; ++t)
    for (int lane = 0; lane < kLanes; ++lane) {
      const int i = t * kLanes + lane;
      const float value = std::min(std::max(x[i] * factor[lane], -32767.0f), 32767.0f);
      y[i] = static_cast<int16_t>((value + kRound) - kRound);
      targets[i] = targets[i + group * kLanes] = pack_target(y[i], unit);
    }
}

// Sums over a path of value * target and value^2, per lane.
inline void correlate(const uint16_t* path, const int8_t* table, const int16_t* y, int group,
                      int32_t* product, int32_t* square) {
  for (int t = 0; t < group; ++t) {
    int16_t value[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) value[lane] = table[path[t * kLanes + lane]];
    for (int lane = 0; lane < kLanes; ++lane) {
      product[lane] += int32_t{value[lane]} * y[t * kLanes + lane];
      square[lane] += int32_t{value[lane]} * value[lane];
    }
  }
}

// The search for one (K, L), or null when there is no such trellis.
inline Search find_search(int bits, int state_bits) {
#define ONNXCOMP_CASE(K, L) \
  if (bits == K && state_bits == L) return Trellis<K, L>::search;
  ONNXCOMP_EACH_TRELLIS(ONNXCOMP_CASE)
#undef ONNXCOMP_CASE
  return nullptr;
}

constexpr Kernels kernels = {rotate, set_targets, correlate, find_search};

}  // namespace ONNXCOMP_ISA
