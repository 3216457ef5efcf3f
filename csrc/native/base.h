// What the templates take from the standard library, and where their functions run. With CT_CUDA
// the source is a kernel, one sample a thread: lanes are single numbers, and there are no threads.
// NVRTC brings no standard library; what the kernels need of it stands here.
#pragma once

#if !defined(__CUDACC_RTC__)
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#else
#include "nvrtc.h"
#endif

// CT_BOTH: for the CPU and for the GPU.
#if defined(__CUDACC__)
#define CT_BOTH __host__ __device__
#define CT_LANES __host__ __device__ __forceinline__
#define CT_PRAGMA(text) _Pragma(#text)
#define CT_UNROLL(count) CT_PRAGMA(unroll count)
#else
#define CT_BOTH
#define CT_LANES __attribute__((always_inline)) inline
#define CT_PRAGMA(text) _Pragma(#text)
#define CT_UNROLL(count) CT_PRAGMA(GCC unroll count)
#endif
