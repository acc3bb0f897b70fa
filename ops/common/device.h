// What marks a function that GPUs run, too.
#pragma once

#if defined(__CUDACC__)
#define ONNXCOMP_DEVICE __host__ __device__ __forceinline__
#else
#define ONNXCOMP_DEVICE inline
#endif
