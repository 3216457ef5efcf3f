// Whole states worked through block by block, and the norms that are put together from blocks.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "args.h"
#include "cpu_blocks.h"

namespace ct::rk {
namespace {

// Below that a thread is not worth its start. Beyond, two take half the time of one even where the
// slopes would fit one's cache, for the vector field left a half of them in the cache of each.
constexpr int64_t kBlocksAThread = 32;

// ---- loops over blocks
// ----------------------------------------------------------------------------------------------

// body(first, last) over ranges of blocks, by several threads where there are many.
template <typename Body>
void for_blocks(int64_t blocks, int64_t blocks_a_thread, const Body& body) {
  if (blocks <= blocks_a_thread) {
    if (blocks > 0) body(int64_t(0), blocks);
    return;
  }
  torch::stable::parallel_for(0, blocks, blocks_a_thread, body);
}

inline int block_size(int64_t begin, int64_t end) {
  return static_cast<int>(std::min<int64_t>(kBlock, end - begin));
}

inline int64_t blocks_of(int64_t n) { return (n + kBlock - 1) / kBlock; }

// A slope of any strides on its way into its row of k.
template <typename T>
struct Store {
  T* to = nullptr;  // null: nothing to store
  const T* from = nullptr;
  bool contiguous = true;
  std::vector<int64_t> sizes, strides;

  void operator()(int64_t begin, int n) const {
    if (to == nullptr || to == from) return;
    if (contiguous) {
      std::memcpy(to + begin, from + begin, n * sizeof(T));
      return;
    }
    std::vector<int64_t> index(sizes.size());
    int64_t rest = begin, offset = 0;
    for (int64_t d = static_cast<int64_t>(sizes.size()) - 1; d >= 0; --d) {
      index[d] = rest % sizes[d];
      rest /= sizes[d];
      offset += index[d] * strides[d];
    }
    for (int i = 0; i < n; ++i) {
      to[begin + i] = from[offset];
      for (int64_t d = static_cast<int64_t>(sizes.size()) - 1; d >= 0; --d) {
        offset += strides[d];
        if (++index[d] < sizes[d]) break;
        offset -= sizes[d] * strides[d];
        index[d] = 0;
      }
    }
  }
};

// out = y + h * sum_j coefficient[j] row[j], with the slope stored on the way.
template <typename T, typename A>
void combine_all(const Combination<T, A>& task, const Store<T>& store, int64_t numel) {
  for_blocks(blocks_of(numel), kBlocksAThread, [&](int64_t first, int64_t last) {
    for (int64_t begin = first * kBlock; begin < std::min(numel, last * kBlock); begin += kBlock) {
      const int n = block_size(begin, numel);
      store(begin, n);
      combine_block(task, task.out + begin, begin, n);
    }
  });
}

template <typename T>
double finish(double total, bool maximum, int64_t length) {
  return maximum ? total : std::sqrt(total / static_cast<double>(length));
}

// Norm of units that each fit a block: whole units are put together into blocks. values(q, begin,
// n) fills q.
template <typename T, typename Values>
void norm_of_small_units(const Norm& norm, T* out, const Values& values) {
  const int64_t together = std::max<int64_t>(1, kBlock / std::max<int64_t>(1, norm.length));
  const auto body = [&](int64_t first, int64_t last) {
    T q[kBlock];
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * together, end = std::min(norm.units, begin + together);
      values(q, begin * norm.length, static_cast<int>((end - begin) * norm.length));
      T* next = q;
      for (int64_t unit = begin; unit < end; ++unit) {
        double result = 0;
        for (int64_t length : norm.segments) {
          if (length == 0) continue;
          const int n = static_cast<int>(length);  // a short one is not worth the call
          const T total = n <= 8 ? fold_body(next, norm.maximum, n) : fold(next, norm.maximum, n);
          result = larger(result, finish<T>(total, norm.maximum, length));
          next += length;
        }
        out[unit] = static_cast<T>(result);
      }
    }
  };
  for_blocks((norm.units + together - 1) / together, kBlocksAThread, body);
}

// Norm of units larger than a block: blocks do not straddle segments; the last pass adds up their
// partial results.
template <typename T, typename Values>
void norm_of_large_units(const Norm& norm, T* out, const Values& values) {
  struct Piece {
    int64_t begin;
    int size;
  };
  std::vector<Piece> pieces;
  int64_t segment_begin = 0;
  for (int64_t length : norm.segments) {
    for (int64_t at = 0; at < length; at += kBlock)
      pieces.push_back({segment_begin + at, block_size(at, length)});
    segment_begin += length;
  }
  const int64_t per_unit = static_cast<int64_t>(pieces.size());
  std::vector<double> partial(norm.units * per_unit);
  for_blocks(norm.units * per_unit, kBlocksAThread, [&](int64_t first, int64_t last) {
    T q[kBlock];
    for (int64_t block = first; block < last; ++block) {
      const Piece& piece = pieces[block % per_unit];
      values(q, block / per_unit * norm.length + piece.begin, piece.size);
      partial[block] = fold(q, norm.maximum, piece.size);
    }
  });
  const double* next = partial.data();
  for (int64_t unit = 0; unit < norm.units; ++unit) {
    double result = 0;
    for (int64_t length : norm.segments) {
      double total = 0;
      for (int64_t block = blocks_of(length); block > 0; --block)
        total = norm.maximum ? larger(total, *next++) : total + *next++;
      if (length > 0) result = larger(result, finish<T>(total, norm.maximum, length));
    }
    out[unit] = static_cast<T>(result);
  }
}

template <typename T, typename Values>
void compute_norm(const Norm& norm, T* out, const Values& values) {
  if (norm.length <= kBlock) {
    norm_of_small_units(norm, out, values);
  } else {
    norm_of_large_units(norm, out, values);
  }
}

}  // namespace
}  // namespace ct::rk
