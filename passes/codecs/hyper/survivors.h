// Trellis search for errors that are weighed together; included once per instruction set by
// feedback.cc, behind product.h. It finds the paths of survivors.py, float by float. No include
// guard on purpose.
//
// Survivors are the lanes. The targets of each are moved by all the errors it has made, and that is
// done late: for the weights of one block at a time, and for all survivors at once as soon as an
// error is one they share, which a few weights later it nearly always is. Additions to one target
// keep the order of the weights, so that nothing depends on when they are done.

namespace ONNXCOMP_ISA {
namespace {

// to[i] = from[index[i]] for `Size` numbers of 32 bits.
template <int Size>
void gather(const float* from, const int32_t* index, float* to) {
  constexpr int W = Size < kWidest ? Size : kWidest;
  constexpr int kSources = Size / W;
  using V = Wide<W>;
  if constexpr (kWidest == 4 || kSources > 8) {
    for (int i = 0; i < Size; ++i) to[i] = from[index[i]];
  } else {
    for (int i = 0; i < Size; i += W) {
      const typename V::Ints at = V::ints(index + i), source = at >> V::kBits;
      typename V::Floats found = V::permute(V::floats(from), at);
#pragma GCC unroll 8
      for (int n = 1; n < kSources; ++n)
        found = source == n ? V::permute(V::floats(from + n * W), at) : found;
      V::floats(to + i) = found;
    }
  }
}

template <int Size>
void gather(const int32_t* from, const int32_t* index, int32_t* to) {
  gather<Size>(reinterpret_cast<const float*>(from), index, reinterpret_cast<float*>(to));
}

template <int K, int L>
class SurvivorTrellis {
 public:
  static constexpr int kStems = 1 << (L - K);
  static constexpr int kBranches = 1 << K;

  // Searches with the same costs, in step: a weight of one waits for the one before it, and the
  // processor works on the other search meanwhile.
  static void run(const SurvivorSearch* searches, const SurvivorMemory* memories, int count) {
    int first = 0;
    for (; first + 1 < count; first += 2) {
      SurvivorTrellis two[2] = {{searches[first], memories[first]},
                                {searches[first + 1], memories[first + 1]}};
      run(two);
    }
    if (first == count) return;
    SurvivorTrellis one[1] = {{searches[first], memories[first]}};
    run(one);
  }

 private:
  static constexpr int W = kStems < kWidest ? kStems : kWidest;
  // Stems with the same predecessors are so far apart.
  static constexpr int kRuns = kStems > kBranches ? kStems / kBranches : 1;
  // Minima over branches are found in so many chains, of so many branches each.
  static constexpr int kChains = kBranches < 8 ? 1 : kWidest == 16 ? 4 : 2;
  static constexpr int kChained = kBranches / kChains;
  using V = Wide<W>;
  using Floats = typename V::Floats;
  using Ints = typename V::Ints;

  SurvivorTrellis(const SurvivorSearch& search, const SurvivorMemory& memory)
      : search_(search), memory_(memory) {}

  template <int Count>
  static void run(SurvivorTrellis (&all)[Count]) {
    const int group = all[0].search_.group;
    for (SurvivorTrellis& one : all) one.start();
    for (int block = 0; block < group; block += kSurvivorBlock) {
      for (SurvivorTrellis& one : all) one.open(block);
      for (int i = 0; i < kSurvivorBlock; ++i)
        for (SurvivorTrellis& one : all) one.step(block, i);
      if (block + kSurvivorBlock < group)
        for (SurvivorTrellis& one : all) one.close(block);
    }
    for (SurvivorTrellis& one : all) one.trace();
  }

  void start() {
    std::memcpy(memory_.common, search_.targets, sizeof(float) * size_t(search_.group));
    for (int stem = 0; stem < kStems; ++stem)
      memory_.costs[stem] = stem == search_.stem ? 0.0f : kFar;
    now_ = memory_.windows, next_ = now_ + kSurvivorBlock * kStems;
  }

  void step(int block, int i) {
    reach(block + i, now_ + i * kStems);
    carry(block, i, now_, next_);
    std::swap(now_, next_);
  }

  float* errors(int t) const { return memory_.errors + size_t(t) * kStems; }
  const float* pull(int t) const { return search_.pull + size_t(t) * search_.group; }

  // Targets of a block, moved by all errors before it.
  void open(int block) {
    for (int s = 0; s < kStems; s += W) {
      Floats moved[kSurvivorBlock];
#pragma GCC unroll 8
      for (int i = 0; i < kSurvivorBlock; ++i) moved[i] = memory_.common[block + i] - Floats{};
      for (int t = shared_; t < block; ++t) {
        const Floats error = V::floats(errors(t) + s);
        const float* behind = pull(t) + block;
#pragma GCC unroll 8
        for (int i = 0; i < kSurvivorBlock; ++i)
          moved[i] = V::fused(error, behind[i] - Floats{}, moved[i]);
      }
#pragma GCC unroll 8
      for (int i = 0; i < kSurvivorBlock; ++i) V::floats(now_ + i * kStems + s) = moved[i];
    }
  }

  // Numbers by stem in the order in which `branch` reads them.
  static const float* arranged(const float* numbers, float* space) {
    if constexpr (kRuns == 1) return numbers;
    for (int branch = 0; branch < kBranches; ++branch)
      for (int run = 0; run < kRuns; ++run)
        space[branch * kRuns + run] = numbers[run * kBranches + branch];
    return space;
  }

  // What the predecessors of stems s, s + 1, ... by some branch have.
  static Floats branch_of(const float* arranged, int branch, int s) {
    if constexpr (kRuns >= W) {
      return V::floats(arranged + branch * kRuns + s % kRuns);
    } else {
      const float* p = arranged + (branch * kRuns) % kStems;
#if defined(ONNXCOMP_AVX2) || defined(ONNXCOMP_AVX512)
      double two;
      std::memcpy(&two, p, sizeof two);
      if constexpr (kRuns == 2 && W == 8) return (Floats)_mm256_set1_pd(two);
      if constexpr (kRuns == 4 && W == 8) return (Floats)_mm256_broadcast_ps((const __m128*)p);
#endif
#if defined(ONNXCOMP_AVX512)
      if constexpr (kRuns == 2 && W == 16) return (Floats)_mm512_set1_pd(two);
      if constexpr (kRuns == 4 && W == 16)
        return (Floats)_mm512_maskz_broadcast_f32x4(0xFFFF, _mm_load_ps(p));
      if constexpr (kRuns == 8 && W == 16)
        return (Floats)_mm512_maskz_broadcast_f32x8(0xFFFF, _mm256_load_ps(p));
#endif
      if constexpr (kRuns == 1) return p[0] - Floats{};
      alignas(Floats) float repeated[W];
      for (int i = 0; i < W; ++i) repeated[i] = p[i % kRuns];
      return V::floats(repeated);
    }
  }

  // One weight: the cheapest way to each stem, and the error that it makes.
  void reach(int t, const float* window) {
    const float* costs = arranged(memory_.costs, memory_.arranged);
    const float* wanted = arranged(window, memory_.arranged + kStems);
    const Floats price = search_.prices[t] - Floats{};
    alignas(64) float reached[kStems];
    for (int s = 0; s < kStems; s += W) {
      // Chains of minima that do not wait for one another; of equal totals the first branch counts.
      Floats least[kChains], value[kChains];
      Ints index[kChains];
#pragma GCC unroll 4
      for (int chain = 0; chain < kChains; ++chain) {
#pragma GCC unroll 64
        for (int i = 0; i < kChained; ++i) {
          const int branch = chain * kChained + i;
          const Floats here = V::floats(search_.values + branch * kStems + s);
          const Floats error = branch_of(wanted, branch, s) - here;
          const Floats total = V::fused(price, error * error, branch_of(costs, branch, s));
          if (i == 0) {
            least[chain] = total, value[chain] = here, index[chain] = Ints{} + branch;
          } else {
            const Ints less = total < least[chain];
            least[chain] = less ? total : least[chain];
            value[chain] = less ? here : value[chain];
            index[chain] = less ? Ints{} + branch : index[chain];
          }
        }
      }
#pragma GCC unroll 4
      for (int chain = 1; chain < kChains; ++chain) {
        const Ints less = least[chain] < least[0];
        least[0] = less ? least[chain] : least[0];
        value[0] = less ? value[chain] : value[0];
        index[0] = less ? index[chain] : index[0];
      }
      V::floats(reached + s) = least[0];
      V::floats(errors(t) + s) = search_.targets[t] - value[0];
      V::ints(memory_.history + size_t(t) * kStems + s) = index[0];
    }
    std::memcpy(memory_.costs, reached, sizeof reached);
  }

  int32_t* predecessors(int i) const { return memory_.predecessors + i * kStems; }

  // The targets of the rest of the block as the new survivors have them.
  void carry(int block, int i, const float* now, float* next) {
    const int32_t* history = memory_.history + size_t(block + i) * kStems;
    for (int s = 0; s < kStems; ++s)
      predecessors(i)[s] = (s * kBranches + history[s]) & (kStems - 1);
    const float *error = errors(block + i), *behind = pull(block + i) + block;
    for (int later = i + 1; later < kSurvivorBlock; ++later) {
      float* moved = next + later * kStems;
      gather<kStems>(now + later * kStems, predecessors(i), moved);
      for (int s = 0; s < kStems; s += W)
        V::floats(moved + s) =
            V::fused(V::floats(error + s), behind[later] - Floats{}, V::floats(moved + s));
    }
  }

  // Errors by survivor; those that all survivors share move the targets of all.
  void close(int block) {
    int32_t *from = memory_.origins, *before = from + kStems;
    std::memcpy(from, predecessors(kSurvivorBlock - 1), sizeof(int32_t) * kStems);
    for (int i = kSurvivorBlock - 2; i >= 0; --i) {
      reorder(block + i, from);
      gather<kStems>(predecessors(i), from, before);
      std::swap(from, before);
    }
    for (int t = shared_; t < block; ++t) reorder(t, from);
    const int first = shared_, end = block + kSurvivorBlock;
    while (shared_ < end && common(shared_)) ++shared_;
    constexpr int kStep = kWidest < kSurvivorBlock ? kWidest : kSurvivorBlock;
    using Step = Wide<kStep>;
    using Loose = typename Step::Loose;
    using Some = typename Step::Floats;
    for (int t = end; t < search_.group; t += kStep) {
      Some moved = (Some) * reinterpret_cast<const Loose*>(memory_.common + t);
      for (int k = first; k < shared_; ++k)
        moved = Step::fused(errors(k)[0] - Some{},
                            (Some) * reinterpret_cast<const Loose*>(pull(k) + t), moved);
      *reinterpret_cast<Loose*>(memory_.common + t) = (Loose)moved;
    }
  }

  void reorder(int t, const int32_t* from) {
    alignas(64) float moved[kStems];
    gather<kStems>(errors(t), from, moved);
    std::memcpy(errors(t), moved, sizeof moved);
  }

  bool common(int t) const {
    const float* error = errors(t);
    const Floats first = error[0] - Floats{};
    Ints differ = Ints{};
    for (int s = 0; s < kStems; s += W) differ |= V::floats(error + s) != first;
    int32_t any = 0;
    for (int i = 0; i < W; ++i) any |= differ[i];
    return any == 0;
  }

  void trace() const {
    int stem = search_.stem;
    for (int t = search_.group - 1; t >= 0; --t) {
      const int state = stem * kBranches + memory_.history[size_t(t) * kStems + stem];
      search_.path[t] = static_cast<uint16_t>(state);
      stem = state & (kStems - 1);
    }
  }

  const SurvivorSearch& search_;
  const SurvivorMemory& memory_;
  float *now_ = nullptr, *next_ = nullptr;  // targets of the survivors in a block
  int shared_ = 0;  // errors of the weights before this one are in `common`
};

SearchSurvivors find_survivor_search(int bits, int state_bits) {
#define ONNXCOMP_CASE(K, L) \
  if (bits == K && state_bits == L) return SurvivorTrellis<K, L>::run;
  ONNXCOMP_EACH_TRELLIS(ONNXCOMP_CASE)
#undef ONNXCOMP_CASE
  return nullptr;
}

}  // namespace
}  // namespace ONNXCOMP_ISA
