// Products of a large matrix with the samples of a block: all its threads share the work. With
// CT_TOGETHER the samples of a block are lanes: their threads make every step together, each with
// its own times, until the last sample is done.
#pragma once

#include "linear.h"

namespace ct::native {

constexpr int kThreads = 64;  // of a block: as ctorch/codegen/cuda.py launches

#if defined(CT_TOGETHER)

constexpr bool kTogether = true;

namespace linear_detail {

constexpr int kTileOutputs = 32, kTileInputs = 16;  // at a time
constexpr long kLeastProduct = 1024;                // smaller matrices are not worth the barriers

template <class T>
struct alignas(16) Four {
  T of[4];
};

// The inputs and weights of a tile, and its outputs, where all threads see them.
template <class T>
struct ProductTile {
  Four<T> x[kTileInputs][kThreads / 4];
  Four<T> w[kTileInputs][kTileOutputs / 4];
  T y[kTileOutputs][kThreads];
};

// Factors of a tile of outer products, all samples of a number side by side. The padding takes
// numbers that a warp reads at once to different banks.
template <class T>
struct alignas(16) OuterTile {
  static constexpr int side = 32, padding = 16 / sizeof(T);
  T u[side][kThreads + padding];
  T x[side][kThreads + padding];
};

template <class T>
union BlockTile {
  ProductTile<T> product;
  OuterTile<T> outer;
};

// The block's, of which there is no room for more.
template <class T>
__device__ BlockTile<T>& block_tile() {
  __shared__ BlockTile<T> tile;
  return tile;
}

// A thread adds up 8 samples x 4 outputs.
template <class T>
struct Patch {
  T sums[8][4] = {};
  const int samples = static_cast<int>(threadIdx.x) / 8,
            outputs = static_cast<int>(threadIdx.x) % 8;

  __device__ void add(const ProductTile<T>& tile) {
    for (int i = 0; i < kTileInputs; ++i) {
      const Four<T> w = tile.w[i][outputs];
      const Four<T> x[2] = {tile.x[i][2 * samples], tile.x[i][2 * samples + 1]};
      CT_UNROLL(8)
      for (int s = 0; s < 8; ++s) {
        CT_UNROLL(4)
        for (int o = 0; o < 4; ++o) sums[s][o] += x[s / 4].of[s % 4] * w.of[o];
      }
    }
  }

  __device__ void write(ProductTile<T>& tile) const {
    CT_UNROLL(4)
    for (int o = 0; o < 4; ++o) {
      CT_UNROLL(8)
      for (int s = 0; s < 8; ++s) tile.y[4 * outputs + o][8 * samples + s] = sums[s][o];
    }
  }
};

// Inputs first, ... of this thread's sample, and weights of outputs `out`, ...; zeros beyond.
template <long N, long K, long kRow, long kColumn, class T>
__device__ void load_tile(ProductTile<T>& tile, const T* w, const T* x, long out, long first) {
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = 0; i < kTileInputs; ++i)
    tile.x[i][thread / 4].of[thread % 4] = first + i < K ? x[first + i] : T{};
  for (int e = thread; e < kTileInputs * kTileOutputs; e += kThreads) {
    // neighboring threads read neighboring numbers
    const int i = kColumn == 1 ? e % kTileInputs : e / kTileOutputs;
    const int o = kColumn == 1 ? e / kTileInputs : e % kTileOutputs;
    const bool there = out + o < N && first + i < K;
    tile.w[i][o / 4].of[o % 4] = there ? w[(out + o) * kRow + (first + i) * kColumn] : T{};
  }
}

}  // namespace linear_detail

// As in linear.h, where V is the number of a thread's sample.
template <long N, long K, long kRow, long kColumn, Sum kSum = Sum::kWrite, class T>
__device__ void linear(const T* w, const T* b, const T* x, T* y, const T* const* turned) {
  using namespace linear_detail;
  if constexpr (N * K < kLeastProduct) {
    linear<N, K, kRow, kColumn, kSum, T, T>(w, b, x, y, turned);
  } else {
    ProductTile<T>& tile = block_tile<T>().product;
    for (long out = 0; out < N; out += kTileOutputs) {
      Patch<T> patch;
      for (long first = 0; first < K; first += kTileInputs) {
        load_tile<N, K, kRow, kColumn>(tile, w, x, out, first);
        __syncthreads();
        patch.add(tile);
        __syncthreads();
      }
      patch.write(tile);
      __syncthreads();
      for (long o = out; o < N && o < out + kTileOutputs; ++o) {
        const T sum = tile.y[o - out][threadIdx.x] + (b == nullptr ? T{} : b[o]);
        y[o] = kSum == Sum::kAdd ? y[o] + sum : sum;
      }
      __syncthreads();
    }
  }
}

#else

constexpr bool kTogether = false;

#endif

}  // namespace ct::native
