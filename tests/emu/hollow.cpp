// The kernels of hollow nets for CUDA, run on the CPU and compared with plain loops and with
// differences of these.
#include "cuda_emu.h"
//
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "hollow/cuda_kernels.h"

using namespace ct::hollow;

namespace {

using Numbers = std::vector<double>;

int failures = 0;

void expect_close(const char* what, double actual, double expected, double tolerance) {
  if (std::fabs(actual - expected) <= tolerance * (1 + std::fabs(expected))) return;
  std::printf("%s: got %.17g, expected %.17g\n", what, actual, expected);
  ++failures;
}

Numbers waves(int64_t count, double phase, double size) {
  Numbers x;
  for (int64_t i = 0; i < count; ++i) x.push_back(size * std::sin(phase + 0.7 * i));
  return x;
}

// An activation of a series, by its differential equation.
Numbers applied(Activation activation, const Numbers& z) {
  Numbers y(z.size()), slope(z.size());
  for (size_t k = 0; k < z.size(); ++k) {
    if (k == 0) {
      y[0] = activation == Activation::kTanh ? std::tanh(z[0]) : std::exp(z[0]);
    } else {
      for (size_t j = 1; j <= k; ++j) y[k] += j * z[j] * slope[k - j] / k;
    }
    slope[k] = activation == Activation::kTanh ? (k == 0 ? 1.0 : 0.0) : y[k];
    if (activation != Activation::kTanh) continue;
    for (size_t j = 0; j <= k; ++j) slope[k] -= y[j] * y[k - j];
  }
  return y;
}

struct Problem {
  Problem(int64_t groups, int64_t rows, std::vector<int64_t> widths, int64_t context, int order,
          Activation activation) {
    Net& net = task.net;
    net.hidden = static_cast<int>(widths.size()), net.context = context;
    for (size_t l = 0; l < widths.size(); ++l) net.width[l] = widths[l], units += widths[l];
    for (int l = 0; l <= net.hidden; ++l) {
      net.weight[l] = net.parameters;
      net.bias[l] = net.weight[l] + net.outputs(l) * net.inputs(l);
      net.parameters = net.bias[l] + net.outputs(l);
    }
    task.activation = activation, task.order = order, task.groups = groups, task.rows = rows;
    x = waves(groups * rows, 1, 1), h = waves(groups * rows * context, 2, 1);
    theta = waves(groups * net.parameters, 3, 0.6), g = waves((order + 1) * groups * rows, 4, 1);
    out.assign(g.size(), -7), of_x.assign(x.size(), -7), of_h.assign(h.size(), -7);
    of_theta.assign(theta.size(), 0);
    task.x = x.data(), task.h = h.data(), task.theta = theta.data(), task.g = g.data();
    task.out = out.data(), task.of_x = of_x.data(), task.of_h = of_h.data();
    task.of_theta = of_theta.data();
  }

  // One row, by loops.
  Numbers serial(int64_t group, int64_t row) const {
    const Net& net = task.net;
    const int64_t number = row * task.groups + group;
    const double* own = &theta[group * net.parameters];
    std::vector<Numbers> inputs(1 + net.context, Numbers(task.order + 1, 0.0));
    inputs[0][0] = x[number];
    if (task.order > 0) inputs[0][1] = 1;
    for (int64_t i = 0; i < net.context; ++i) inputs[1 + i][0] = h[number * net.context + i];
    for (int l = 0; l <= net.hidden; ++l) {
      std::vector<Numbers> outputs;
      for (int64_t u = 0; u < net.outputs(l); ++u) {
        Numbers z(task.order + 1, 0.0);
        z[0] = own[net.bias[l] + u];
        for (size_t i = 0; i < inputs.size(); ++i)
          for (int k = 0; k <= task.order; ++k)
            z[k] += own[net.weight[l] + u * inputs.size() + i] * inputs[i][k];
        outputs.push_back(l < net.hidden ? applied(task.activation, z) : z);
      }
      inputs = outputs;
    }
    return inputs[0];
  }

  double loss() const {
    double total = 0;
    for (int64_t group = 0; group < task.groups; ++group)
      for (int64_t row = 0; row < task.rows; ++row) {
        const Numbers found = serial(group, row);
        for (int k = 0; k <= task.order; ++k)
          total += found[k] * g[(k * task.rows + row) * task.groups + group];
      }
    return total;
  }

  double difference(double& at) const {
    const double before = at, step = 1e-5;
    at = before + step;
    const double above = loss();
    at = before - step;
    const double below = loss();
    at = before;
    return (above - below) / (2 * step);
  }

  Task<double> task;
  int64_t units = 0;
  Numbers x, h, theta, g, out, of_x, of_h, of_theta;
};

// In two launches, so that rows have others before them.
template <typename Body>
void in_two(const Problem& p, int parts, const Body& body) {
  const int planes = planes_of(p.task.order);
  Numbers kept(p.units * planes * parts * p.task.groups * p.task.rows);
  const int64_t first = p.task.rows * 2 / 3;
  body(Rows<double>{p.task, 0, first, kept.data(), planes, parts});
  body(Rows<double>{p.task, first, p.task.rows - first, kept.data(), planes, parts});
}

void check_forward(int64_t groups, int64_t rows, std::vector<int64_t> widths, int64_t context,
                   int order, Activation activation) {
  Problem p(groups, rows, widths, context, order, activation);
  in_two(p, 1, [](const Rows<double>& part) {
    CT_LAUNCH(forward_kernel<double>, dim3(2, 2), kThreads, 0, nullptr, part);
  });
  for (int64_t group = 0; group < groups; ++group)
    for (int64_t row = 0; row < rows; ++row) {
      const Numbers expected = p.serial(group, row);
      for (int k = 0; k <= order; ++k)
        expect_close("value", p.out[(k * rows + row) * groups + group], expected[k], 1e-12);
    }
}

void check_gradient(int64_t groups, int64_t rows, std::vector<int64_t> widths, int64_t context,
                    int order, Activation activation) {
  Problem p(groups, rows, widths, context, order, activation);
  in_two(p, 2, [](const Rows<double>& part) {
    CT_LAUNCH(gradient_kernel<double>, dim3(2, 2), kThreads, 0, nullptr, part);
    CT_LAUNCH(parameter_kernel<double>, 3, kThreads, 0, nullptr, part);
  });
  for (size_t i = 0; i < p.x.size(); ++i)
    expect_close("of_x", p.of_x[i], p.difference(p.x[i]), 1e-7);
  for (size_t i = 0; i < p.h.size(); ++i)
    expect_close("of_h", p.of_h[i], p.difference(p.h[i]), 1e-7);
  for (size_t i = 0; i < p.theta.size(); ++i)
    expect_close("of_theta", p.of_theta[i], p.difference(p.theta[i]), 1e-7);
}

}  // namespace

int main() {
#ifdef EMU_WITHOUT_BARRIER
  check_forward(1, 300, {3}, 2, 1, Activation::kTanh);
  return EXIT_SUCCESS;
#endif
  check_forward(3, 300, {3}, 2, 0, Activation::kTanh);
  check_forward(1, 7, {3, 4}, 2, 3, Activation::kTanh);
  check_forward(2, 7, {4, 2, 3}, 0, 6, Activation::kExp);
  check_forward(2, 9, {40, 60}, 1, 1, Activation::kTanh);  // more than shared memory takes
  check_gradient(3, 9, {3}, 2, 1, Activation::kTanh);
  check_gradient(1, 7, {3, 4}, 1, 4, Activation::kTanh);
  check_gradient(2, 5, {2, 3, 2}, 0, 2, Activation::kExp);
  check_gradient(1, 150, {2}, 1, 0, Activation::kExp);
  if (failures == 0) std::puts("ok");
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
