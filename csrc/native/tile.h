// A tile: W samples in lanes with one attempted Runge-Kutta step. `Field` is the vector field of
// one sample and `Method` the tableau, both made of constants.
#pragma once

#include "control.h"
#include "one_sample.h"
#include "values.h"

namespace ct::native {

// body(0), ..., body(N - 1), unrolled where that is little.
template <long N, class Body>
CT_LANES void for_each(const Body& body) {
  if constexpr (N <= 8) {
    [&]<long... I>(std::integer_sequence<long, I...>)
        __attribute__((always_inline)) { (body(I), ...); }(std::make_integer_sequence<long, N>{});
  } else {
    for (long i = 0; i < N; ++i) body(i);
  }
}

// The same with the index as a constant.
template <int kBegin, int kEnd, class Body>
CT_LANES void for_constants(const Body& body) {
  if constexpr (kBegin < kEnd) {
    body(std::integral_constant<int, kBegin>{});
    for_constants<kBegin + 1, kEnd>(body);
  }
}

// A field that is worth inlining.
template <class Field>
constexpr bool kSmall = Field::work <= 64 && Field::dim <= 8;

// Samples side by side. A step of a small field is a chain of dependent operations, which samples
// in several registers hide from each other; in a large one a weight that was read serves them all.
template <class Field, int kRegisters>
constexpr int kSamples = kRegister<typename Field::real> * kRegisters;

// The same for the gradient.
template <class Field, int kRegisters>
constexpr int kSamplesBack = kSamples < Field,
              kSmall<Field> ? 1 : kRegisters > ;

// A field whose derivative comes in two parts: Field::record, with the slope, and Field::pull. Not
// a small one, of which the gradient takes fewer samples side by side than the solve.
template <class Field>
constexpr bool kRecords = !kSmall<Field> && requires { Field::kept; };

// What the derivative of an evaluation reads, in this order: the state, and what record keeps.
template <class Field>
constexpr long kRecord = [] {
  if constexpr (kRecords<Field>)
    return Field::dim + Field::kept;
  else
    return Field::dim;
}();

// Scratch of the slope.
template <class Field, class Method>
constexpr long kScratch = [] {
  if constexpr (kRecords<Field> && Method::gradient)
    return Field::work > Field::record_work ? Field::work : Field::record_work;
  else
    return Field::work;
}();

template <class Field_, class Method_, int W>
struct Tile {
  using Field = Field_;
  using Method = Method_;
  using real = typename Field::real;
  using V = Lanes<real, W>;
  using D = Lanes<double, W>;
  using E = std::conditional_t<W == 1, D, V>;  // of error norms
  static constexpr long dim = Field::dim;
  static constexpr int stages = Method::stages, total = Method::total;
  static constexpr int evaluated = Method::late ? stages - 1 : stages;  // before the judgement

  V y[dim], y1[dim], k[total][dim], at[dim];
  V own[Field::own > 0 ? Field::own : 1];
  alignas(kRegisterBytes) alignas(V) V work[kScratch<Field, Method> + 1];
  Arrays<Field, W> shared;
  V* records = nullptr;  // [stages, kRecord] where the evaluations of a step are kept, or null
  const void* const* norm_shared;

  CT_LANES void evaluate(V t, const V* state, V* slope) {
    if constexpr (kSmall<Field>)
      Field::eval(t, state, own, shared.all, work, slope);
    else
      evaluate_apart(t, state, slope);
  }

  CT_BOTH __attribute__((noinline)) void evaluate_apart(V t, const V* state, V* slope) {
    Field::eval(t, state, own, shared.all, work, slope);
  }

  // The slope, and what its derivative reads.
  __attribute__((noinline)) void record(V t, const V* state, V* to, V* slope) {
    if (to != state)
      for (long d = 0; d < dim; ++d) to[d] = state[d];
    Field::record(t, state, own, shared.all, work, to + dim, slope);
  }

  template <int I>
  CT_LANES void evaluate_stage(V t, const V* state) {
    if constexpr (kRecords<Field> && Method::gradient)
      if (records != nullptr) return record(t, state, records + I * kRecord<Field>, k[I]);
    evaluate(t, state, k[I]);
  }

  // ---- the step
  // ----------------------------------------------------------------------------------------------

  // sum_j weights[j] k[j][d] over the nonzero weights among the first kCount, in their order.
  template <int kCount, class Weights>
  CT_LANES V weighted(const Weights& weights, long d) const {
    V sum{};
    for_constants<0, kCount>([&](auto j) __attribute__((always_inline)) {
      if (weights(j) != 0) sum += k[j][d] * static_cast<real>(weights(j));
    });
    return sum;
  }

  // Time of stage i.
  template <int I, class H>
  CT_LANES V stage_time(D t, H h, V before_end) const {
    constexpr double c = Method::c[I];
    if constexpr (c == 1)
      return before_end;
    else
      return convert<V>(c == 0 ? t : t + c * convert<D>(h));
  }

  template <int I>
  CT_LANES void stage_state(V h, V* to) const {
    for_each<dim>([&](long d) __attribute__((always_inline)) {
      to[d] = y[d] + h * weighted<I>([](auto j) { return Method::a[I][j]; }, d);
    });
  }

  // All stages from y, with the first slope in k[0], and y1; not a late last one. The length h is
  // in the precision of the state or of time.
  template <class H>
  CT_LANES void attempt(D t, H h, V end_time) {
    const V step = convert<V>(h);
    constexpr int kInner = Method::fsal ? stages - 1 : stages;
    for_constants<1, kInner>([&](auto i) __attribute__((always_inline)) {
      stage_state<i>(step, at);
      evaluate_stage<i>(stage_time<i>(t, h, end_time), at);
    });
    if constexpr (Method::fsal) {
      stage_state<stages - 1>(step, y1);
      if constexpr (!Method::late)
        evaluate_stage<stages - 1>(stage_time<stages - 1>(t, h, end_time), y1);
    } else {
      for_each<dim>([&](long d) __attribute__((always_inline)) {
        y1[d] = y[d] + step * weighted<stages>([](auto j) { return Method::b[j]; }, d);
      });
    }
  }

  template <class H>
  CT_LANES void evaluate_late(D t, H h, V end_time) {
    if constexpr (Method::late)
      evaluate_stage<stages - 1>(stage_time<stages - 1>(t, h, end_time), y1);
  }

  // The stages that only the interpolant reads.
  template <class H>
  CT_LANES void extend(D t, H h, V end_time) {
    const V step = convert<V>(h);
    for_constants<stages, total>([&](auto i) __attribute__((always_inline)) {
      stage_state<i>(step, at);
      evaluate(stage_time<i>(t, h, end_time), at, k[i]);
    });
  }

  // The interpolant at theta, to `at`.
  CT_LANES void interpolate(D theta, V h) {
    V weight[total];
    for_constants<0, total>([&](auto i) __attribute__((always_inline)) {
      D sum{};
      for_constants<0, Method::degree>([&](auto m) __attribute__((always_inline)) {
        // GPUs have no such array, only its numbers
        constexpr double p = Method::p[decltype(i)::value][Method::degree - 1 - decltype(m)::value];
        sum = sum * theta + p;
      });
      weight[i] = convert<V>(sum * theta);
    });
    for_each<dim>([&](long d) __attribute__((always_inline)) {
      V sum{};
      for_constants<0, total>([&](auto i)
                                  __attribute__((always_inline)) { sum += weight[i] * k[i][d]; });
      at[d] = y[d] + h * sum;
    });
  }

  // ---- norms
  // -------------------------------------------------------------------------------------------------

  // An element of the state is a number, or a complex one: the pair d, d + 1.
  static constexpr long numbers = Method::pairs ? 2 : 1;

  CT_LANES static V modulus(V re, V im) {
    const V a = abs(re), b = abs(im), large = select(a > b, a, b), small = select(a > b, b, a);
    const V ratio = small / select(large == V{}, all<V>(1), large);
    return large * sqrt(ratio * ratio + 1);
  }

  // The size of the element to which number d belongs.
  CT_LANES static V size_at(const V* state, long d) {
    return Method::pairs ? modulus(state[d & ~1L], state[d | 1L]) : abs(state[d]);
  }

  // With element e of scaled(d): the larger of the sizes, or the sum of the squares.
  template <class Scaled>
  CT_LANES static V taken_in(V total, const Scaled& scaled, long e) {
    const V x = scaled(e * numbers);
    if constexpr (Method::pairs) {
      const V y = scaled(e * numbers + 1);
      return Method::maximum ? larger(total, modulus(x, y)) : total + (x * x + y * y);
    } else {
      return Method::maximum ? larger(total, abs(x)) : total + x * x;
    }
  }

  // Root mean square (or maximum) of scaled(d) over the elements, or its square; of several
  // segments the largest. Or what the user takes.
  template <bool kSquare = false, class Scaled>
  CT_LANES E norm(const Scaled& scaled) const {
    if constexpr (Method::Norm::count > 0) {
      V ratio[dim], result;
      for_each<dim>([&](long d) __attribute__((always_inline)) { ratio[d] = scaled(d); });
      evaluate_values<typename Method::Norm>(V{}, ratio, norm_shared, &result);
      const E size = convert<E>(abs(result));
      return kSquare ? size * size : size;
    }
    E largest{};
    for_constants<0, Method::segments>([&](auto s) __attribute__((always_inline)) {
      constexpr long begin = Method::segment[s] / numbers;
      constexpr long length = Method::segment[s + 1] / numbers - begin;
      if constexpr (length > 0) {
        V total{};
        for_each<length>([&](long e) __attribute__((always_inline)) {
          total = taken_in(total, scaled, begin + e);
        });
        E part = convert<E>(total);
        if constexpr (Method::maximum && kSquare)
          part = part * part;
        else if constexpr (!Method::maximum && kSquare)  // a division takes as long as a stage
          part = part * static_cast<Number<E>>(1.0 / length);
        else if constexpr (!Method::maximum)
          part = sqrt(part / static_cast<Number<E>>(length));
        largest = Method::segments == 1 ? part : larger(largest, part);
      }
    });
    return rounded(largest);
  }

  // The larger one; NaN where either is NaN.
  template <class X>
  CT_LANES static X larger(X a, X b) {
    return select((a > b) | (a != a), a, b);
  }

  // In the precision of the state, as the kernels of the eager solver return it.
  CT_LANES static E rounded(E x) { return convert<E>(convert<V>(x)); }

  // Numbers, or arrays for each element.
  struct Tolerances {
    static constexpr long count = Method::tolerances ? dim : 1;
    V rtol[count], atol[count];

    CT_LANES V scale(long d, V size) const {
      return Method::tolerances ? size * rtol[d] + atol[d] : size * rtol[0] + atol[0];
    }
  };

  CT_LANES V scaled_error(const Tolerances& tolerances, V h, long d) const {
    constexpr int kCount = Method::late ? stages - 1 : stages;
    const V error = h * weighted<kCount>([](auto j) { return Method::e[j]; }, d);
    const V before = size_at(y, d), after = size_at(y1, d);
    return error / tolerances.scale(d, select(before > after, before, after));
  }

  // The largest error of the last attempt, and the number that has it; no shorter step would make
  // one finite that is not. As for messages of the eager solver.
  CT_BOTH double largest_error(const Tolerances& tolerances, int lane, int64_t& number) const {
    double largest = -1;
    if constexpr (Method::fsal)
      for (long d = 0; d < dim; ++d) {
        constexpr int kCount = Method::late ? stages - 1 : stages;
        const V error = weighted<kCount>([](auto j) { return Method::e[j]; }, d);
        const V scaled = error / tolerances.scale(d, size_at(y, d));
        const double found = std::abs(static_cast<double>(peek(scaled, lane)));
        const double size = found < kInfinity ? found : kInfinity;
        if (size > largest) largest = size, number = d;
      }
    return largest;
  }

  // The square of the norm: a root takes longer than a stage of a small field, and is not needed
  // to judge a step.
  template <class H>
  CT_LANES E squared_error(const Tolerances& tolerances, H h) const {
    const V step = convert<V>(h);
    return norm<true>(
        [&](long d) __attribute__((always_inline)) { return scaled_error(tolerances, step, d); });
  }
};

}  // namespace ct::native
