// Second moments of vectors: products in float32, their sums in float64.
//
// One job is a block of the result, whose sums have the order of the vectors: they do not depend on
// the number of threads.

#include <exception>

#include "instruction_sets.h"
#include "jobs.h"

namespace {

using namespace hyper;

// Columns of a block of the result, and vectors whose products are summed in float32.
constexpr int kBlock = 192;
constexpr int kDepth = 256;

struct MomentsTask {
  const float* a;  // (count, rows)
  const float* b;  // (count, columns)
  int64_t count;
  int64_t rows;
  int64_t columns;
  int64_t first, last;  // rows that are wanted; the first is a multiple of kBlock
  bool lower;           // only blocks on and below the diagonal
  double* sum;  // (rows, columns)

  int64_t across() const { return (columns + kBlock - 1) / kBlock; }
  int64_t jobs() const { return (last - first + kBlock - 1) / kBlock * across(); }
};

}  // namespace

#define ONNXCOMP_ISA moments_baseline
#include "product.h"
#include "moments.h"
#undef ONNXCOMP_ISA

#ifdef ONNXCOMP_X86
ONNXCOMP_TARGET(ONNXCOMP_AVX2_SETS)
#define ONNXCOMP_ISA moments_avx2
#define ONNXCOMP_AVX2
#include "product.h"
#include "moments.h"
#undef ONNXCOMP_AVX2
#undef ONNXCOMP_ISA
ONNXCOMP_END_TARGET

ONNXCOMP_TARGET(ONNXCOMP_AVX512_SETS)
#define ONNXCOMP_ISA moments_avx512
#define ONNXCOMP_AVX512
#include "product.h"
#include "moments.h"
#undef ONNXCOMP_AVX512
#undef ONNXCOMP_ISA
ONNXCOMP_END_TARGET
#endif

// sum[i][j] += a[t][i] b[t][j] over all t < count, for first <= i < last, where first is a multiple of
// kBlock; with `lower` only in blocks of kBlock that are on the diagonal or below it. `isa` is one of
// `chosen_isa`.
ONNXCOMP_EXPORT int32_t onnxcomp_add_moments(const float* a, const float* b, int64_t count,
                                             int64_t rows, int64_t columns, int64_t first,
                                             int64_t last, int32_t lower, int32_t threads,
                                             int32_t isa, double* sum) {
  isa = chosen_isa(isa);
  if (count < 0 || rows <= 0 || columns <= 0 || isa < 0) return kInvalid;
  if (first < 0 || first % kBlock || first >= last || last > rows) return kInvalid;
  const MomentsTask task = {a, b, count, rows, columns, first, last, lower != 0, sum};
  try {
#ifdef ONNXCOMP_X86
    if (isa == 2)
      return for_each_job<moments_avx512::Moments>(task.jobs(), threads, task, 1);
    if (isa == 1)
      return for_each_job<moments_avx2::Moments>(task.jobs(), threads, task, 1);
#endif
    return for_each_job<moments_baseline::Moments>(task.jobs(), threads, task, 1);
  } catch (const std::exception&) {
    return kNoMemory;
  }
}
