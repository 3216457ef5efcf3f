// The series of one activation in registers, for CPU and GPU alike, on top of mlp/arith.h. Included
// once for each instruction set, and once for the GPU, whose vectors are numbers: no include guard.

namespace ct::hollow::CT_MLP_LEVEL {
namespace {

using namespace mlp::CT_MLP_LEVEL;
using mlp::kMaxOrder;
using mlp::kU;
using mlp::kY;
using mlp::kZ;

// kOrder < 0: the order is only known at run time. kFirst: a series in x itself, z = z_0 + z_1 x.
template <typename T_, typename Op, int kOrder, bool kFirst>
struct LocalSeries {
  using T = T_;
  using V = Vector<T>;
  static constexpr int kSize = (kOrder < 0 ? kMaxOrder : kOrder) + 1;

  CT_MLP_INLINE explicit LocalSeries(int order) : order_(order) {}
  CT_MLP_INLINE int order() const { return kOrder < 0 ? order_ : kOrder; }
  CT_MLP_INLINE int degree(int series) const {
    return series == kZ && kFirst && order() > 1 ? 1 : order();
  }
  CT_MLP_INLINE V get(int series, int k) const { return coefficient_[series][k]; }
  CT_MLP_INLINE void set(int series, int k, const V& value) { coefficient_[series][k] = value; }

  // All coefficients of y, and of its slope if wanted; coefficient k of z is z(k).
  template <bool kSlope, typename Get>
  CT_MLP_INLINE void fill(T param, const Get& z) {
    const int last = order();
    CT_MLP_EACH
    for (int k = 0; k <= last; ++k) {
      set(kZ, k, kFirst && k > 1 ? V{} : z.get(k));
      Op::template order<kSlope>(*this, k, param);
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
  V coefficient_[Op::kSeries][kSize];
  int order_;
};

}  // namespace
}  // namespace ct::hollow::CT_MLP_LEVEL
