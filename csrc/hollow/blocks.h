// Rows through the whole net, a block at a time, forward and backward; part of levels.h.

namespace ct::hollow::CT_MLP_LEVEL {
namespace {

// Memory of one thread, cut into aligned pieces: first counted, then handed out.
template <typename T>
class Memory {
 public:
  T* take(int64_t count) {
    T* piece = data_ == nullptr ? nullptr : data_ + used_;
    used_ += (count + kAlign - 1) / kAlign * kAlign;
    return piece;
  }
  void allocate() {
    const size_t bytes = static_cast<size_t>(used_ > 0 ? used_ : kAlign) * sizeof(T);
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
    if (data_ == nullptr) throw std::bad_alloc();
    std::memset(data_, 0, bytes);
    used_ = 0;
  }
  Memory() = default;
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { std::free(data_); }

 private:
  static constexpr int64_t kAlign = 64 / sizeof(T);
  T* data_ = nullptr;
  int64_t used_ = 0;
};

template <typename T>
constexpr int64_t padded(int64_t count) {
  constexpr int64_t kLanes = Lanes<T>::kCount;
  return (count + kLanes - 1) / kLanes * kLanes;
}

// The nets of one task, one group at a time. Units are padded to whole vectors; weights and biases
// of the padding are zero.
template <typename T>
class Worker {
 public:
  Worker(const Task<T>& task, bool gradient) : task_(task), gradient_(gradient) {
    int64_t widest = 0;
    for (int l = 0; l < task.net.hidden; ++l)
      width_[l] = padded<T>(task.net.width[l]), widest = std::max(widest, width_[l]);
    context_ = padded<T>(task.net.context);
    // a block of twice as many rows, where it stays in the first-level cache
    const int64_t row = (task.order + 1) * widest * static_cast<int64_t>(sizeof(T));
    block_ = row * 32 <= (gradient ? 16384 : 24576) ? 32 : 16;
    plane_ = block_ * widest;
    lay_out();
    memory_.allocate();
    lay_out();
  }

  // Rows first ... last - 1 of a group.
  void forward(int64_t group, int64_t first, int64_t last) {
    load_group(group);
    for (int64_t at = first; at < last; at += block_)
      forward_block(at, std::min(block_, last - at));
  }

  // The same backward; `theta_bar` [parameters] is written.
  void gradient(int64_t group, int64_t first, int64_t last, T* theta_bar) {
    load_group(group);
    clear_bars();
    for (int64_t at = first; at < last; at += block_)
      gradient_block(at, std::min(block_, last - at));
    store_bars(theta_bar);
  }

 private:
  struct Layer {
    T *weight = nullptr, *bias = nullptr;          // [in, out padded], [out padded]
    T* back = nullptr;                             // [out, in padded]
    T *weight_bar = nullptr, *bias_bar = nullptr;  // as the weight, as the bias
    T *y = nullptr, *slope = nullptr;              // planes, kept for the way back
  };

  int hidden() const { return task_.net.hidden; }
  int top() const { return task_.net.hidden - 1; }
  int64_t inputs(int l) const { return l == 0 ? task_.net.context : task_.net.width[l - 1]; }
  int64_t inputs_padded(int l) const { return l == 0 ? context_ : width_[l - 1]; }
  int64_t row_number(int64_t row) const { return row * task_.groups + group_; }

  void lay_out() {
    const int64_t planes = (task_.order + 1) * plane_, orders = task_.order + 1;
    for (int l = 0; l < hidden(); ++l) {
      Layer& layer = layers_[l];
      layer.weight = memory_.take(inputs(l) * width_[l]);
      layer.bias = memory_.take(width_[l]);
      if (!gradient_) continue;
      layer.back = memory_.take(task_.net.width[l] * inputs_padded(l));
      layer.weight_bar = memory_.take(inputs(l) * width_[l]);
      layer.bias_bar = memory_.take(width_[l]);
      if (l == top()) continue;
      layer.y = memory_.take(planes);
      layer.slope = memory_.take(planes);
    }
    line_ = memory_.take(width_[0]), line_bar_ = memory_.take(width_[0]);
    last_ = memory_.take(width_[top()]), last_bar_ = memory_.take(width_[top()]);
    for (T*& planes_of : z_) planes_of = memory_.take(planes);
    x_ = memory_.take(block_);
    g_ = memory_.take(orders * block_);
    sums_ = memory_.take(orders * block_ * Lanes<T>::kCount);
    sum_ = memory_.take(orders * block_);
    of_h_ = memory_.take(gradient_ ? block_ * context_ : 0);
  }

  void load_group(int64_t group) {
    if (group == group_) return;
    group_ = group;
    const T* theta = task_.theta + group * task_.net.parameters;
    for (int l = 0; l < hidden(); ++l) {
      const int64_t units = task_.net.width[l], skip = l == 0 ? 1 : 0, in = inputs(l) + skip;
      const T* from = theta + task_.net.weight[l];
      for (int64_t u = 0; u < units; ++u, from += in) {
        if (l == 0) line_[u] = from[0];
        for (int64_t i = skip; i < in; ++i) layers_[l].weight[(i - skip) * width_[l] + u] = from[i];
        if (gradient_) std::copy(from + skip, from + in, layers_[l].back + u * inputs_padded(l));
      }
      std::copy_n(theta + task_.net.bias[l], units, layers_[l].bias);
    }
    std::copy_n(theta + task_.net.weight[hidden()], task_.net.width[top()], last_);
    last_bias_ = theta[task_.net.bias[hidden()]];
  }

  // z_0 of the first layer, from x and h.
  void enter(int64_t first, int64_t rows, T* z) {
    for (int64_t r = 0; r < rows; ++r) x_[r] = task_.x[row_number(first + r)];
    Product<T> p{task_.h + row_number(first) * task_.net.context,
                 task_.groups * task_.net.context,
                 rows,
                 task_.net.context,
                 layers_[0].weight,
                 width_[0],
                 z};
    p.bias = layers_[0].bias, p.x = x_, p.line = line_;
    product(p);
  }

  // z of a later layer, from the planes y of the one before.
  void layer_up(int l, int64_t rows, const T* y, T* z) {
    for (int k = 0; k <= task_.order; ++k) {
      Product<T> p{y + k * plane_,    width_[l - 1], rows,          inputs(l),
                   layers_[l].weight, width_[l],     z + k * plane_};
      p.bias = k == 0 ? layers_[l].bias : nullptr;
      product(p);
    }
  }

  Pass<T> pass_of(int l, int64_t rows, T* z) {
    Pass<T> p{};
    p.activation = task_.activation, p.param = task_.param, p.order = task_.order;
    p.first = l == 0, p.rows = rows, p.width = width_[l], p.plane = plane_;
    p.line = line_, p.z = z, p.slope = layers_[l].slope;
    p.last = last_, p.sums = sums_, p.g = g_, p.sum_plane = block_, p.last_bar = last_bar_;
    return p;
  }

  void forward_block(int64_t first, int64_t rows) {
    T *z = z_[0], *other = z_[1];
    enter(first, rows, z);
    for (int l = 0; l < top(); ++l) {
      pass<kHidden>(pass_of(l, rows, z));
      layer_up(l + 1, rows, z, other);
      std::swap(z, other);
    }
    pass<kLast>(pass_of(top(), rows, z));
    const int64_t all = task_.groups * task_.rows;
    for (int k = 0; k <= task_.order; ++k) {
      sum_lanes(sums_ + k * block_ * Lanes<T>::kCount, rows, sum_);
      const T bias = k == 0 ? last_bias_ : T(0);
      T* out = task_.out + k * all;
      for (int64_t r = 0; r < rows; ++r) out[row_number(first + r)] = sum_[r] + bias;
    }
  }

  void gradient_block(int64_t first, int64_t rows) {
    const int64_t all = task_.groups * task_.rows;
    for (int k = 0; k <= task_.order; ++k)
      for (int64_t r = 0; r < rows; ++r)
        g_[k * block_ + r] = task_.g[k * all + row_number(first + r)];
    for (int64_t r = 0; r < rows; ++r) last_bias_bar_ += g_[r];
    T *bar = z_[0], *other = z_[1];
    enter(first, rows, top() == 0 ? bar : layers_[0].y);
    for (int l = 0; l < top(); ++l) {
      pass<kKept>(pass_of(l, rows, layers_[l].y));
      layer_up(l + 1, rows, layers_[l].y, l + 1 == top() ? bar : layers_[l + 1].y);
    }
    pass<kGradient>(pass_of(top(), rows, bar));
    for (int l = top(); l > 0; --l) {
      layer_down(l, rows, bar, other);
      std::swap(bar, other);
      backward(pass_of(l - 1, rows, bar));
    }
    leave(first, rows, bar);
  }

  // Cotangents of z of a layer: to those of its parameters, and of the layer before.
  void layer_down(int l, int64_t rows, const T* bar, T* before) {
    const Layer &layer = layers_[l], &below = layers_[l - 1];
    add_rows(bar, rows, width_[l], layer.bias_bar);
    for (int k = 0; k <= task_.order; ++k) {
      outer(Outer<T>{below.y + k * plane_, width_[l - 1], rows, inputs(l), bar + k * plane_,
                     width_[l], layer.weight_bar});
      product(Product<T>{bar + k * plane_, width_[l], rows, task_.net.width[l], layer.back,
                         width_[l - 1], before + k * plane_});
    }
  }

  // The same for the first layer, and x and h.
  void leave(int64_t first, int64_t rows, const T* bar) {
    const int64_t context = task_.net.context, width = width_[0];
    add_rows(bar, rows, width, layers_[0].bias_bar);
    if (task_.order > 0) add_rows(bar + plane_, rows, width, line_bar_);
    outer(Outer<T>{x_, 1, rows, 1, bar, width, line_bar_});
    const T* h = task_.h + row_number(first) * context;
    const int64_t stride = task_.groups * context;
    outer(Outer<T>{h, stride, rows, context, bar, width, layers_[0].weight_bar});
    product(Product<T>{bar, width, rows, task_.net.width[0], layers_[0].back, context_, of_h_});
    dot_rows(bar, rows, width, line_, sums_);
    sum_lanes(sums_, rows, sum_);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = row_number(first + r);
      task_.of_x[row] = sum_[r];
      std::copy_n(of_h_ + r * context_, context, task_.of_h + row * context);
    }
  }

  static void add_rows(const T* x, int64_t rows, int64_t width, T* sum) {
    for (int64_t at = 0; at < width; at += Lanes<T>::kCount) {
      Vector<T> total{};
      for (int64_t r = 0; r < rows; ++r) total += load<T>(x + r * width + at);
      store<T>(sum + at, load<T>(sum + at) + total);
    }
  }

  static void dot_rows(const T* x, int64_t rows, int64_t width, const T* weight, T* sums) {
    for (int64_t r = 0; r < rows; ++r) {
      Vector<T> total{};
      for (int64_t at = 0; at < width; at += Lanes<T>::kCount)
        total += load<T>(x + r * width + at) * load<T>(weight + at);
      store<T>(sums + r * Lanes<T>::kCount, total);
    }
  }

  void clear_bars() {
    for (int l = 0; l < hidden(); ++l) {
      std::fill_n(layers_[l].weight_bar, inputs(l) * width_[l], T(0));
      std::fill_n(layers_[l].bias_bar, width_[l], T(0));
    }
    std::fill_n(line_bar_, width_[0], T(0));
    std::fill_n(last_bar_, width_[top()], T(0));
    last_bias_bar_ = 0;
  }

  void store_bars(T* theta) const {
    for (int l = 0; l < hidden(); ++l) {
      const int64_t units = task_.net.width[l], skip = l == 0 ? 1 : 0, in = inputs(l) + skip;
      T* to = theta + task_.net.weight[l];
      for (int64_t u = 0; u < units; ++u, to += in) {
        if (l == 0) to[0] = line_bar_[u];
        for (int64_t i = skip; i < in; ++i)
          to[i] = layers_[l].weight_bar[(i - skip) * width_[l] + u];
      }
      std::copy_n(layers_[l].bias_bar, units, theta + task_.net.bias[l]);
    }
    std::copy_n(last_bar_, task_.net.width[top()], theta + task_.net.weight[hidden()]);
    theta[task_.net.bias[hidden()]] = last_bias_bar_;
  }

  const Task<T>& task_;
  bool gradient_;
  Memory<T> memory_;
  Layer layers_[kMaxHidden];
  int64_t width_[kMaxHidden] = {}, context_ = 0, block_ = 0, plane_ = 0, group_ = -1;
  T *line_ = nullptr, *line_bar_ = nullptr, *last_ = nullptr, *last_bar_ = nullptr;
  T* z_[2] = {};
  T *x_ = nullptr, *g_ = nullptr, *sums_ = nullptr, *sum_ = nullptr, *of_h_ = nullptr;
  T last_bias_ = 0, last_bias_bar_ = 0;
};

// Chunks first ... last - 1 of all groups, the chunks of a group in a row.
template <typename T>
void forward_chunks(const Task<T>& task, int64_t first, int64_t last) {
  const Chunks chunks(task.groups, task.rows);
  Worker<T> worker(task, false);
  for (int64_t i = first; i < last; ++i) {
    const int64_t chunk = i % chunks.count;
    worker.forward(i / chunks.count, chunks.first(chunk), chunks.last(chunk));
  }
}

// The gradient in theta of each chunk goes to `partial` [groups * chunks, parameters].
template <typename T>
void gradient_chunks(const Task<T>& task, int64_t first, int64_t last, T* partial) {
  const Chunks chunks(task.groups, task.rows);
  Worker<T> worker(task, true);
  for (int64_t i = first; i < last; ++i) {
    const int64_t chunk = i % chunks.count;
    worker.gradient(i / chunks.count, chunks.first(chunk), chunks.last(chunk),
                    partial + i * task.net.parameters);
  }
}

template <typename T>
Loops<T> loops() {
  return {&forward_chunks<T>, &gradient_chunks<T>};
}

}  // namespace
}  // namespace ct::hollow::CT_MLP_LEVEL
