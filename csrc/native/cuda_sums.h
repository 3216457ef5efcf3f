// Gradients of what all samples share: sums over samples. A thread with samples of its own has sums
// of its own (Strided); with CT_TOGETHER those of a block are added up by all its threads together
// (BlockSums), always in the same order.
#pragma once

#include "cuda_linear.h"

// The memory that a launch asks for, which the threads of a block share.
#if !defined(CT_LAUNCHED_MEMORY)
#define CT_LAUNCHED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace ct::native {

// Numbers that lie apart: those of neighboring threads are neighbors in memory.
template <class Real>
struct Strided {
  Real* numbers;
  int64_t stride;

  CT_BOTH Real& operator[](long j) const { return numbers[j * stride]; }
  CT_BOTH Strided operator+(long j) const { return {numbers + j * stride, stride}; }
};

// w[o, i] += u[o] x[i], the gradient of the weights for cotangents u of their products.
template <long N, long K, long kRow, long kColumn, class V, class T>
CT_LANES void outer(const V* u, const V* x, Strided<T> w) {
  for (long o = 0; o < N; ++o)
    for (long i = 0; i < K; ++i) w[o * kRow + i * kColumn] += u[o] * x[i];
}

#if defined(CT_TOGETHER)

namespace sums_detail {

constexpr int kPending = 16, kParts = kThreads / kPending, kPartSamples = kThreads / kParts;

// Numbers to which every thread of the block has a share, until there are enough of them.
template <class T>
struct Pending {
  T shares[kPending][kThreads + 1];
  T parts[kParts][kPending];
  int64_t to[kPending];  // their places
};

template <class T>
__device__ Pending<T>& pending() {
  __shared__ Pending<T> block;
  return block;
}

}  // namespace sums_detail

// A thread's hand in the sums of its block. All threads call the same functions in the same order.
template <class T>
class Adder {
 public:
  bool active = false;  // whether the thread's sample has a share; else it adds zeros

  __device__ explicit Adder(T* sums_) : sums(sums_) {}

  __device__ void add(T* to, T share) {
    auto& block = sums_detail::pending<T>();
    block.shares[count][threadIdx.x] = active ? share : T{};
    if (threadIdx.x == 0) block.to[count] = to - sums;
    if (++count == sums_detail::kPending) flush();
  }

  // Adds up what is pending: parts of every number first, then these.
  __device__ void flush() {
    using namespace sums_detail;
    auto& block = pending<T>();
    const int thread = static_cast<int>(threadIdx.x), number = thread % kPending;
    const int part = thread / kPending;
    __syncthreads();
    T sum{};
    for (int i = 0; i < kPartSamples && number < count; ++i)
      sum += block.shares[number][part * kPartSamples + i];
    block.parts[part][number] = sum;
    __syncthreads();
    if (thread < count) write(block, thread);
    __syncthreads();
    count = 0;
  }

 private:
  // Of equal places one thread adds all.
  __device__ void write(const sums_detail::Pending<T>& block, int number) const {
    const int64_t to = block.to[number];
    for (int i = 0; i < number; ++i)
      if (block.to[i] == to) return;
    T total = sums[to];
    for (int i = number; i < count; ++i)
      if (block.to[i] == to)
        for (int part = 0; part < sums_detail::kParts; ++part) total += block.parts[part][i];
    sums[to] = total;
  }

  T* const sums;
  int count = 0;
};

// A number of the sums, to which each thread adds its share.
template <class T>
struct BlockSum {
  T* to;
  Adder<T>* adder;

  __device__ void operator+=(T share) const { adder->add(to, share); }
};

// Sums of a block, in the place of T*.
template <class T>
struct BlockSums {
  T* numbers;
  Adder<T>* adder;

  __device__ BlockSum<T> operator[](long j) const { return {numbers + j, adder}; }
  __device__ BlockSums operator+(long j) const { return {numbers + j, adder}; }
};

namespace sums_detail {

// A thread adds up 4 x 4 numbers of a tile over the samples, kRows x kColumns of which are there.
template <class T>
struct OuterPatch {
  static constexpr int kPack = 16 / sizeof(T);  // samples that are read at once
  struct alignas(16) Pack {
    T of[kPack];
  };

  T sums[4][4] = {};
  const int row = static_cast<int>(threadIdx.x) / 8, column = static_cast<int>(threadIdx.x) % 8;

  template <int kRows, int kColumns>
  __device__ void add(const linear_detail::OuterTile<T>& tile) {
    for (int s = 0; s < kThreads; s += kPack) {
      Pack u[kRows], x[kColumns];
      CT_UNROLL(4)
      for (int r = 0; r < kRows; ++r) u[r] = read(tile.u[row + 8 * r] + s);
      CT_UNROLL(4)
      for (int c = 0; c < kColumns; ++c) x[c] = read(tile.x[column + 8 * c] + s);
      CT_UNROLL(4)
      for (int r = 0; r < kRows; ++r) {
        CT_UNROLL(4)
        for (int c = 0; c < kColumns; ++c) {
          CT_UNROLL(4)
          for (int p = 0; p < kPack; ++p) sums[r][c] += u[r].of[p] * x[c].of[p];
        }
      }
    }
  }

  __device__ static Pack read(const T* from) { return *reinterpret_cast<const Pack*>(from); }
};

// The numbers first, ... of this thread's sample; zeros beyond, and of one that is not active.
template <long kCount, int kRows, class T>
__device__ void load_rows(T (*rows)[kThreads + linear_detail::OuterTile<T>::padding], const T* from,
                          long first, bool active) {
  for (int i = 0; i < 8 * kRows; ++i)
    rows[i][threadIdx.x] = active && first + i < kCount ? from[first + i] : T{};
}

// How many times 8 numbers a tile has at most.
template <long kCount>
constexpr int kEights = kCount < 25 ? static_cast<int>((kCount + 7) / 8) : 4;

}  // namespace sums_detail

// The same, summed over the samples of the block.
template <long N, long K, long kRow, long kColumn, class T>
__device__ void outer(const T* u, const T* x, BlockSums<T> w) {
  using namespace sums_detail;
  if constexpr (kColumn != 1 && kRow == 1) {
    outer<K, N, kColumn, kRow>(x, u, w);
  } else {
    constexpr int kSide = linear_detail::OuterTile<T>::side;
    constexpr int kRows = kEights<N>, kColumns = kEights<K>;
    auto& tile = linear_detail::block_tile<T>().outer;
    for (long out = 0; out < N; out += kSide) {
      load_rows<N, kRows>(tile.u, u, out, w.adder->active);
      for (long in = 0; in < K; in += kSide) {
        load_rows<K, kColumns>(tile.x, x, in, w.adder->active);
        __syncthreads();
        OuterPatch<T> patch;
        patch.template add<kRows, kColumns>(tile);
        CT_UNROLL(4)
        for (int r = 0; r < kRows; ++r) {
          CT_UNROLL(4)
          for (int c = 0; c < kColumns; ++c) {
            const long o = out + patch.row + 8 * r, i = in + patch.column + 8 * c;
            if (o < N && i < K) w.numbers[o * kRow + i * kColumn] += patch.sums[r][c];
          }
        }
        __syncthreads();
      }
    }
  }
}

#endif

}  // namespace ct::native
