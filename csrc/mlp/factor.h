// The right factor of products, in panels for loops of our own, or as it is for a BLAS.
//
// Laid out once a call, it serves all blocks of a batch: with that work done, our products are
// faster than those of a BLAS that has to do it anew for each block.
#pragma once

#include "gemm.h"
#include "levels.h"
#include "memory.h"

namespace ct::mlp {
namespace {

enum class As { kGiven, kTransposed };  // which way a matrix stored by rows is taken

template <typename T>
class Factor {
 public:
  // w [columns, terms] if it is to be transposed, else [terms, columns]; `rows` is about how many
  // rows there will be to multiply by it in all: too few are not worth its panels.
  Factor(const T* w, As as, int64_t terms, int64_t columns, int64_t rows)
      : w_(w), as_(as), terms_(terms), columns_(columns) {
    const Loops<T>& loop = loops<T>();
    if (!kOwnProducts || rows < kLeastRows || columns < kLeastColumns) return;
    panels_ = std::make_unique<Scratch<T>>(terms * loop.padded(columns));
    loop.pack({w, as == As::kTransposed, terms, columns, panels_->get()});
  }

  // c [rows, columns] = alpha a [rows, terms] times the factor, or that is added to c
  void product(int64_t rows, const T* a, T* c, T alpha = 1, bool add = false) const {
    if (panels_ != nullptr)
      in_panels({rows, terms_, columns_, a, panels_->get(), c, alpha, add, nullptr, 0, kChain});
    else
      by_blas(rows, a, c, alpha, add);
  }

  // c = a times the factor, and a bias in its first rows, unless it is null
  void product(int64_t rows, const T* a, T* c, const T* bias, int64_t biased,
               int64_t chain = kChain) const {
    if (bias == nullptr) biased = 0;
    if (panels_ != nullptr)
      return in_panels(
          {rows, terms_, columns_, a, panels_->get(), c, 1, false, bias, biased, chain});
    by_blas(rows, a, c, 1, false);
    for (int64_t r = 0; r < biased; ++r)
      for (int64_t i = 0; i < columns_; ++i) c[r * columns_ + i] += bias[i];
  }

 private:
  static void in_panels(const ProductTask<T>& task) { loops<T>().product(task); }

  void by_blas(int64_t rows, const T* a, T* c, T alpha, bool add) const {
    if (as_ == As::kTransposed)
      multiply_transposed<T>(rows, columns_, terms_, a, w_, c, alpha, T(add));
    else
      multiply<T>(rows, columns_, terms_, a, w_, c, alpha, T(add));
  }

  static constexpr int64_t kLeastRows = 192, kLeastColumns = 12;

  const T* w_;
  As as_;
  int64_t terms_, columns_;
  std::unique_ptr<Scratch<T>> panels_;
};

}  // namespace
}  // namespace ct::mlp
