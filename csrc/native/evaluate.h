// The field by itself, on many samples: what is compared with the function that it was made from.
#pragma once

#include <algorithm>
#include <memory>

#include "lanes.h"

namespace ct::native {

// dy[b] = f(t[b], y[b]) for b < batch.
template <class Field, int W>
void evaluate_samples(int64_t batch, const double* t, const void* y_, const void* own_,
                      const void* const* shared, void* dy_) {
  using real = typename Field::real;
  using V = Lanes<real, W>;
  struct Work {
    V y[Field::dim], dy[Field::dim], own[Field::own + 1], work[Field::work + 1];
  };
  const auto w = std::make_unique<Work>();
  const real *y = static_cast<const real*>(y_), *own = static_cast<const real*>(own_);
  real* dy = static_cast<real*>(dy_);
  for (int64_t base = 0; base < batch; base += W) {
    V time{};
    for (int lane = 0; lane < W; ++lane) {
      const int64_t b = std::min(base + lane, batch - 1);
      set(time, lane, static_cast<real>(t[b]));
      for (long d = 0; d < Field::dim; ++d) set(w->y[d], lane, y[b * Field::dim + d]);
      for (long j = 0; j < Field::own; ++j) set(w->own[j], lane, own[b * Field::own + j]);
    }
    Field::eval(time, w->y, w->own, reinterpret_cast<const real* const*>(shared), w->work, w->dy);
    for (int lane = 0; lane < W && base + lane < batch; ++lane)
      for (long d = 0; d < Field::dim; ++d)
        dy[(base + lane) * Field::dim + d] = get(w->dy[d], lane);
  }
}

}  // namespace ct::native
