// Lanes that do not fit a register: two halves, each of which may. (The compiler's own vectors of
// that size compare and select number by number.)
#pragma once

#include "base.h"

namespace ct::native {

template <class Half_, class T, int W>
struct Wide {
  using Half = Half_;
  using Number = T;
  static constexpr int width = W;
  Half low, high;
};

template <class X>
struct IsWide : std::false_type {};
template <class H, class T, int W>
struct IsWide<Wide<H, T, W>> : std::true_type {};

#define CT_WIDE                      \
  template <class H, class T, int W> \
  CT_LANES

#define CT_WIDE_ARITHMETIC(op)                                                           \
  CT_WIDE Wide<H, T, W> operator op(const Wide<H, T, W>& a, const Wide<H, T, W>& b) {    \
    return {a.low op b.low, a.high op b.high};                                           \
  }                                                                                      \
  CT_WIDE Wide<H, T, W> operator op(const Wide<H, T, W>& a, std::type_identity_t<T> b) { \
    return {a.low op b, a.high op b};                                                    \
  }                                                                                      \
  CT_WIDE Wide<H, T, W> operator op(std::type_identity_t<T> a, const Wide<H, T, W>& b) { \
    return {a op b.low, a op b.high};                                                    \
  }
CT_WIDE_ARITHMETIC(+)
CT_WIDE_ARITHMETIC(-)
CT_WIDE_ARITHMETIC(*)
CT_WIDE_ARITHMETIC(/)
#undef CT_WIDE_ARITHMETIC

#define CT_WIDE_COMPARISON(op)                                                   \
  CT_WIDE auto operator op(const Wide<H, T, W>& a, const Wide<H, T, W>& b) {     \
    const auto low = a.low op b.low, high = a.high op b.high;                    \
    using M = std::remove_cv_t<decltype(low)>;                                   \
    return Wide<M, std::conditional_t<sizeof(T) == 8, long, int>, W>{low, high}; \
  }
CT_WIDE_COMPARISON(<)
CT_WIDE_COMPARISON(<=)
CT_WIDE_COMPARISON(>)
CT_WIDE_COMPARISON(>=)
CT_WIDE_COMPARISON(==)
CT_WIDE_COMPARISON(!=)
#undef CT_WIDE_COMPARISON

CT_WIDE Wide<H, T, W> operator&(const Wide<H, T, W>& a, const Wide<H, T, W>& b) {
  return {a.low & b.low, a.high & b.high};
}
CT_WIDE Wide<H, T, W> operator|(const Wide<H, T, W>& a, const Wide<H, T, W>& b) {
  return {a.low | b.low, a.high | b.high};
}
CT_WIDE Wide<H, T, W> operator~(const Wide<H, T, W>& a) { return {~a.low, ~a.high}; }
CT_WIDE Wide<H, T, W> operator-(const Wide<H, T, W>& a) { return {-a.low, -a.high}; }
CT_WIDE Wide<H, T, W>& operator+=(Wide<H, T, W>& a, const Wide<H, T, W>& b) { return a = a + b; }

}  // namespace ct::native
