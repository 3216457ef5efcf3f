// The series of one activation in registers, for CPU and GPU alike, on top of mlp/arith.h. Included
// once for each instruction set, and once for the GPU, whose vectors are numbers: no include guard.

namespace ct::hollow::CT_MLP_LEVEL {
namespace {

using namespace mlp::CT_MLP_LEVEL;
using mlp::kMaxOrder;
using mlp::kU;
using mlp::kY;
using mlp::kZ;

// Of the first layer, z = z_0 + z_1 x. kOrder < 0: the order, and whether this is the first layer,
// are only known at run time.
template <typename T_, typename Op, int kOrder, bool kFirst>
struct LocalSeries {
  using T = T_;
  using V = Vector<T>;
  static constexpr int kSize = (kOrder < 0 ? kMaxOrder : kOrder) + 1;

  CT_MLP_INLINE LocalSeries(int order, bool first) : order_(order), first_(first) {}
  CT_MLP_INLINE int order() const { return kOrder < 0 ? order_ : kOrder; }
  CT_MLP_INLINE bool first() const { return kOrder < 0 ? first_ : kFirst; }
  CT_MLP_INLINE int degree(int series) const {
    return series == kZ && first() && order() > 1 ? 1 : order();
  }
  CT_MLP_INLINE V get(int series, int k) const { return coefficient_[series][k]; }
  CT_MLP_INLINE void set(int series, int k, const V& value) { coefficient_[series][k] = value; }

  // All coefficients of y, and of its slope if wanted; coefficient k of z is z(k).
  template <bool kSlope, typename Get>
  CT_MLP_INLINE void fill(T param, const Get& z) {
    if constexpr (kOrder < 0) {  // not unrolled: that takes minutes to compile
      CT_MLP_LOOP
      for (int k = 0; k <= order_; ++k) fill_order<kSlope>(k, param, z);
    } else {
      CT_MLP_EACH
      for (int k = 0; k <= kOrder; ++k) fill_order<kSlope>(k, param, z);
    }
  }

  // sum_(k >= j) bar_k u_(k-j): the cotangent of z_j from those of y
  template <typename Bars>
  CT_MLP_INLINE V correlated(const Bars& bar, int j) const {
    const int last = order();
    V total = bar.get(j) * get(kU, 0);
    CT_MLP_EACH
    for (int k = 1; k <= last; ++k)
      if (k > j) total += bar.get(k) * get(kU, k - j);
    return total;
  }

 private:
  template <bool kSlope, typename Get>
  CT_MLP_INLINE void fill_order(int k, T param, const Get& z) {
    set(kZ, k, first() && k > 1 ? V{} : z.get(k));
    Op::template order<kSlope>(*this, k, param);
  }

  V coefficient_[Op::kSeries][kSize];
  int order_;
  bool first_;
};

}  // namespace
}  // namespace ct::hollow::CT_MLP_LEVEL
