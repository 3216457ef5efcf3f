// CT_HD marks a function whose one body serves the CPU (g++) and the GPU (nvcc).
#pragma once

#if defined(__CUDACC__)
#define CT_HD __host__ __device__ __forceinline__
#else
#define CT_HD inline
#endif
