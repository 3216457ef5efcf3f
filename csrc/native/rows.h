// Samples between memory and the lanes of a tile.
#pragma once

#include "tile.h"

namespace ct::native {

template <class T>
CT_LANES void load_sample(const Task& task, T& tile, typename T::Tolerances& tolerances, int lane,
                          int64_t sample) {
  using real = typename T::real;
  const real* y0 = static_cast<const real*>(task.y0) + sample * T::dim;
  const real* own = static_cast<const real*>(task.own) + sample * T::Field::own;
  for_each<T::dim>([&](long d) __attribute__((always_inline)) { put(tile.y[d], lane, y0[d]); });
  for_each<T::Field::own>([&](long j)
                              __attribute__((always_inline)) { put(tile.own[j], lane, own[j]); });
  if constexpr (T::Method::tolerances) {
    const real* rtol = static_cast<const real*>(task.rtols) + sample * T::dim;
    const real* atol = static_cast<const real*>(task.atols) + sample * T::dim;
    for (long d = 0; d < T::dim; ++d) {
      put(tolerances.rtol[d], lane, rtol[d]);
      put(tolerances.atol[d], lane, atol[d]);
    }
  }
}

// What is the same for all samples.
template <class T>
CT_LANES void prepare_tile(const Task& task, T& tile, typename T::Tolerances& tolerances) {
  using real = typename T::real;
  tile.shared.attach(task.shared);
  tile.norm_shared = task.norm_shared;
  if constexpr (!T::Method::tolerances) {
    tolerances.rtol[0] = all<typename T::V>(static_cast<real>(task.rtol));
    tolerances.atol[0] = all<typename T::V>(static_cast<real>(task.atol));
  }
}

template <class T>
CT_BOTH typename T::real* output_row(const Task& task, int64_t sample, int64_t row) {
  return static_cast<typename T::real*>(task.out) + sample * task.out_sample + row * task.out_row;
}

template <class T, class V>
CT_LANES void store_sample(const Task& task, const V* state, int lane, int64_t sample,
                           int64_t row) {
  auto* to = output_row<T>(task, sample, row);
  for_each<T::dim>([&](long d) __attribute__((always_inline)) { to[d] = peek(state[d], lane); });
}

}  // namespace ct::native
