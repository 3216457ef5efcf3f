// Small matrix products, units in lanes, whose operands stay in the first-level cache; part of
// levels.h. Matrices that are read by vectors have rows padded to whole vectors.

namespace ct::hollow::CT_MLP_LEVEL {
namespace {

constexpr int kTile = CT_MLP_BYTES == 64 ? 8 : 4;  // rows whose sums are in registers

// out[r] = bias + x[r] line + sum_i a[r][i] b[i], for each of so many rows and vectors of outputs.
// Rows of `out` are written up to a whole tile.
template <typename T>
struct Product {
  const T* a;
  int64_t stride, rows, inputs;
  const T* b;
  int64_t width;  // of b and out, padded
  T* out;
  const T *bias = nullptr, *x = nullptr, *line = nullptr;  // null: zero
};

template <typename T, int kVectors>
CT_MLP_INLINE void product_tile(const Product<T>& p, int64_t first, int64_t at) {
  constexpr int kLanes = Lanes<T>::kCount;
  const T* a[kTile];
  Vector<T> sum[kTile][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kTile; ++r) {
    const int64_t row = first + r < p.rows ? first + r : p.rows - 1;
    a[r] = p.a + row * p.stride;
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = p.bias == nullptr ? Vector<T>{} : load<T>(p.bias + at + v * kLanes);
      if (p.x != nullptr) sum[r][v] += p.x[row] * load<T>(p.line + at + v * kLanes);
    }
  }
  const T* b = p.b + at;
  for (int64_t i = 0; i < p.inputs; ++i, b += p.width) {
    Vector<T> w[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) w[v] = load<T>(b + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[r][v] += a[r][i] * w[v];
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v)
      store<T>(p.out + (first + r) * p.width + at + v * kLanes, sum[r][v]);
}

template <typename T>
__attribute__((noinline)) void product(const Product<T>& p) {
  constexpr int kLanes = Lanes<T>::kCount;
  for (int64_t first = 0; first < p.rows; first += kTile) {
    int64_t at = 0;
    for (; at + 2 * kLanes <= p.width; at += 2 * kLanes) product_tile<T, 2>(p, first, at);
    if (at < p.width) product_tile<T, 1>(p, first, at);
  }
}

// Zeros behind the first `units` numbers of each row: an infinite input made NaN of them, which no
// weight of zero takes back.
template <typename T>
void clear_padding(T* out, int64_t rows, int64_t units, int64_t width) {
  if (units == width) return;
  constexpr int kLanes = Lanes<T>::kCount;
  typedef typename Math<T>::I I;
  const int64_t whole = width - kLanes;
  I keep{};
  for (int i = 0; i < kLanes; ++i) keep[i] = whole + i < units ? -1 : 0;
  for (int64_t r = 0; r < rows; ++r) {
    T* last = out + r * width + whole;
    store<T>(last, (Vector<T>)((I)load<T>(last) & keep));
  }
}

// out[i] += sum_r a[r][i] b[r]
template <typename T>
struct Outer {
  const T* a;
  int64_t stride, rows, inputs;
  const T* b;
  int64_t width;
  T* out;
};

template <typename T, int kInputs, int kVectors>
CT_MLP_INLINE void outer_tile(const Outer<T>& p, int64_t first, int64_t at) {
  constexpr int kLanes = Lanes<T>::kCount;
  Vector<T> sum[kInputs][kVectors] = {};
  const T *a = p.a + first, *b = p.b + at;
  for (int64_t r = 0; r < p.rows; ++r, a += p.stride, b += p.width) {
    Vector<T> w[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) w[v] = load<T>(b + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kInputs; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[i][v] += a[i] * w[v];
  }
#pragma GCC unroll 8
  for (int i = 0; i < kInputs; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      T* to = p.out + (first + i) * p.width + at + v * kLanes;
      store<T>(to, load<T>(to) + sum[i][v]);
    }
}

template <typename T, int kInputs>
CT_MLP_INLINE void outer_rows(const Outer<T>& p, int64_t first) {
  constexpr int kLanes = Lanes<T>::kCount;
  int64_t at = 0;
  for (; at + 2 * kLanes <= p.width; at += 2 * kLanes) outer_tile<T, kInputs, 2>(p, first, at);
  if (at < p.width) outer_tile<T, kInputs, 1>(p, first, at);
}

template <typename T>
__attribute__((noinline)) void outer(const Outer<T>& p) {
  int64_t first = 0;
  for (; first + kTile <= p.inputs; first += kTile) outer_rows<T, kTile>(p, first);
  for (; first < p.inputs; ++first) outer_rows<T, 1>(p, first);
}

// Lane l of the result is the sum of all lanes of x[l]: half of the lanes change places in each
// step, in which x[i] and x[i + kHalf] become one.
template <typename T, int kHalf, int... kLane>
CT_MLP_INLINE Vector<T> folded(const Vector<T>& a, const Vector<T>& b,
                               std::integer_sequence<int, kLane...>) {
  constexpr int kLanes = Lanes<T>::kCount;
  typedef typename Math<T>::I I;
  const I own = {((kLane & kHalf) ? kLanes + kLane : kLane)...};
  const I other = {((kLane & kHalf) ? kLanes + (kLane ^ kHalf) : (kLane ^ kHalf))...};
  return __builtin_shuffle(a, b, own) + __builtin_shuffle(a, b, other);
}

template <typename T, int kHalf>
CT_MLP_INLINE void fold(Vector<T>* x) {
  if constexpr (kHalf > 0) {
    using Sequence = std::make_integer_sequence<int, Lanes<T>::kCount>;
#pragma GCC unroll 8
    for (int i = 0; i < kHalf; ++i) x[i] = folded<T, kHalf>(x[i], x[i + kHalf], Sequence{});
    fold<T, kHalf / 2>(x);
  }
}

// The sums of so many vectors, one behind the other; `x` and `sums` are read and written up to
// whole vectors.
template <typename T>
__attribute__((noinline)) void sum_lanes(const T* x, int64_t count, T* sums) {
  constexpr int kLanes = Lanes<T>::kCount;
  for (int64_t first = 0; first < count; first += kLanes) {
    Vector<T> each[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) each[i] = load<T>(x + (first + i) * kLanes);
    fold<T, kLanes / 2>(each);
    store<T>(sums + first, each[0]);
  }
}

}  // namespace
}  // namespace ct::hollow::CT_MLP_LEVEL
