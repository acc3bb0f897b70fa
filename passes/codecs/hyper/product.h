// Vectors, and products of matrices with sixteen columns; included once per instruction set by
// feedback.cc and moments.cc, which define ONNXCOMP_ISA (a namespace) and one of ONNXCOMP_AVX512,
// ONNXCOMP_AVX2 or neither. No include guard on purpose.
//
// Sums have the order of their terms. Products are added to them with one rounding, also where the
// processor cannot: results do not depend on the instruction set.

namespace ONNXCOMP_ISA {
namespace {

// Lanes of the widest vectors.
#if defined(ONNXCOMP_AVX512)
constexpr int kWidest = 16;
#elif defined(ONNXCOMP_AVX2)
constexpr int kWidest = 8;
#else
constexpr int kWidest = 4;
#endif

template <int W>
struct Wide {
  typedef float Floats __attribute__((vector_size(W * 4), may_alias));
  typedef int32_t Ints __attribute__((vector_size(W * 4), may_alias));
  typedef float Loose __attribute__((vector_size(W * 4), may_alias, aligned(4)));
  static constexpr int kBits = W == 16 ? 4 : W == 8 ? 3 : 2;

  static Floats& floats(float* p) { return *reinterpret_cast<Floats*>(p); }
  static const Floats& floats(const float* p) { return *reinterpret_cast<const Floats*>(p); }
  static Ints& ints(int32_t* p) { return *reinterpret_cast<Ints*>(p); }
  static const Ints& ints(const int32_t* p) { return *reinterpret_cast<const Ints*>(p); }

#if defined(ONNXCOMP_X86) && !defined(ONNXCOMP_AVX512) && !defined(ONNXCOMP_AVX2)
  // The sums of the first two, where they are not rounded to float yet.
  static __m128d twice_rounded(__m128 a, __m128 b, __m128 c) {
    return _mm_add_pd(_mm_mul_pd(_mm_cvtps_pd(a), _mm_cvtps_pd(b)), _mm_cvtps_pd(c));
  }

  // Whether rounding one of them once more may not give what one rounding does: it may where it is
  // in the middle between two floats, or smaller than all normal ones.
  static int in_doubt(__m128d sum) {
    const __m128i low = _mm_set1_epi64x(0x1FFFFFFF), middle = _mm_set1_epi64x(0x10000000);
    const __m128i words = _mm_cmpeq_epi32(_mm_and_si128((__m128i)sum, low), middle);
    const __m128i between = _mm_and_si128(words, _mm_srli_epi64(words, 32));
    const __m128d size = _mm_andnot_pd(_mm_set1_pd(-0.0), sum);
    const __m128d tiny = _mm_and_pd(_mm_cmplt_pd(size, _mm_set1_pd(0x1p-126)),
                                    _mm_cmpneq_pd(size, _mm_setzero_pd()));
    return _mm_movemask_epi8(between) | _mm_movemask_pd(tiny);
  }
#endif

  // a b + c with one rounding.
  static Floats fused(Floats a, Floats b, Floats c) {
#if defined(ONNXCOMP_AVX512)
    if constexpr (W == 16) return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#endif
#if defined(ONNXCOMP_AVX512) || defined(ONNXCOMP_AVX2)
    if constexpr (W == 8) return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
    if constexpr (W == 4) return (Floats)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)c);
#elif defined(ONNXCOMP_ARM64)
    if constexpr (W == 4)
      return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#elif defined(ONNXCOMP_X86)
    if constexpr (W == 4) {
      const __m128d low = twice_rounded((__m128)a, (__m128)b, (__m128)c);
      const auto high_half = [](Floats x) { return _mm_movehl_ps((__m128)x, (__m128)x); };
      const __m128d high = twice_rounded(high_half(a), high_half(b), high_half(c));
      if (!(in_doubt(low) | in_doubt(high)))
        return (Floats)_mm_movelh_ps(_mm_cvtpd_ps(low), _mm_cvtpd_ps(high));
    }
#endif
    alignas(Floats) float one[W], other[W], sum[W];
    floats(one) = a, floats(other) = b, floats(sum) = c;
    for (int i = 0; i < W; ++i) sum[i] = hyper::fused(one[i], other[i], sum[i]);
    return floats(sum);
  }

  // result[i] = x[index[i] % W].
  static Floats permute(Floats x, Ints index) {
#if defined(ONNXCOMP_AVX512)
    // The zero-masked form spares GCC 12 a false warning.
    if constexpr (W == 16)
      return (Floats)_mm512_maskz_permutexvar_ps(0xFFFF, (__m512i)index, (__m512)x);
#endif
#if defined(ONNXCOMP_AVX512) || defined(ONNXCOMP_AVX2)
    if constexpr (W == 8) return (Floats)_mm256_permutevar8x32_ps((__m256)x, (__m256i)index);
    if constexpr (W == 4) return (Floats)_mm_permutevar_ps((__m128)x, (__m128i)index);
#endif
    alignas(Floats) float from[W], to[W];
    floats(from) = x;
    for (int i = 0; i < W; ++i) to[i] = from[reinterpret_cast<int32_t*>(&index)[i] & (W - 1)];
    return floats(to);
  }
};

using Floats = Wide<kWidest>::Floats;
// Vectors of one value of sixteen rows, and sums that are kept in registers.
constexpr int kParts = kLanes / kWidest;
constexpr int kTile = kWidest / 2;

// out[r] = sum_k matrix[r][k] x[k], in the order of k; for several x at a time, `x_stride` apart,
// whose results are `out_stride` apart.
template <int Rows, int Panels = 1>
void multiply_rows(const float* matrix, int64_t stride, int depth, const float* x, float* out,
                   int64_t x_stride = 0, int64_t out_stride = 0) {
  constexpr int kVectors = Panels * kParts;
  Floats sum[Rows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Floats{};
  for (int k = 0; k < depth; ++k) {
    Floats now[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      now[v] = Wide<kWidest>::floats(x + v / kParts * x_stride + k * kLanes + v % kParts * kWidest);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const Floats factor = matrix[r * stride + k] - Floats{};
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] = Wide<kWidest>::fused(factor, now[v], sum[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      Wide<kWidest>::floats(out + v / kParts * out_stride + r * kLanes + v % kParts * kWidest) =
          sum[r][v];
}

// The product of a matrix whose rows, a multiple of sixteen, are `stride` apart.
inline void multiply(const float* matrix, int64_t stride, int rows, int depth, const float* x,
                     float* out) {
  for (int r = 0; r < rows; r += kTile)
    multiply_rows<kTile>(matrix + r * stride, stride, depth, x, out + r * kLanes);
}

}  // namespace
}  // namespace ONNXCOMP_ISA
