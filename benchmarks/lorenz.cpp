// A hand-written loop over Lorenz trajectories, which native solves are held against:
// Dormand-Prince 5(4) in lanes, every trajectory with steps of its own; a lane that is done takes
// the next one. The field and the control are written out for this problem, with all that a general
// solver has left out: no clock but the time left, a power of few digits, no statistics, no output
// but the end.
#include <cstdint>
#include <cstring>

#ifndef REAL
#define REAL double
#endif
typedef REAL V __attribute__((vector_size(64)));
typedef decltype(V{} < V{}) M;
constexpr int W = sizeof(V) / sizeof(REAL);
constexpr bool kDouble = sizeof(REAL) == 8;

static inline void field(const V* y, V* dy) {
  dy[0] = 10 * (y[1] - y[0]);
  dy[1] = y[0] * (28 - y[2]) - y[1];
  dy[2] = y[0] * y[1] - REAL(8. / 3) * y[2];
}

// x^(-1/10) to some 1 %: the logarithm is read off the bits of x, twice improved by Newton's
// method.
static inline V tenth_root_inverse(V x) {
  constexpr double kOne = kDouble ? 4607182418800017408. : 1065353216.;  // the bits of 1
  const V bits = __builtin_convertvector((M)x, V);
  V r = (V) __builtin_convertvector(REAL(1.1 * kOne) - REAL(0.1) * bits, M);
  for (int i = 0; i < 2; ++i) {
    const V r2 = r * r, r4 = r2 * r2;
    r += r * (1 - x * r4 * r4 * r2) * REAL(0.1);
  }
  return r;
}

static inline V smaller(V a, V b) { return a < b ? a : b; }
static inline V absolute(V x) { return x < 0 ? -x : x; }

// y [count, 3] from 0 to `end`; returns the attempted steps, all lanes together.
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
  V y[3] = {}, z[3], k[7][3], left{}, h{};
  int64_t sample[W], next = 0, steps = 0;
  const auto fill = [&](int lane) {
    left[lane] = h[lane] = 0;
    sample[lane] = -1;
    if (next == count) return false;
    sample[lane] = next++;
    for (int d = 0; d < 3; ++d) y[d][lane] = states[3 * sample[lane] + d];
    left[lane] = REAL(end);
    h[lane] = REAL(0.01);
    return true;
  };
  int busy = 0;
  for (int l = 0; l < W; ++l) busy += fill(l);
  field(y, k[0]);
  while (busy > 0) {
    ++steps;
    const V step = smaller(h, left);
#pragma GCC unroll 7
    for (int i = 1; i < 7; ++i) {
      for (int d = 0; d < 3; ++d) {
        V sum = a[i][0] * k[0][d];
#pragma GCC unroll 7
        for (int j = 1; j < i; ++j) sum += a[i][j] * k[j][d];
        z[d] = y[d] + step * sum;
      }
      field(z, k[i]);
    }
    V norm{};
    for (int d = 0; d < 3; ++d) {
      V error{};
#pragma GCC unroll 7
      for (int j = 0; j < 7; ++j) error += e[j] * k[j][d];
      const V before = absolute(y[d]), after = absolute(z[d]);
      error *= step / (REAL(tolerance) * (1 + (before > after ? before : after)));
      norm += error * error * REAL(1. / 3);
    }
    const V factor = REAL(0.9) * tenth_root_inverse(norm + REAL(1e-20));
    const M moved = norm <= 1;
    left = moved ? left - step : left;
    for (int d = 0; d < 3; ++d) {
      y[d] = moved ? z[d] : y[d];
      k[0][d] = moved ? k[6][d] : k[0][d];
    }
    h = step * smaller(factor < REAL(0.2) ? REAL(0.2) + V{} : factor, REAL(10) + V{});
    const M done = left <= 0;
    bool some = false;
    for (int l = 0; l < W; ++l) some |= done[l] != 0;
    if (!some) continue;
    bool filled = false;
    for (int l = 0; l < W; ++l) {
      if (!done[l] || sample[l] < 0) continue;
      for (int d = 0; d < 3; ++d) states[3 * sample[l] + d] = y[d][l];
      --busy;
      if (fill(l)) ++busy, filled = true;
    }
    if (filled) {
      V slope[3];
      field(y, slope);
      const M fresh = left == REAL(end);
      for (int d = 0; d < 3; ++d) k[0][d] = fresh ? slope[d] : k[0][d];
    }
  }
  return steps * W;
}
