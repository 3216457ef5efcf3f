// Laplacian of an elementwise function on the CPU: one stretch of elements at a time, with the
// derivatives of the function in the first-level cache while the rows go by.
#pragma once

#include <algorithm>

#include "cpu_machines.h"
#include "laplacian.h"

namespace ct::jet {
namespace {

constexpr int kWide = 512;  // elements in a stretch

// squares = sum_r rows_r^2, of rows that are shared
template <typename M, typename T>
void sum_squares(const LaplacianTask<T>& task) {
  std::fill(task.squares, task.squares + task.columns, T(0));
  for (int64_t r = 0; r < task.count; ++r)
    M::scale_row(nullptr, task.squares, task.rows + r * task.columns, nullptr, task.columns);
}

template <typename M>
class LaplacianBlock {
 public:
  using T = typename M::Scalar;
  static constexpr int kRow = M::kRow;

  void forward(const LaplacianTask<T>& task, int64_t begin) {
    const int n = static_cast<int>(std::min<int64_t>(kWide, task.numel - begin));
    differentiate(task, begin, n, 2);
    copy(task.y + begin, value_, n);
    if (!task.shared()) std::fill(squares_, squares_ + n, T(0));
    // A stretch of shared rows may begin anywhere in them, and go round.
    for (int at = 0; at < n;) {
      const int64_t column = (begin + at) % std::max<int64_t>(1, task.columns);
      const int run = static_cast<int>(std::min<int64_t>(n - at, task.columns - column));
      if (task.shared()) copy(squares_ + at, task.squares + column, run);
      T* const squares = task.shared() ? nullptr : squares_ + at;
      if (squares != nullptr || task.new_rows != nullptr)
        for (int64_t r = 0; r < task.count; ++r)
          M::scale_row(
              task.new_rows == nullptr ? nullptr : task.new_rows + r * task.numel + begin + at,
              squares, task.rows + r * task.columns + column, first_ + at, run);
      at += run;
    }
    for (int i = 0; i < n; ++i) {
      const T bent = second_[i] * squares_[i];
      task.out[begin + i] = task.lap == nullptr ? bent : bent + first_[i] * task.lap[begin + i];
    }
  }

  void backward(const LaplacianTask<T>& task, int64_t begin) {
    const int n = static_cast<int>(std::min<int64_t>(kWide, task.numel - begin));
    differentiate(task, begin, n, 3);
    std::fill(squares_, squares_ + n, T(0));
    std::fill(products_, products_ + n, T(0));
    for (int i = 0; i < n; ++i)
      bend_[i] = task.glap == nullptr ? T(0) : T(2) * second_[i] * task.glap[begin + i];
    for (int64_t r = 0; r < task.count; ++r) {
      const int64_t at = r * task.numel + begin;
      if (task.glap != nullptr) M::scale_row(nullptr, squares_, task.rows + at, nullptr, n);
      M::scale_row_backward(task.rows_bar + at, products_, task.rows + at,
                            task.grows == nullptr ? nullptr : task.grows + at, first_, bend_, n);
    }
    finish(task, begin, n);
  }

  // A stretch of the columns of shared rows, all elements above it in turn.
  void backward_shared(const LaplacianTask<T>& task, int64_t column) {
    const int n = static_cast<int>(std::min<int64_t>(kRow, task.columns - column));
    T* const rows_bar = task.rows_bar + column;
    for (int64_t r = 0; r < task.count; ++r)
      std::fill(rows_bar + r * task.columns, rows_bar + r * task.columns + n, T(0));
    std::fill(bend_, bend_ + n, T(0));
    copy(squares_, task.squares + column, n);
    for (int64_t begin = column; begin < task.numel; begin += task.columns) {
      differentiate(task, begin, n, 3);
      std::fill(products_, products_ + n, T(0));
      if (task.grows != nullptr)
        for (int64_t r = 0; r < task.count; ++r)
          M::share_row_backward(rows_bar + r * task.columns, products_,
                                task.rows + r * task.columns + column,
                                task.grows + r * task.numel + begin, first_, n);
      if (task.glap != nullptr)
        for (int i = 0; i < n; ++i) bend_[i] += T(2) * second_[i] * task.glap[begin + i];
      finish(task, begin, n);
    }
    for (int64_t r = 0; r < task.count; ++r)
      for (int i = 0; i < n; ++i)
        rows_bar[r * task.columns + i] += bend_[i] * task.rows[r * task.columns + column + i];
  }

 private:
  static void copy(T* to, const T* from, int n) {
    for (int i = 0; i < n; ++i) to[i] = from[i];
  }

  // value_, first_, second_ and third_: the derivatives of the function up to the order, which are
  // those of its series along a line, with their factorials.
  void differentiate(const LaplacianTask<T>& task, int64_t begin, int n, int order) {
    constexpr int kCapacity = 6;
    T* const memory = scratch<T>(static_cast<size_t>(kSeries) * kCapacity * kRow);
    T* const to[] = {value_, first_, second_, third_};
    for (int at = 0; at < n; at += kRow) {
      M machine(memory, kCapacity);
      T *line = machine.take(), *y = machine.take();
      const int count = std::min(kRow, n - at);
      copy(line, task.x + begin + at, count);
      std::fill(line + count, line + kRow, line[0]);
      std::fill(line + kRow, line + 2 * kRow, T(1));
      Functions<M>::evaluate(machine, task.op, 0, task.param, y, line, 2, order);
      for (int k = 0; k <= order; ++k) {
        const T factorial = k < 2 ? T(1) : k == 2 ? T(2) : T(6);
        for (int i = 0; i < kRow; ++i) to[k][at + i] = factorial * y[k * kRow + i];
      }
    }
  }

  // The cotangents of x and lap, once the sums over the rows are known.
  void finish(const LaplacianTask<T>& task, int64_t begin, int n) {
    for (int i = 0; i < n; ++i) {
      const int64_t at = begin + i;
      const T of_lap = task.glap == nullptr ? T(0) : task.glap[at];
      const T lap = task.lap == nullptr ? T(0) : task.lap[at];
      T sum = second_[i] * (products_[i] + of_lap * lap);
      if (task.glap != nullptr) sum += third_[i] * of_lap * squares_[i];
      if (task.gy != nullptr) sum += first_[i] * task.gy[at];
      task.x_bar[at] = sum;
      task.lap_bar[at] = first_[i] * of_lap;
    }
  }

  alignas(64) T value_[kWide], first_[kWide], second_[kWide], third_[kWide];
  alignas(64) T squares_[kWide], products_[kWide], bend_[kWide];
};

}  // namespace
}  // namespace ct::jet
