// The field by itself, on many samples: what is compared with the function that it was made from.
#pragma once

#include "one_sample.h"

namespace ct::native {

template <class Field, int W>
struct Evaluation {
  using real = typename Field::real;
  using V = Lanes<real, W>;

  // dy[b] = f(t[b], y[b]) for W samples from `base` on, as far as there are so many.
  CT_BOTH void run(int64_t base, int64_t batch, const double* t, const void* y_, const void* own_,
                   const void* const* shared, void* dy_) {
    const real* all_y = static_cast<const real*>(y_);
    const real* all_own = static_cast<const real*>(own_);
    V time{};
    for (int lane = 0; lane < W; ++lane) {
      const int64_t b = base + lane < batch ? base + lane : batch - 1;
      set(time, lane, static_cast<real>(t[b]));
      for (long d = 0; d < Field::dim; ++d) set(y[d], lane, all_y[b * Field::dim + d]);
      for (long j = 0; j < Field::own; ++j) set(own[j], lane, all_own[b * Field::own + j]);
    }
    arrays.attach(shared);
    Field::eval(time, y, own, arrays.all, work, dy);
    for (int lane = 0; lane < W && base + lane < batch; ++lane)
      for (long d = 0; d < Field::dim; ++d)
        static_cast<real*>(dy_)[(base + lane) * Field::dim + d] = get(dy[d], lane);
  }

  V y[Field::dim], dy[Field::dim], own[Field::own + 1];
  alignas(kRegisterBytes) alignas(V) V work[Field::work + 1];
  Arrays<Field, W> arrays;
};

}  // namespace ct::native
