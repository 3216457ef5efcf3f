// What the Laplacian operators are given, for CPU and CUDA.
#pragma once

#include "args.h"

namespace ct::jet {

template <typename T>
struct LaplacianTask {
  bool shared() const { return columns != numel; }

  const T *x, *rows, *lap;  // lap: null for zeros
  int64_t count;            // rows
  int64_t numel;            // elements of x
  int64_t columns;          // elements of a row; fewer than numel where rows are shared
  Op op;
  T param;
  T *y = nullptr, *new_rows = nullptr, *out = nullptr;
  const T *gy = nullptr, *grows = nullptr, *glap = nullptr;
  T *x_bar = nullptr, *rows_bar = nullptr, *lap_bar = nullptr;
  T* squares = nullptr;  // of shared rows, summed: [columns]
};

struct LaplacianArgs {
  LaplacianArgs(const char* name_, const Tensor& x_, const Tensor& rows_,
                const std::optional<Tensor>& lap_, int64_t number)
      : name(name_), x(as_contiguous(x_)), shape(sizes_of(x)), op(read_op(name_, number)) {
    require_like(name, "rows", rows_, x);
    require(rows_.dim() == x.dim() + 1, name, ": rows must be [R, *shape]");
    rows = as_contiguous(rows_);
    count = rows.size(0), columns = 1;
    bool full = true;
    for (size_t d = shape.size(); d-- > 0;) {
      const int64_t size = rows.size(static_cast<int64_t>(d) + 1);
      full = full && size == shape[d];
      require(full || size == 1, name,
              ": rows must be [R, *shape], shared over the leading dimensions or none");
      columns *= size;
    }
    squares = new_tensor(x, {columns == numel_of(shape) ? 0 : columns});
    if (!lap_) return;
    check("lap", *lap_, shape);
    lap = as_contiguous(*lap_);
  }

  void check(const char* argument, const Tensor& given, const Sizes& sizes) const {
    require_like(name, argument, given, x);
    require_sizes(name, argument, given, sizes);
  }

  template <typename T>
  LaplacianTask<T> task(double param) const {
    LaplacianTask<T> task{};
    task.x = x.template const_data_ptr<T>(), task.rows = rows.template const_data_ptr<T>();
    task.lap = lap ? lap->template const_data_ptr<T>() : nullptr;
    task.count = count, task.numel = numel_of(shape), task.columns = columns;
    task.op = op, task.param = static_cast<T>(param);
    task.squares = squares.template mutable_data_ptr<T>();
    return task;
  }

  const char* name;
  Tensor x, rows, squares;
  std::optional<Tensor> lap;
  Sizes shape;
  int64_t count, columns;
  Op op;
};

// Cotangents of the outputs, each of which may be missing.
struct LaplacianCotangents {
  LaplacianCotangents(const LaplacianArgs& args, const std::optional<Tensor>& gy,
                      const std::optional<Tensor>& grows, const std::optional<Tensor>& glap)
      : y(read(args, "gy", gy, args.shape)),
        rows(read(args, "grows", grows, with_front(args.count, args.shape))),
        lap(read(args, "glap", glap, args.shape)) {}

  static std::optional<Tensor> read(const LaplacianArgs& args, const char* argument,
                                    const std::optional<Tensor>& g, const Sizes& sizes) {
    if (!g) return std::nullopt;
    args.check(argument, *g, sizes);
    return as_contiguous(*g);
  }

  template <typename T>
  void put(LaplacianTask<T>& task) const {
    task.gy = y ? y->template const_data_ptr<T>() : nullptr;
    task.grows = rows ? rows->template const_data_ptr<T>() : nullptr;
    task.glap = lap ? lap->template const_data_ptr<T>() : nullptr;
  }

  std::optional<Tensor> y, rows, lap;
};

}  // namespace ct::jet
