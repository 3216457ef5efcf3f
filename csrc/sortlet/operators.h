// The operators, from tensors to a task that `run_as` of the including file runs; cpu.cpp and
// cuda.cu each include this within their namespace.

std::tuple<Tensor, Tensor> sortlet(const Tensor& scores, int64_t kind) {
  const Lists lists("sortlet", scores, kind);
  const Tensor sign = lists.make(false), logabs = lists.make(false);
  run_as(lists, kLog, kind, [&]<typename T>(Task<T>& task) {
    task.sign = out<T>(sign), task.logabs = out<T>(logabs);
  });
  return {sign, logabs};
}

Tensor sortlet_term(const Tensor& scores, const Tensor& shift_, const Tensor& sign_,
                    const Tensor& logabs_, int64_t kind) {
  const Lists lists("sortlet_term", scores, kind);
  const Tensor shift = lists.read("shift", shift_, false), sign = lists.read("sign", sign_, false);
  const Tensor logabs = lists.read("logabs", logabs_, false), value = lists.make(false);
  run_as(lists, kTerm, kind, [&]<typename T>(Task<T>& task) {
    task.shift = in<T>(shift), task.v = in<T>(sign), task.u = in<T>(logabs);
    task.sign = out<T>(value);
  });
  return value;
}

Tensor sortlet_gradient(const Tensor& scores, const Tensor& g_, int64_t kind) {
  const Lists lists("sortlet_gradient", scores, kind);
  const Tensor g = lists.read("g", g_, false), of_scores = lists.make(true);
  run_as(lists, kGradient, kind,
         [&]<typename T>(Task<T>& task) { task.g = in<T>(g), task.of_scores = out<T>(of_scores); });
  return of_scores;
}

std::tuple<Tensor, Tensor> sortlet_hessian(const Tensor& scores, const Tensor& g_, const Tensor& v_,
                                           int64_t kind) {
  const Lists lists("sortlet_hessian", scores, kind);
  const Tensor g = lists.read("g", g_, false), v = lists.read("v", v_, true);
  const Tensor of_g = lists.make(false), of_scores = lists.make(true);
  run_as(lists, kHessian, kind, [&]<typename T>(Task<T>& task) {
    task.g = in<T>(g), task.v = in<T>(v);
    task.of_g = out<T>(of_g), task.of_scores = out<T>(of_scores);
  });
  return {of_g, of_scores};
}

std::tuple<Tensor, Tensor, Tensor> sortlet_laplacian(const Tensor& scores, const Tensor& rows_,
                                                     const Tensor& lap_, int64_t kind) {
  const Lists lists("sortlet_laplacian", scores, kind);
  const Tensor rows = lists.read("rows", rows_, true, true), lap = lists.read("lap", lap_, true);
  const Tensor slopes = lists.make(false, rows.size(0));
  const Tensor of_log = lists.make(false), of_ratio = lists.make(false);
  run_as(lists, kLaplacian, kind, [&]<typename T>(Task<T>& task) {
    task.rows = rows.size(0), task.jacobian = in<T>(rows), task.lap = in<T>(lap);
    task.slopes = out<T>(slopes), task.of_log = out<T>(of_log), task.of_ratio = out<T>(of_ratio);
  });
  return {slopes, of_log, of_ratio};
}

std::tuple<Tensor, Tensor> sortlet_term_gradient(const Tensor& scores, const Tensor& shift_,
                                                 const Tensor& g_, int64_t kind) {
  const Lists lists("sortlet_term_gradient", scores, kind);
  const Tensor shift = lists.read("shift", shift_, false), g = lists.read("g", g_, false);
  const Tensor of_scores = lists.make(true), of_shift = lists.make(false);
  run_as(lists, kTermGradient, kind, [&]<typename T>(Task<T>& task) {
    task.shift = in<T>(shift), task.g = in<T>(g);
    task.of_scores = out<T>(of_scores), task.of_shift = out<T>(of_shift);
  });
  return {of_scores, of_shift};
}

std::tuple<Tensor, Tensor, Tensor> sortlet_term_hessian(const Tensor& scores, const Tensor& shift_,
                                                        const Tensor& g_, const Tensor& v_,
                                                        const Tensor& u_, int64_t kind) {
  const Lists lists("sortlet_term_hessian", scores, kind);
  const Tensor shift = lists.read("shift", shift_, false), g = lists.read("g", g_, false);
  const Tensor v = lists.read("v", v_, true), u = lists.read("u", u_, false);
  const Tensor of_scores = lists.make(true), of_shift = lists.make(false), of_g = lists.make(false);
  run_as(lists, kTermHessian, kind, [&]<typename T>(Task<T>& task) {
    task.shift = in<T>(shift), task.g = in<T>(g), task.v = in<T>(v), task.u = in<T>(u);
    task.of_scores = out<T>(of_scores), task.of_shift = out<T>(of_shift);
    task.of_g = out<T>(of_g);
  });
  return {of_scores, of_shift, of_g};
}

std::tuple<Tensor, Tensor, Tensor> sortlet_term_laplacian(const Tensor& scores,
                                                          const Tensor& shift_, const Tensor& rows_,
                                                          const Tensor& lap_, int64_t kind) {
  const Lists lists("sortlet_term_laplacian", scores, kind);
  const Tensor shift = lists.read("shift", shift_, false);
  const Tensor rows = lists.read("rows", rows_, true, true), lap = lists.read("lap", lap_, true);
  const Tensor value = lists.make(false), slopes = lists.make(false, rows.size(0)),
               of_ratio = lists.make(false);
  run_as(lists, kTermLaplacian, kind, [&]<typename T>(Task<T>& task) {
    task.rows = rows.size(0), task.shift = in<T>(shift);
    task.jacobian = in<T>(rows), task.lap = in<T>(lap);
    task.sign = out<T>(value), task.slopes = out<T>(slopes), task.of_ratio = out<T>(of_ratio);
  });
  return {value, slopes, of_ratio};
}

#define CT_SORTLET_IMPLS(m)                                                        \
  m.impl("sortlet", TORCH_BOX(&ct::sortlet::sortlet));                             \
  m.impl("sortlet_gradient", TORCH_BOX(&ct::sortlet::sortlet_gradient));           \
  m.impl("sortlet_hessian", TORCH_BOX(&ct::sortlet::sortlet_hessian));             \
  m.impl("sortlet_laplacian", TORCH_BOX(&ct::sortlet::sortlet_laplacian));         \
  m.impl("sortlet_term", TORCH_BOX(&ct::sortlet::sortlet_term));                   \
  m.impl("sortlet_term_gradient", TORCH_BOX(&ct::sortlet::sortlet_term_gradient)); \
  m.impl("sortlet_term_hessian", TORCH_BOX(&ct::sortlet::sortlet_term_hessian));   \
  m.impl("sortlet_term_laplacian", TORCH_BOX(&ct::sortlet::sortlet_term_laplacian));
