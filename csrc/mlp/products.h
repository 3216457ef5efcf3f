// Matrix products whose right factor lies in panels: a few rows by a panel of columns at a time,
// all sums in registers. Part of levels.h.
//
// A panel is two vectors of columns wide, the last one perhaps one vector; it has the columns'
// elements of each term beside each other, and zeros where columns are missing. Only the factor
// that many products share is laid out anew: rows of the left one are read where they are.

namespace ct::mlp::CT_MLP_LEVEL {
namespace {

constexpr int kTileRows = CT_MLP_BYTES == 64 ? 14 : 6;  // 2 kTileRows + 3 registers, of 32 or 16
constexpr int64_t kTileTerms = 256;                     // a panel's, which then fit the first cache

template <typename T>
constexpr int kPanelColumns = 2 * Lanes<T>::kCount;

// How many columns there are in memory.
template <typename T>
int64_t padded(int64_t columns) {
  return (columns + Lanes<T>::kCount - 1) / Lanes<T>::kCount * Lanes<T>::kCount;
}

// Vectors of the panel that begins at a column.
template <typename T>
CT_MLP_INLINE int panel_vectors(int64_t column, int64_t columns) {
  return columns - column > Lanes<T>::kCount ? 2 : 1;
}

// A square of rows becomes its transpose.
template <typename T>
CT_MLP_INLINE void transpose(Vector<T>* rows) {
  constexpr int kLanes = Lanes<T>::kCount;
  CT_MLP_EACH for (int step = 1; step < kLanes; step *= 2) {
    Integer<T> low{}, high{};
    CT_MLP_EACH for (int i = 0; i < kLanes; ++i) {
      low[i] = i & step ? kLanes + i - step : i;
      high[i] = i & step ? kLanes + i : i + step;
    }
    CT_MLP_EACH for (int i = 0; i < kLanes; ++i) {
      if (i & step) continue;
      const Vector<T> a = rows[i], b = rows[i + step];
      rows[i] = __builtin_shuffle(a, b, low);
      rows[i + step] = __builtin_shuffle(a, b, high);
    }
  }
}

// One vector of columns of w [columns, terms], to be the rows of a panel.
template <typename T>
void pack_across(const PackTask<T>& task, int64_t column, T* to, int64_t width) {
  constexpr int kLanes = Lanes<T>::kCount;
  const int count = lanes_from<T>(column, task.columns);
  const T* from = task.from + column * task.terms;
  for (int64_t t = 0; t < task.terms; t += kLanes) {
    const int terms = lanes_from<T>(t, task.terms);
    // short pieces of many rows: left to itself, the machine does not fetch them in time
    CT_MLP_EACH for (int i = 0; i < kLanes; ++i)
        __builtin_prefetch(from + i * task.terms + t + 3 * kLanes);
    Vector<T> square[kLanes];
    CT_MLP_EACH for (int i = 0; i < kLanes; ++i) square[i] =
        i < count ? load<T>(from + i * task.terms + t, terms) : Vector<T>{};
    transpose<T>(square);
    CT_MLP_EACH for (int i = 0; i < kLanes; ++i) if (i < terms)
        store<T>(to + (t + i) * width, square[i]);
  }
}

// The same of w [terms, columns].
template <typename T>
void pack_along(const PackTask<T>& task, int64_t column, T* to, int64_t width) {
  const int count = lanes_from<T>(column, task.columns);
  for (int64_t t = 0; t < task.terms; ++t)
    store<T>(to + t * width, load<T>(task.from + t * task.columns + column, count));
}

template <typename T>
void pack(const PackTask<T>& task) {
  constexpr int kLanes = Lanes<T>::kCount;
  T* to = task.to;
  for (int64_t c = 0; c < task.columns; c += kPanelColumns<T>) {
    const int vectors = panel_vectors<T>(c, task.columns);
    for (int v = 0; v < vectors; ++v) {
      const auto vector = task.transposed ? pack_across<T> : pack_along<T>;
      vector(task, c + v * kLanes, to + v * kLanes, vectors * kLanes);
    }
    to += task.terms * vectors * kLanes;
  }
}

// Some rows by one panel.
template <typename T>
struct Tile {
  int64_t terms, chain;
  int64_t row, out_row;  // rows of a and out are so far apart
  const T *a, *panel;
  T* out;
  int64_t columns;  // of out
  T alpha;
  bool add;
  const T* bias;   // of the panel's columns
  int64_t biased;  // how many of the rows it is added to
};

// Sums of a chain are in registers, those of the chains before in the first cache.
template <int kRows, int kVectors, typename T>
__attribute__((noinline)) void tile(const Tile<T>& task) {
  constexpr int kLanes = Lanes<T>::kCount;
  Vector<T> sum[kRows][kVectors], total[kRows][kVectors] = {};
  const T *a = task.a, *panel = task.panel;
  const int64_t row = task.row;
  for (int64_t t = 0; t < task.terms;) {
    const int64_t rest = task.terms - t, end = t + (rest < task.chain ? rest : task.chain);
    CT_MLP_EACH for (int r = 0; r < kRows; ++r) {
      CT_MLP_EACH for (int v = 0; v < kVectors; ++v) {
        if (t > 0) total[r][v] += sum[r][v];
        sum[r][v] = Vector<T>{};
      }
    }
    for (; t < end; ++t, panel += kVectors * kLanes) {
      Vector<T> b[kVectors];
      CT_MLP_EACH for (int v = 0; v < kVectors; ++v) b[v] = load<T>(panel + v * kLanes);
      CT_MLP_EACH for (int r = 0; r < kRows; ++r) {
        const Vector<T> one = splat<T>(a[r * row + t]);
        CT_MLP_EACH for (int v = 0; v < kVectors; ++v) sum[r][v] += one * b[v];
      }
    }
  }
  const bool whole = task.columns == kVectors * kLanes;
  T rest[kRows][kVectors * kLanes];  // columns that are no whole vector go by memory
  T* to = whole ? task.out : rest[0];
  const int64_t step = whole ? task.out_row : kVectors * kLanes;
  CT_MLP_EACH for (int r = 0; r < kRows; ++r, to += step) {
    CT_MLP_EACH for (int v = 0; v < kVectors; ++v) {
      Vector<T> out = task.alpha * (total[r][v] + sum[r][v]);
      if (task.add && whole) out += load<T>(to + v * kLanes);
      if (r < task.biased && whole) out += load<T>(task.bias + v * kLanes);
      store<T>(to + v * kLanes, out);
    }
  }
  if (whole) return;
  for (int r = 0; r < kRows; ++r)
    for (int64_t c = 0; c < task.columns; ++c) {
      T& out = task.out[r * task.out_row + c];
      out = task.add ? out + rest[r][c] : rest[r][c];
      if (r < task.biased) out += task.bias[c];
    }
}

template <int kVectors, int kRows = kTileRows, typename T>
CT_MLP_INLINE void tile_of(int rows, const Tile<T>& task) {
  if constexpr (kRows > 0) {
    if (rows == kRows) return tile<kRows, kVectors>(task);
    tile_of<kVectors, kRows - 1>(rows, task);
  }
}

template <typename T>
void product(const ProductTask<T>& task) {
  const int64_t count = (task.rows + kTileRows - 1) / kTileRows;
  const int64_t least = task.rows / count,
                more = task.rows % count;  // tiles of nearly equal height
  for (int64_t t = 0; t < task.terms; t += kTileTerms) {
    const T* panel = task.panels;
    for (int64_t c = 0; c < task.columns; c += kPanelColumns<T>) {
      const int vectors = panel_vectors<T>(c, task.columns);
      const int64_t width = vectors * Lanes<T>::kCount, rest = task.terms - t;
      Tile<T> one{rest < kTileTerms ? rest : kTileTerms,
                  task.chain,
                  task.terms,
                  task.columns,
                  task.a + t,
                  panel + t * width,
                  task.out + c,
                  task.columns - c < width ? task.columns - c : width,
                  task.alpha,
                  task.add || t > 0,
                  task.bias + c,
                  t > 0 ? 0 : task.biased};
      for (int64_t i = 0; i < count; ++i) {
        const int rows = static_cast<int>(least + (i < more));
        if (vectors == 2)
          tile_of<2>(rows, one);
        else
          tile_of<1>(rows, one);
        one.a += rows * one.row, one.out += rows * one.out_row, one.biased -= rows;
      }
      panel += task.terms * width;
    }
  }
}

}  // namespace
}  // namespace ct::mlp::CT_MLP_LEVEL
