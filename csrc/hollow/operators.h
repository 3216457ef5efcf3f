// The operators, from tensors to tasks that `run_forward` and `run_gradient` of the including file
// run; cpu.cpp and cuda.cu each include this within their namespace.

Tensor hollow_transform(const Tensor& x, const Tensor& h, const Tensor& theta,
                        std::vector<int64_t> widths, int64_t activation, double param,
                        int64_t order) {
  const Arguments a("hollow_transform", x, h, theta, widths, activation, order);
  Tensor out = a.new_stack();
  if (!a.any()) return out;
  dispatch_floating(a.dtype, a.op, [&](auto zero) {
    using T = decltype(zero);
    Task<T> task = a.task<T>(param);
    task.out = out.mutable_data_ptr<T>();
    run_forward(task, a.x);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> hollow_gradient(const Tensor& g_, const Tensor& x,
                                                   const Tensor& h, const Tensor& theta,
                                                   std::vector<int64_t> widths, int64_t activation,
                                                   double param, int64_t order) {
  const Arguments a("hollow_gradient", x, h, theta, widths, activation, order);
  const Tensor g = a.stack("g", g_);
  Tensor of_x = new_like(a.x), of_h = new_like(a.h), of_theta = new_like(a.theta);
  if (!a.any()) return {of_x, of_h, torch::stable::fill_(of_theta, 0.0)};
  dispatch_floating(a.dtype, a.op, [&](auto zero) {
    using T = decltype(zero);
    Task<T> task = a.task<T>(param);
    task.g = g.const_data_ptr<T>(), task.of_x = of_x.mutable_data_ptr<T>();
    task.of_h = of_h.mutable_data_ptr<T>(), task.of_theta = of_theta.mutable_data_ptr<T>();
    run_gradient(task, of_theta);
  });
  return {of_x, of_h, of_theta};
}
