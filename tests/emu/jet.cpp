// The Taylor kernels of CUDA, run on the CPU and compared with the functions themselves and with
// serial loops.
#include "cuda_emu.h"
//
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "jet/cuda_kernels.h"

using namespace ct::jet;

namespace {

constexpr int kThreadsHere = 4;
constexpr int64_t kElements = 11;
constexpr double kParam = 1.7;

using Numbers = std::vector<double>;

int failures = 0;

void expect_close(const char* what, int op, double actual, double expected) {
  if (std::fabs(actual - expected) <= 1e-11 * (1 + std::fabs(expected))) return;
  std::printf("%s of function %d: got %.17g, expected %.17g\n", what, op, actual, expected);
  ++failures;
}

Numbers numbers(int64_t count, int seed) {
  Numbers x(count);
  for (int64_t i = 0; i < count; ++i) x[i] = std::sin(1.0 + 0.7 * static_cast<double>(i) + seed);
  return x;
}

double at(const Numbers& x, int k, int64_t i) { return x[k * kElements + i]; }

// The function itself, by the standard library.
double value(Op op, double x) {
  const double sigmoid = 1 / (1 + std::exp(-x));
  switch (op) {
    case Op::kTanh:
      return std::tanh(x);
    case Op::kSigmoid:
      return sigmoid;
    case Op::kSoftplus:
      return std::log1p(std::exp(kParam * x)) / kParam;
    case Op::kExp:
      return std::exp(x);
    case Op::kLog:
      return std::log(x);
    case Op::kExpm1:
      return std::expm1(x);
    case Op::kLog1p:
      return std::log1p(x);
    case Op::kSin:
      return std::sin(x);
    case Op::kCos:
      return std::cos(x);
    case Op::kSqrt:
      return std::sqrt(x);
    case Op::kRsqrt:
      return 1 / std::sqrt(x);
    case Op::kReciprocal:
      return 1 / x;
    case Op::kPow:
      return std::pow(x, kParam);
    case Op::kErf:
      return std::erf(x);
    case Op::kGelu:
      return x * std::erfc(-x / std::sqrt(2.0)) / 2;
    case Op::kGeluTanh:
      return x / 2 *
             (1 + std::tanh(std::sqrt(8 / std::acos(-1.0)) / 2 * (x + 0.044715 * x * x * x)));
    case Op::kSilu:
      return x * sigmoid;
    case Op::kSinh:
      return std::sinh(x);
    case Op::kCosh:
      return std::cosh(x);
    case Op::kTan:
      return std::tan(x);
    case Op::kAtan:
      return std::atan(x);
    case Op::kAsin:
      return std::asin(x);
    case Op::kAcos:
      return std::acos(x);
    case Op::kAsinh:
      return std::asinh(x);
    case Op::kAcosh:
      return std::acosh(x);
    case Op::kAtanh:
      return std::atanh(x);
    case Op::kLogsigmoid:
      return std::log(sigmoid);
    case Op::kMish:
      return x * std::tanh(std::log1p(std::exp(x)));
  }
  return NAN;
}

// Arguments where the function is defined, with coefficients that shrink.
Numbers arguments(int op, int terms) {
  Numbers x = numbers(terms * kElements, op);
  for (int64_t i = 0; i < terms * kElements; ++i)
    x[i] = i < kElements ? 0.5 + 0.2 * x[i] + (Op(op) == Op::kAcosh ? 1 : 0) : 0.5 * x[i];
  return x;
}

template <int kCapacity>
Numbers unary(int op, const Numbers& x, int terms, int order, int level, bool last) {
  Numbers out((last ? 1 : order + 1) * kElements);
  CT_LAUNCH((unary_kernel<kCapacity, double>), 2, kThreadsHere, 0, nullptr,
            UnaryTask<double>{x.data(), nullptr, out.data(), kElements, terms, order, level, Op(op),
                              kParam, last});
  return out;
}

// A series is the function along its argument, up to what lies behind the order.
void check_values(int op) {
  constexpr int kTerms = 3, kOrder = 9;
  constexpr double kStep = 2e-3;
  const Numbers x = arguments(op, kTerms);
  const Numbers y = unary<10>(op, x, kTerms, kOrder, 0, false);
  const Numbers wide = unary<40>(op, x, kTerms, kOrder, 0, false);
  const Numbers last = unary<10>(op, x, kTerms, kOrder, 0, true);
  for (int64_t i = 0; i < kElements; ++i) {
    for (const double t : {-kStep, 0.0, kStep}) {
      double argument = 0, series = 0;
      for (int k = kTerms - 1; k >= 0; --k) argument = argument * t + at(x, k, i);
      for (int k = kOrder; k >= 0; --k) series = series * t + at(y, k, i);
      expect_close("series", op, series, value(Op(op), argument));
    }
    for (int k = 0; k <= kOrder; ++k) expect_close("wide", op, at(wide, k, i), at(y, k, i));
    expect_close("last", op, last[i], at(y, kOrder, i));
  }
}

// (f^(m) of x)' = f^(m+1) of x times x'
void check_levels(int op) {
  constexpr int kTerms = 4, kOrder = 6;
  const Numbers x = arguments(op, kTerms);
  for (int level = 0; level < 3; ++level) {
    const Numbers y = unary<10>(op, x, kTerms, kOrder, level, false);
    const Numbers slope = unary<40>(op, x, kTerms, kOrder, level + 1, false);
    for (int64_t i = 0; i < kElements; ++i)
      for (int k = 1; k <= kOrder; ++k) {
        double sum = 0;
        for (int j = 1; j <= k && j < kTerms; ++j) sum += j * at(x, j, i) * at(slope, k - j, i);
        expect_close("derivative", op, k * at(y, k, i), sum);
      }
  }
}

template <int kCapacity>
void check_backward(int op) {
  constexpr int kTerms = 3, kOrder = 4;
  const Numbers x = arguments(op, kTerms), g = numbers((kOrder + 1) * kElements, 5);
  const Numbers slope = unary<kCapacity>(op, x, kTerms, kOrder, 1, false);
  for (const bool last : {false, true}) {
    Numbers out(kTerms * kElements);
    CT_LAUNCH((unary_backward_kernel<kCapacity, double>), 2, kThreadsHere, 0, nullptr,
              UnaryTask<double>{x.data(), g.data(), out.data(), kElements, kTerms, kOrder, 1,
                                Op(op), kParam, last});
    for (int64_t i = 0; i < kElements; ++i)
      for (int j = 0; j < kTerms; ++j) {
        double sum = 0;
        for (int k = j; k <= kOrder; ++k) sum += at(slope, k - j, i) * at(g, k, i);
        expect_close("backward", op, at(out, j, i), last ? at(slope, kOrder - j, i) * g[i] : sum);
      }
  }
}

// b has one element for every two of a, and goes round three times.
void check_pairs() {
  constexpr int kTermsA = 3, kTermsB = 4, kOrder = 5;
  constexpr int64_t kCount = 12, kCountB = 2;
  const Numbers a = numbers(kTermsA * kCount, 1);
  Numbers b = numbers(kTermsB * kCountB, 2);
  for (double& x : b) x += 3;
  for (const Pair kind : {Pair::kProduct, Pair::kQuotient, Pair::kCorrelation}) {
    Numbers out((kOrder + 1) * kCount);
    CT_LAUNCH(pair_kernel<double>, 2, kThreadsHere, 0, nullptr,
              PairTask<double>{{a.data(), kTermsA, kCount, kCount, 1},
                               {b.data(), kTermsB, kCountB, kCountB, 2},
                               out.data(),
                               kCount,
                               kOrder,
                               kind});
    for (int64_t i = 0; i < kCount; ++i) {
      const auto of_a = [&](int k) { return k >= 0 && k < kTermsA ? a[k * kCount + i] : 0; };
      const auto of_b = [&](int k) {
        return k >= 0 && k < kTermsB ? b[k * kCountB + i / 2 % kCountB] : 0;
      };
      for (int k = 0; k <= kOrder; ++k) {
        double sum = 0;  // of the quotient: what its product with b gives
        for (int j = 0; j <= kOrder; ++j)
          sum += kind == Pair::kProduct       ? of_a(j) * of_b(k - j)
                 : kind == Pair::kCorrelation ? of_a(j - k) * of_b(j)
                                              : (j <= k ? out[j * kCount + i] * of_b(k - j) : 0);
        expect_close("pair", static_cast<int>(kind),
                     kind == Pair::kQuotient ? of_a(k) : out[k * kCount + i], sum);
      }
    }
  }
}

// Rows of all elements, or shared by those of a batch.
void check_laplacian(int op, int64_t columns, bool all) {
  constexpr int64_t kRows = 3, kNumel = 12;
  Numbers x = numbers(kNumel, 1), derivative[4];
  for (double& z : x) z = 0.5 + 0.2 * z + (Op(op) == Op::kAcosh ? 1 : 0);
  const Numbers rows = numbers(kRows * columns, 2), lap = numbers(kNumel, 3);
  const Numbers gy = numbers(kNumel, 4), grows = numbers(kRows * kNumel, 5),
                glap = numbers(kNumel, 6);
  for (int m = 0; m < 4; ++m) {
    derivative[m].resize(kNumel);
    CT_LAUNCH((unary_kernel<10, double>), 1, kThreadsHere, 0, nullptr,
              UnaryTask<double>{x.data(), nullptr, derivative[m].data(), kNumel, 1, 0, m, Op(op),
                                kParam, false});
  }
  Numbers y(kNumel), new_rows(kRows * kNumel), out(kNumel), x_bar(kNumel), lap_bar(kNumel);
  Numbers rows_bar(kRows * columns), first(kNumel), bend(kNumel), expected(kRows * columns);
  LaplacianKernelTask<double> task{};
  task.x = x.data(), task.rows = rows.data(), task.lap = all ? lap.data() : nullptr;
  task.count = kRows, task.numel = kNumel, task.columns = columns;
  task.op = Op(op), task.param = kParam;
  task.y = y.data(), task.new_rows = all ? new_rows.data() : nullptr, task.out = out.data();
  task.gy = all ? gy.data() : nullptr, task.grows = all ? grows.data() : nullptr;
  task.glap = glap.data(), task.x_bar = x_bar.data(), task.lap_bar = lap_bar.data();
  task.rows_bar = rows_bar.data(), task.first = first.data(), task.bend = bend.data();
  CT_LAUNCH(laplacian_kernel<double>, 2, kThreadsHere, 0, nullptr, task);
  CT_LAUNCH(laplacian_backward_kernel<double>, 2, kThreadsHere, 0, nullptr, task);
  if (columns != kNumel) CT_LAUNCH(shared_rows_kernel<double>, 2, kThreadsHere, 0, nullptr, task);
  for (int64_t i = 0; i < kNumel; ++i) {
    const double f1 = derivative[1][i], f2 = derivative[2][i], f3 = derivative[3][i];
    const double l = all ? lap[i] : 0;
    double squares = 0, products = 0;
    for (int64_t r = 0; r < kRows; ++r) {
      const double row = rows[r * columns + i % columns], g = all ? grows[r * kNumel + i] : 0;
      squares += row * row, products += row * g;
      expected[r * columns + i % columns] += f1 * g + 2 * f2 * glap[i] * row;
      if (all) expect_close("rows", op, new_rows[r * kNumel + i], f1 * row);
    }
    expect_close("value", op, y[i], derivative[0][i]);
    expect_close("laplacian", op, out[i], f1 * l + f2 * squares);
    expect_close("x_bar", op, x_bar[i],
                 (all ? f1 * gy[i] : 0) + f2 * (products + glap[i] * l) + f3 * glap[i] * squares);
    expect_close("lap_bar", op, lap_bar[i], f1 * glap[i]);
  }
  for (size_t i = 0; i < expected.size(); ++i)
    expect_close("rows_bar", op, rows_bar[i], expected[i]);
}

}  // namespace

int main() {
  for (int op = 0; op < kOps; ++op) {
    check_values(op);
    check_levels(op);
  }
  check_backward<10>(static_cast<int>(Op::kTanh));
  check_backward<40>(static_cast<int>(Op::kGelu));
  check_pairs();
  for (const Op op : {Op::kTanh, Op::kLog})
    for (const int64_t columns : {12, 4})
      for (const bool all : {true, false}) check_laplacian(static_cast<int>(op), columns, all);
  if (failures == 0) std::puts("ok");
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
