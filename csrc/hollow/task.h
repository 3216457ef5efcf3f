// What the kernels read and write. No torch here.
//
// Rows come in groups, each with a net of its own: row n of group g is number n * groups + g.
#pragma once

#include <cstdint>

#include "../core/hd.h"
#include "../mlp/tasks.h"

namespace ct::hollow {

using mlp::Activation;

constexpr int kMaxHidden = 16;  // layers; of a deeper net the reference serves

// Where a group's parameters are: weight [out, in] and bias [out] of each layer in turn. The first
// layer's input 0 is x, its others are h; the last layer has one output.
struct Net {
  int hidden = 0;
  int64_t context = 0, parameters = 0;
  int64_t width[kMaxHidden] = {}, weight[kMaxHidden + 1] = {}, bias[kMaxHidden + 1] = {};

  CT_HD int64_t inputs(int layer) const { return layer == 0 ? 1 + context : width[layer - 1]; }
  CT_HD int64_t outputs(int layer) const { return layer == hidden ? 1 : width[layer]; }
};

// A forward pass writes `out`, a gradient reads `g` and writes of_x, of_h and of_theta. Stacks have
// order + 1 planes of groups * rows numbers.
template <typename T>
struct Task {
  Net net;
  Activation activation = Activation::kIdentity;
  T param = 0;
  int order = 0;
  int64_t groups = 0, rows = 0;
  const T *x = nullptr, *h = nullptr, *theta = nullptr, *g = nullptr;
  T *out = nullptr, *of_x = nullptr, *of_h = nullptr, *of_theta = nullptr;
};

// Rows of one group that are worked on in one go. A gradient in theta is added up chunk by chunk:
// chunks depend on sizes alone, so that sums do not depend on the number of threads.
struct Chunks {
  CT_HD Chunks(int64_t groups, int64_t rows_) : rows(rows_) {
    constexpr int64_t kSmall = 256, kMost = 64;  // rows of a chunk; chunks of all groups
    const int64_t wanted = (rows + kSmall - 1) / kSmall;
    const int64_t allowed = groups < kMost ? kMost / (groups > 0 ? groups : 1) : 1;
    count = wanted < allowed ? wanted : allowed;
    count = count > 0 ? count : 1;
    size = (rows + count - 1) / count;
    count = size > 0 ? (rows + size - 1) / size : 1;
  }
  CT_HD int64_t first(int64_t chunk) const { return chunk * size; }
  CT_HD int64_t last(int64_t chunk) const {
    return first(chunk) + size < rows ? first(chunk) + size : rows;
  }
  int64_t rows, count, size;
};

}  // namespace ct::hollow
