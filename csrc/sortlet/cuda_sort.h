// Sorting on CUDA. Lists of up to 64 scores are sorted by a bitonic network in the registers of a
// warp, longer ones in tiles by a block and then by merging. The order is total (NaN last, equal
// scores by position), so that what comes out is a permutation whatever the scores are.
#pragma once

#include <cmath>
#include <cstdint>

#include "../core/hd.h"

namespace ct::sortlet {

constexpr int kWarp = 32;
constexpr int kThreads = 128;  // in a block
constexpr int kWarps = kThreads / kWarp;
constexpr int kShort = 64;   // scores that a warp sorts
constexpr int kTile = 1024;  // scores that a block sorts
constexpr unsigned kAll = 0xffffffffu;

__device__ inline double warp_sum(double x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAll, x, offset);
  return x;
}

// The sum over lanes up to this one.
__device__ inline double warp_scan(double x) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const double other = __shfl_up_sync(kAll, x, offset);
    x += lane >= offset ? other : 0;
  }
  return x;
}

// ---- sorting

// NaN last, equal scores by position.
template <typename T>
__device__ inline bool comes_before(T a, int32_t i, T b, int32_t j) {
  const bool a_nan = a != a, b_nan = b != b;
  if (a_nan || b_nan) return a_nan == b_nan ? i < j : b_nan;
  return a < b || (a == b && i < j);
}

// One step of a bitonic network, between a lane and its partner; both decide alike.
template <typename T>
__device__ inline bool exchange_lanes(T& key, int32_t& index, int distance, bool ascending) {
  const T other = __shfl_xor_sync(kAll, key, distance);
  const int32_t of_other = __shfl_xor_sync(kAll, index, distance);
  const bool low = (threadIdx.x & distance) == 0;
  const bool after = comes_before(other, of_other, key, index);
  if (after != (low == ascending)) return false;
  key = other, index = of_other;
  return low;  // one of the two counts the exchange
}

// Sorts 64 scores, two in each lane: number `lane` and number `lane + 32`. True if odd.
template <typename T>
__device__ inline bool sort_in_warp(T (&key)[2], int32_t (&index)[2]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  bool odd = false;
  for (int size = 2; size <= kShort; size *= 2) {
    for (int distance = size / 2; distance > 0; distance /= 2) {
      if (distance == kWarp) {  // the last merge, ascending
        if (comes_before(key[1], index[1], key[0], index[0])) {
          const T k = key[0];
          const int32_t i = index[0];
          key[0] = key[1], index[0] = index[1], key[1] = k, index[1] = i;
          odd = !odd;
        }
        continue;
      }
      for (int h = 0; h < 2; ++h)
        odd ^= exchange_lanes(key[h], index[h], distance, ((lane + h * kWarp) & size) == 0);
    }
  }
  double swaps = odd ? 1 : 0;
  swaps = warp_sum(swaps);
  return static_cast<int>(swaps) % 2 != 0;
}

template <typename T>
struct SortTask {
  const T* scores;
  T *key, *next_key;
  int32_t *index, *next_index;
  unsigned long long* swaps;  // of each list; begins as zeros
  int64_t lists, n;
};

__device__ inline void add_swaps(unsigned long long* to, double swaps) {
  swaps = warp_sum(swaps);
  if (threadIdx.x % kWarp == 0 && swaps > 0)
    atomicAdd(to, static_cast<unsigned long long>(swaps));  // whole numbers: in any order
}

// Sorts tiles: tile blockIdx.x of list blockIdx.y.
template <typename T>
__global__ void tile_kernel(SortTask<T> task) {
  __shared__ T key[kTile];
  __shared__ int32_t index[kTile];
  for (int64_t list = blockIdx.y; list < task.lists; list += gridDim.y) {
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kTile, begin = list * task.n;
    for (int e = static_cast<int>(threadIdx.x); e < kTile; e += kThreads) {
      const int64_t i = first + e;
      key[e] = i < task.n ? task.scores[begin + i] + T(0) : static_cast<T>(NAN);
      index[e] = static_cast<int32_t>(i);
    }
    double swaps = 0;
    for (int size = 2; size <= kTile; size *= 2)
      for (int distance = size / 2; distance > 0; distance /= 2) {
        __syncthreads();
        for (int pair = static_cast<int>(threadIdx.x); pair < kTile / 2; pair += kThreads) {
          const int low = 2 * pair - (pair & (distance - 1)), high = low + distance;
          const bool ascending = (low & size) == 0;
          if (comes_before(key[high], index[high], key[low], index[low]) != ascending) continue;
          const T k = key[low];
          const int32_t i = index[low];
          key[low] = key[high], index[low] = index[high], key[high] = k, index[high] = i;
          swaps += 1;
        }
      }
    __syncthreads();
    for (int e = static_cast<int>(threadIdx.x); e < kTile; e += kThreads) {
      if (first + e >= task.n) continue;
      task.key[begin + first + e] = key[e];
      task.index[begin + first + e] = index[e];
    }
    add_swaps(task.swaps + list, swaps);
    __syncthreads();  // before the next list
  }
}

// Merges neighboring runs of `width`: each score finds its place by a search in the other run.
template <typename T>
__global__ void merge_kernel(SortTask<T> task, int64_t width) {
  for (int64_t list = blockIdx.y; list < task.lists; list += gridDim.y) {
    const T* key = task.key + list * task.n;
    const int32_t* index = task.index + list * task.n;
    double swaps = 0;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < task.n;
         i += static_cast<int64_t>(gridDim.x) * kThreads) {
      const int64_t first = i / (2 * width) * 2 * width;  // of the pair of runs
      const int64_t middle = first + width < task.n ? first + width : task.n;
      const int64_t end = first + 2 * width < task.n ? first + 2 * width : task.n;
      const bool in_first = i < middle;
      int64_t low = in_first ? middle : first, high = in_first ? end : middle;
      const int64_t begin = low, place = in_first ? i : i - width;
      while (low < high) {  // how many of the other run come before
        const int64_t at = (low + high) / 2;
        if (comes_before(key[at], index[at], key[i], index[i])) {
          low = at + 1;
        } else {
          high = at;
        }
      }
      const int64_t to = list * task.n + place + (low - begin);
      task.next_key[to] = key[i];
      task.next_index[to] = index[i];
      if (!in_first) swaps += static_cast<double>(middle - low);  // it passes these
    }
    add_swaps(task.swaps + list, swaps);
  }
}

template <typename T>
__global__ void clear_kernel(T* swaps, int64_t lists) {
  for (int64_t list = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; list < lists;
       list += static_cast<int64_t>(gridDim.x) * kThreads)
    swaps[list] = 0;
}

}  // namespace ct::sortlet
