// A hand-written loop over Lorenz trajectories: Dormand-Prince 5(4), every trajectory with its own
// steps, eight (sixteen) at a time in lanes. What a native solve of the same field is held against.
#include <cmath>
#include <cstdint>

#ifndef REAL
#define REAL double
#endif
constexpr int W = 64 / sizeof(REAL);
typedef REAL V __attribute__((vector_size(64)));

static inline void field(const V* y, V* dy) {
  dy[0] = 10 * (y[1] - y[0]);
  dy[1] = y[0] * (28 - y[2]) - y[1];
  dy[2] = y[0] * y[1] - REAL(8. / 3) * y[2];
}

// y [count, 3] from 0 to `end`; returns the evaluations per trajectory, summed.
extern "C" int64_t lorenz(REAL* states, int64_t count, double end, double tolerance) {
  constexpr REAL a[7][6] = {
      {0},
      {REAL(1. / 5)},
      {REAL(3. / 40), REAL(9. / 40)},
      {REAL(44. / 45), REAL(-56. / 15), REAL(32. / 9)},
      {REAL(19372. / 6561), REAL(-25360. / 2187), REAL(64448. / 6561), REAL(-212. / 729)},
      {REAL(9017. / 3168), REAL(-355. / 33), REAL(46732. / 5247), REAL(49. / 176),
       REAL(-5103. / 18656)},
      {REAL(35. / 384), 0, REAL(500. / 1113), REAL(125. / 192), REAL(-2187. / 6784),
       REAL(11. / 84)}};
  constexpr REAL e[7] = {REAL(35. / 384 - 1951. / 21600),
                         0,
                         REAL(500. / 1113 - 22642. / 50085),
                         REAL(125. / 192 - 451. / 720),
                         REAL(-2187. / 6784 + 12231. / 42400),
                         REAL(11. / 84 - 649. / 6300),
                         REAL(-1. / 60)};
  int64_t evaluations = 0;
  for (int64_t base = 0; base < count; base += W) {
    V y[3], z[3], k[7][3];
    double t[W] = {}, h[W];
    REAL length[W];
    for (int l = 0; l < W; ++l) {
      const int64_t i = base + l < count ? base + l : count - 1;
      for (int d = 0; d < 3; ++d) y[d][l] = states[3 * i + d];
      h[l] = 0.01;
    }
    field(y, k[0]);
    for (bool busy = true; busy;) {
      V step;
      for (int l = 0; l < W; ++l) {
        const double left = end - t[l];
        length[l] = static_cast<REAL>(h[l] < left ? h[l] : left);
        step[l] = length[l];
      }
#pragma GCC unroll 7
      for (int i = 1; i < 7; ++i) {
        for (int d = 0; d < 3; ++d) {
          V sum = a[i][0] * k[0][d];
          for (int j = 1; j < i; ++j) sum += a[i][j] * k[j][d];
          z[d] = y[d] + step * sum;
        }
        field(z, k[i]);
      }
      V norm{};
      for (int d = 0; d < 3; ++d) {
        V error{};
        for (int j = 0; j < 7; ++j) error += e[j] * k[j][d];
        const V before = y[d] < 0 ? -y[d] : y[d], after = z[d] < 0 ? -z[d] : z[d];
        error *= step / (REAL(tolerance) * (1 + (before > after ? before : after)));
        norm += error * error;
      }
      busy = false;
      for (int l = 0; l < W; ++l) {
        if (t[l] >= end) continue;
        evaluations += 6;
        const double error = std::sqrt(norm[l] / 3);
        double factor = 0.9 * std::pow(error, -0.2);
        factor = factor < 0.2 ? 0.2 : factor > 10 ? 10 : factor;
        if (error <= 1) {
          t[l] = h[l] < end - t[l] ? t[l] + length[l] : end;
          for (int d = 0; d < 3; ++d) y[d][l] = z[d][l], k[0][d][l] = k[6][d][l];
        }
        h[l] = length[l] * factor;
        busy |= t[l] < end;
      }
    }
    for (int l = 0; l < W && base + l < count; ++l)
      for (int d = 0; d < 3; ++d) states[3 * (base + l) + d] = y[d][l];
  }
  return evaluations;
}
