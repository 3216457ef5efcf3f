// The threads of a block together.
#pragma once

#include "base.h"

namespace ct::native {

constexpr int kThreads = 64;  // of a block: as ctorch/codegen/cuda.py launches

// All the threads' values in one, always in the same order; the first thread has it.
template <class Combine>
__device__ double of_block(double value, const Combine& combine) {
  __shared__ double values[kThreads];
  __syncthreads();  // what an earlier call left has been read
  const int i = static_cast<int>(threadIdx.x);
  values[i] = value;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (i < half) values[i] = combine(values[i], values[i + half]);
  }
  return values[0];
}

// The same of count values in memory; nothing is 0.
template <class Value, class Combine>
__device__ double of_memory(const Value* values, int64_t count, const Combine& combine) {
  double total = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) total = combine(total, values[i]);
  return of_block(total, combine);
}

}  // namespace ct::native
