/* The CUDA kernels without ONNX Runtime: plain C functions of libonnxcomp_ops.so.
 *
 * All functions return 0, or 1 with a text in `onnxcomp_cuda_error()` of the calling thread.
 * Tensors are in device memory and laid out as ops/hyper/spec.md and ops/hash/spec.md say; codes
 * must be aligned to 4 bytes, `scratch` to 256. Work is put on `stream` (a cudaStream_t; null for
 * the default one); nothing waits and nothing is allocated, so that a stream may be under capture
 * for a graph. Codes, scales, tables, memories and maps are constants of a model: kernels may read
 * them before the kernel before on the stream is done, if that one lets others begin early
 * (programmatic dependent launch); a kernel that writes them must not. Shapes are checked, contents
 * are not: any codes decode to something, and no content of codes or tables leads outside the
 * tensors. The same weight and input always give the same bits on the same kind of device.
 *
 * Element types are those of TensorProto: 1 float32, 10 float16, 16 bfloat16.
 */
#ifndef ONNXCOMP_CUDA_H_
#define ONNXCOMP_CUDA_H_

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define ONNXCOMP_CUDA_API __attribute__((visibility("default")))
#else
#define ONNXCOMP_CUDA_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* The 256 levels of a table of more than 256 states, where it has no more; see
 * onnxcomp_cuda_hyper_levels. */
typedef struct OnnxcompHyperLevels {
  uint16_t multiplier, offset;
  int8_t values[256];
} OnnxcompHyperLevels;

/* A weight (rows, length) of the codec hyper. `levels` lies in host memory and may be null. */
typedef struct OnnxcompHyperWeight {
  int64_t rows, length;
  int32_t group;  /* 32, 64, 128 or 256 */
  int32_t bits;   /* 1 .. 6 */
  int32_t states; /* log2 of the table's length: 6, 7, 8, 10 or 12, at least bits + 2 */
  const void* codes;
  const void* scales;
  const void* table;
  const OnnxcompHyperLevels* levels;
} OnnxcompHyperWeight;

/* A weight (rows, length) of the codec hash. `codes` is null where chunks do not choose. */
typedef struct OnnxcompHashWeight {
  int64_t rows, length;
  int64_t slots;
  int32_t chunk;
  int32_t memory_type; /* 1 float32, 10 float16, 3 int8 */
  const void* memory;
  const void* codes;
  float scale;
  int64_t map[6]; /* base, run, stride, rotate, sign, signed */
} OnnxcompHashWeight;

/* What went wrong in this thread's last call that returned 1. */
ONNXCOMP_CUDA_API const char* onnxcomp_cuda_error(void);

/* Compute capabilities the library holds machine code for, as CMake names them: "80", or
 * "75-real 80-real 120". */
ONNXCOMP_CUDA_API const char* onnxcomp_cuda_architectures(void);

/* Which kernels the current device gets, in words: "9.0: few rows and decoding by pairs, more rows by
 * wgmma". The text belongs to the calling thread, until its next call. */
ONNXCOMP_CUDA_API int onnxcomp_cuda_kernels(const char** text);

/* Copies from device (or host) memory to host memory, and waits for it: for small tables, while a
 * model loads. */
ONNXCOMP_CUDA_API int onnxcomp_cuda_copy_to_host(const void* from, void* to, size_t bytes);

/* Looks for the levels of a table of 2^states entries in host memory, once while a model loads: with
 * them its weights are looked up faster. Sets `found` to 1 or 0. */
ONNXCOMP_CUDA_API int onnxcomp_cuda_hyper_levels(const void* table, int32_t states,
                                                 OnnxcompHyperLevels* levels, int32_t* found);

/* Bytes of `scratch` that a product with a batch of so many rows needs on the current device. */
ONNXCOMP_CUDA_API int onnxcomp_cuda_hyper_scratch(const OnnxcompHyperWeight* weight, int64_t batch,
                                                  int32_t type, size_t* bytes);
ONNXCOMP_CUDA_API int onnxcomp_cuda_hash_scratch(const OnnxcompHashWeight* weight, int64_t batch,
                                                 int32_t type, size_t* bytes);

/* y (batch, rows) = x (batch, length) W^T, summed in float32; x and y have the same type. */
ONNXCOMP_CUDA_API int onnxcomp_cuda_hyper_matmul(const OnnxcompHyperWeight* weight, const void* x,
                                                 void* y, int64_t batch, int32_t type,
                                                 void* scratch, size_t bytes, void* stream);
ONNXCOMP_CUDA_API int onnxcomp_cuda_hash_matmul(const OnnxcompHashWeight* weight, const void* x,
                                                void* y, int64_t batch, int32_t type,
                                                void* scratch, size_t bytes, void* stream);

/* y (count, length) float32: rows of W by indices of `index_bytes` 4 or 8. A row whose index is
 * outside [-rows, rows) is filled with NaN. */
ONNXCOMP_CUDA_API int onnxcomp_cuda_hyper_gather(const OnnxcompHyperWeight* weight,
                                                 const void* indices, int32_t index_bytes,
                                                 int64_t count, float* y, void* stream);
ONNXCOMP_CUDA_API int onnxcomp_cuda_hash_gather(const OnnxcompHashWeight* weight,
                                                const void* indices, int32_t index_bytes,
                                                int64_t count, float* y, void* stream);

/* w (rows, length) of any element type. */
ONNXCOMP_CUDA_API int onnxcomp_cuda_hyper_decode(const OnnxcompHyperWeight* weight, void* w,
                                                 int32_t type, void* stream);
ONNXCOMP_CUDA_API int onnxcomp_cuda_hash_decode(const OnnxcompHashWeight* weight, void* w,
                                                int32_t type, void* stream);

#ifdef __cplusplus
}
#endif

#endif
