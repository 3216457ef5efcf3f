// The arithmetic of gaps between sorted scores, for CPU and GPU alike: all of it in double, and
// without branches, so that a loop over lanes becomes vector instructions.
//
// phi is the function of a gap g: g itself, or tanh(g); `slope` is phi'/phi, `curve` is phi''/phi.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../core/hd.h"

// Inlined in any case: a copy of its own would be compiled for the least instruction set.
#if defined(__CUDACC__)
#define CT_GAP CT_HD
#else
#define CT_GAP __attribute__((always_inline)) inline
#endif

namespace ct::sortlet {

enum Kind : int { kLinear, kTanh, kKinds };

// A smaller gap counts as this in derivatives of the logarithm, and as a tie in those of a term: no
// power of 1 / gap overflows.
constexpr double kSmall = 1e-150;
constexpr double kLargest = 1.7976931348623157e308;

CT_GAP int64_t bits_of(double x) {
  int64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

CT_GAP double double_of(int64_t bits) {
  double x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

constexpr int64_t kMantissaBits = 0x000fffffffffffff, kOneBits = 0x3ff0000000000000;
constexpr double kLn2 = 0.69314718055994530942;

// log(mantissa * 2^exponent) of a normal mantissa: 2 atanh((m - 1) / (m + 1)), m near 1.
CT_GAP double log_of(double mantissa, int64_t exponent) {
  const int64_t bits = bits_of(mantissa);
  double m = double_of((bits & kMantissaBits) | kOneBits);
  const bool high = m > 1.4142135623730951;
  m = high ? 0.5 * m : m;
  const int64_t power = exponent + ((bits >> 52) & 0x7ff) - 1023 + (high ? 1 : 0);
  // To double by the bits of 2^52 + 2^51, since AVX2 converts no int64.
  const double e = double_of(power + 0x4338000000000000) - 6755399441055744.0;
  const double z = (m - 1) / (m + 1), z2 = z * z;
  double sum = 1.0 / 23 * z2 + 1.0 / 21;  // written out: a loop would hide it from vectorization
  sum = sum * z2 + 1.0 / 19;
  sum = sum * z2 + 1.0 / 17;
  sum = sum * z2 + 1.0 / 15;
  sum = sum * z2 + 1.0 / 13;
  sum = sum * z2 + 1.0 / 11;
  sum = sum * z2 + 1.0 / 9;
  sum = sum * z2 + 1.0 / 7;
  sum = sum * z2 + 1.0 / 5;
  sum = sum * z2 + 1.0 / 3;
  return e * kLn2 + (2 * z + 2 * z * z2 * sum);
}

// A product of positive numbers that neither overflows nor underflows.
struct Product {
  double mantissa = 1;
  int64_t exponent = 0;

  // x is normal and finite; at most 1000 factors between calls of `settle`.
  CT_GAP void times(double x) {
    const int64_t bits = bits_of(x);
    mantissa *= double_of((bits & kMantissaBits) | kOneBits);
    exponent += (bits >> 52) - 1023;
  }

  CT_GAP void settle() {
    const int64_t bits = bits_of(mantissa);
    mantissa = double_of((bits & kMantissaBits) | kOneBits);
    exponent += (bits >> 52) - 1023;
  }

  CT_GAP double log() const { return log_of(mantissa, exponent); }
};

// exp(y) and 1 - exp(y), each to full relative precision, for -700 <= y <= 0.
CT_GAP void exp_pair(double y, double& exp_y, double& rest) {
  const double shifted = y * 1.4426950408889634 + 6755399441055744.0;
  const double k = shifted - 6755399441055744.0;
  const double r = (y - k * 0.69314718036912382) - k * 1.9082149292705877e-10;
  double p = r * (1.0 / 6227020800) + 1.0 / 479001600;
  p = p * r + 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 1.0 / 2;
  p = r + r * r * p;  // exp(r) - 1
  const double power = double_of((bits_of(shifted) + 1023) << 52);
  exp_y = power + power * p;
  rest = (1 - power) - power * p;
}

struct GapValues {
  double phi, slope, curve;
};

// Of a gap from kSmall to kLargest.
template <int kKind>
CT_GAP GapValues values_of(double gap) {
  if constexpr (kKind == kLinear) return {gap, 1 / gap, 0};
  const double y = -2 * gap;
  double t, rest;
  exp_pair(y < -700 ? -700 : y, t, rest);
  const double both = 1 + t;
  return {rest / both, 4 * t / (rest * both), -8 * t / (both * both)};
}

template <int kKind>
CT_GAP double phi_of(double gap) {
  return values_of<kKind>(gap).phi;
}

// The second derivative of log phi.
template <int kKind>
CT_GAP double log_curve(const GapValues& v) {
  return kKind == kLinear ? -v.slope * v.slope : v.curve - v.slope * v.slope;
}

// Whether a gap needs none of the conventions: neither tied nor tiny, neither infinite nor NaN.
CT_GAP bool is_plain(double gap) { return gap >= kSmall && gap <= kLargest; }

}  // namespace ct::sortlet
