// Vectors, and products of matrices with sixteen columns; included once per instruction set by
// feedback.cc and moments.cc, which define ONNXCOMP_ISA (a namespace) and one of ONNXCOMP_AVX512,
// ONNXCOMP_AVX2 or neither. No include guard on purpose.
//
// Sums have the order of their terms, and no multiplication is fused with an addition: results do
// not depend on the instruction set.

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
      for (int v = 0; v < kVectors; ++v) sum[r][v] += factor * now[v];
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
