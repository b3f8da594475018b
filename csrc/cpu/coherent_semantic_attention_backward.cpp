// The gradients of coherent_semantic_attention on the CPU.
//
// All three add, to a multiple of the output's gradient, rows for some positions; rows of one position are added up in
// raster order, so the result is the same for any number of threads.
//
//   official  trunc(A)^T g: the few attention weights that do not vanish when they are truncated
//   straight  A^T g: one recurrence from the last row to the first, channel by channel
//   exact     the derivative of generating, from the last row to the first
#include "coherent_semantic_attention.h"

#include <algorithm>
#include <limits>

namespace inpaint {
namespace {

constexpr double kEps = 1e-8;
constexpr int64_t kChannelsPerTask = 64;

// What the forward found for the masked positions of one sample, in raster order.
template <class T>
struct Weights {
  std::vector<int64_t> index;  // raster position of the best known vector
  std::vector<T> alpha, beta, total;

  Weights(const std::vector<int64_t>& masked, const int64_t* index_map, const T* alpha_map, const T* beta_map,
          const T* total_map) {
    for (const int64_t p : masked) {
      index.push_back(index_map[p]);
      alpha.push_back(alpha_map[p]);
      beta.push_back(beta_map[p]);
      total.push_back(total_map[p]);
    }
  }
  int64_t count() const { return static_cast<int64_t>(index.size()); }
  bool starts(int64_t i) const { return std::isinf(total[i]); }
};

// ---- Rows of one position ----------------------------------------------------------------------------------------

// The distinct positions of a list, and for each entry of the list the place of its first equal.
struct Distinct {
  std::vector<int64_t> positions, first,
      place;  // first[d]: where positions[d] stands first; place[i]: first of list[i]

  Distinct(const std::vector<int64_t>& list, int64_t count) : place(list.size()) {
    std::vector<int64_t> seen(count, -1);
    for (size_t i = 0; i < list.size(); ++i) {
      int64_t& at = seen[list[i]];
      if (at < 0) {
        at = static_cast<int64_t>(i);
        positions.push_back(list[i]);
        first.push_back(at);
      }
      place[i] = at;
    }
  }
};

// Adds every row to the first one of its position, for the channels [begin, end).
template <class T>
INPAINT_INLINE void add_up_rows_body(T* rows, int64_t stride, const Distinct& distinct, int64_t begin, int64_t end) {
  for (int64_t i = 0; i < static_cast<int64_t>(distinct.place.size()); ++i) {
    const int64_t to = distinct.place[i];
    if (to == i) continue;
    for (int64_t c = begin; c < end; ++c) rows[to * stride + c] += rows[i * stride + c];
  }
}

// ---- official ----------------------------------------------------------------------------------------------------

// An attention weight that truncation leaves something of: of masked row i, for the `column`-th distinct position.
template <class T>
struct WholeWeight {
  int64_t row, column;
  T value;
};

// to[i] *= factor; whether any |to[i]| >= 1, or is NaN.
template <class T>
INPAINT_INLINE bool scale_columns_body(T* to, T factor, int64_t length) {
  typedef typename VectorOf<LaneInt<T>>::type Mask;
  Mask any = {};
  int64_t i = 0;
  for (; i + kLanes<T> <= length; i += kLanes<T>) {
    const Vector<T> t = load<Vector<T>>(to + i) * factor;
    store(to + i, t);
    any |= ~((t < T(1)) & (t > T(-1)));
  }
  LaneInt<T> some = 0;
  for (int lane = 0; lane < kLanes<T>; ++lane) some |= any[lane];
  for (; i < length; ++i) {
    to[i] *= factor;
    some |= !(to[i] < T(1) && to[i] > T(-1));
  }
  return some != 0;
}

// ---- straight ----------------------------------------------------------------------------------------------------

// rows[i] = beta_i z_i with z_i = rows[i] + alpha_{i+1} z_{i+1}, for the channels [begin, end); z is scratch.
template <class T>
INPAINT_INLINE void attended_gradients_body(T* rows, int64_t stride, const Weights<T>& w, int64_t begin, int64_t end,
                                            T* z) {
  for (int64_t i = w.count() - 1; i >= 0; --i) {
    T* row = rows + i * stride + begin;
    const T alpha = i + 1 < w.count() ? w.alpha[i + 1] : T(0), beta = w.beta[i];
    for (int64_t c = 0; c < end - begin; ++c) {
      z[c] = alpha == 0 ? row[c] : row[c] + alpha * z[c];
      row[c] = beta * z[c];
    }
  }
}

// ---- exact -------------------------------------------------------------------------------------------------------

// Rows of one sample: q and k become their gradients; y is generated again, g is the gradient of the output.
template <class T>
struct ExactRows {
  T* q;
  T* k;
  T* y;
  const T* g;
  T* ybar;  // one row: the whole gradient of y_i
  T* z;     // one row: what of it reaches y_{i-1}
  int64_t stride, channels;
};

template <class T>
INPAINT_INLINE void exact_gradients_body(const ExactRows<T>& rows, const Weights<T>& w, bool paper) {
  const int64_t channels = rows.channels, stride = rows.stride;
  for (int64_t i = 0; i < w.count(); ++i) {
    T* y = rows.y + i * stride;
    const T* k = rows.k + i * stride;
    const T alpha = w.alpha[i], beta = w.beta[i];
    if (w.starts(i))
      std::copy_n(k, channels, y);
    else
      for (int64_t c = 0; c < channels; ++c) y[c] = alpha * y[c - stride] + beta * k[c];
  }
  std::fill_n(rows.z, channels, T(0));
  for (int64_t i = w.count() - 1; i >= 0; --i) {
    T* q = rows.q + i * stride;
    T* k = rows.k + i * stride;
    const T* g = rows.g + i * stride;
    T *ybar = rows.ybar, *z = rows.z;
    if (w.starts(i)) {
      for (int64_t c = 0; c < channels; ++c) k[c] = g[c] + z[c];
      std::fill_n(q, channels, T(0));
      std::fill_n(z, channels, T(0));
      continue;
    }
    const T* before = rows.y + (i - 1) * stride;
    // Four sums in a fixed order: <before - k, ybar> and the squares of q, k and before.
    constexpr int lanes = kLanes<T>;
    Vector<T> sum[4] = {};
    int64_t c = 0;
    for (; c + lanes <= channels; c += lanes) {
      const Vector<T> now = load<Vector<T>>(g + c) + load<Vector<T>>(z + c);
      const Vector<T> qs = load<Vector<T>>(q + c), ks = load<Vector<T>>(k + c), ys = load<Vector<T>>(before + c);
      store(ybar + c, now);
      sum[0] += (ys - ks) * now;
      sum[1] += qs * qs;
      sum[2] += ks * ks;
      sum[3] += ys * ys;
    }
    T sums[4];
    for (int j = 0; j < 4; ++j) sums[j] = sum_of_lanes<T>(sum[j]);
    for (; c < channels; ++c) {
      ybar[c] = g[c] + z[c];
      sums[0] += (before[c] - k[c]) * ybar[c];
      sums[1] += q[c] * q[c];
      sums[2] += k[c] * k[c];
      sums[3] += before[c] * before[c];
    }
    // |x|, 1 / (|x| + eps) and 1 / |x|, the last 0 where x is 0: that term's derivative is dropped there.
    const auto lengths = [](T square) {
      const T length = std::sqrt(square);
      return std::pair<T, T>(T(1) / (length + T(kEps)), length > 0 ? T(1) / length : T(0));
    };
    const auto [inverse_q, unit_q] = lengths(sums[1]);
    const auto [inverse_k, unit_k] = lengths(sums[2]);
    const auto [inverse_y, unit_y] = lengths(sums[3]);
    const T alpha = w.alpha[i], beta = w.beta[i], s = w.total[i], a = alpha * s, v = beta * s;
    const T lambda = sums[0] / s, abar = beta * lambda, vbar = -alpha * lambda;
    // v = <q, k> v_factor, a = <q, before> a_factor.
    const T v_factor = paper ? inverse_q * inverse_k : inverse_k, a_factor = paper ? inverse_q * inverse_y : inverse_q;
    const T k_by_q = vbar * v_factor, k_by_k = -vbar * v * inverse_k * unit_k;
    const T q_by_y = abar * a_factor, q_by_k = vbar * v_factor;
    const T q_by_q = -(paper ? abar * a + vbar * v : abar * a) * inverse_q * unit_q;
    const T z_by_q = abar * a_factor, z_by_y = paper ? -abar * a * inverse_y * unit_y : T(0);
    for (int64_t n = 0; n < channels; ++n) {
      const T qn = q[n], kn = k[n], yn = before[n];
      k[n] = beta * ybar[n] + k_by_q * qn + k_by_k * kn;
      q[n] = q_by_y * yn + q_by_q * qn + q_by_k * kn;
      z[n] = alpha * ybar[n] + z_by_q * qn + z_by_y * yn;
    }
  }
}

#define INPAINT_GRADIENT_ROWS(T)                                                                                   \
  INPAINT_CLONES void add_up_rows(T* rows, int64_t stride, const Distinct& distinct, int64_t begin, int64_t end) { \
    add_up_rows_body(rows, stride, distinct, begin, end);                                                          \
  }                                                                                                                \
  INPAINT_CLONES bool scale_columns(T* to, T factor, int64_t length) {                                             \
    return scale_columns_body(to, factor, length);                                                                 \
  }                                                                                                                \
  INPAINT_CLONES void attended_gradients(T* rows, int64_t stride, const Weights<T>& w, int64_t begin, int64_t end, \
                                         T* z) {                                                                   \
    attended_gradients_body(rows, stride, w, begin, end, z);                                                       \
  }                                                                                                                \
  INPAINT_CLONES void exact_gradients(const ExactRows<T>& rows, const Weights<T>& w, bool paper) {                 \
    exact_gradients_body(rows, w, paper);                                                                          \
  }
INPAINT_GRADIENT_ROWS(float)
INPAINT_GRADIENT_ROWS(double)

// The attention weights of `official` that are not 0 after truncation, in raster order of their rows: the columns of
// the distinct positions are run through t <- fl(fl(t alpha) + beta). A column that has become 0 is forgotten; with
// alpha near 0.5 that takes 150 rows.
template <class T>
std::vector<WholeWeight<T>> whole_weights(const Weights<T>& w, const Distinct& distinct) {
  std::vector<WholeWeight<T>> found;
  std::vector<T> column;
  std::vector<int64_t> owner;                     // place of the first row of the position that a column is of
  std::vector<int64_t> slot(w.index.size(), -1);  // where its column is, by that place
  const auto keep_whole = [&](int64_t row, size_t at) {
    if (!(column[at] < T(1) && column[at] > T(-1))) found.push_back({row, owner[at], std::trunc(column[at])});
  };
  for (int64_t i = 0; i < w.count(); ++i) {
    if (w.alpha[i] == 0) {
      for (const int64_t place : owner) slot[place] = -1;
      column.clear();
      owner.clear();
    }
    const bool any = scale_columns(column.data(), w.alpha[i], static_cast<int64_t>(column.size()));
    int64_t& own = slot[distinct.place[i]];
    if (own < 0) {
      own = static_cast<int64_t>(column.size());
      column.push_back(T(0));
      owner.push_back(distinct.place[i]);
    }
    column[own] += w.beta[i];
    if (any) {
      for (size_t at = 0; at < column.size(); ++at) keep_whole(i, at);
    } else {
      keep_whole(i, own);
    }
    if (i % 64 != 63) continue;
    size_t kept = 0;
    for (size_t at = 0; at < column.size(); ++at) {
      slot[owner[at]] = column[at] == 0 ? -1 : static_cast<int64_t>(kept);
      if (column[at] == 0) continue;
      column[kept] = column[at];
      owner[kept++] = owner[at];
    }
    column.resize(kept);
    owner.resize(kept);
  }
  return found;
}

// ---- One sample --------------------------------------------------------------------------------------------------

template <class T, class Element>
class SampleGradient {
 public:
  SampleGradient(const VectorMap<const Element>& grad, const VectorMap<const Element>& x,
                 const VectorMap<Element>& grad_x, Positions positions, const Weights<T>& weights)
      : grad_(grad), x_(x), grad_x_(grad_x), positions_(std::move(positions)), weights_(weights) {}

  void exact(bool paper) {
    const int64_t count = weights_.count();
    copy(nullptr);
    if (count == 0) return;
    const Buffer<T> q(count * stride_), k(count * stride_), y(count * stride_), g(count * stride_), two(2 * stride_);
    gather(x_, positions_.masked, q.get());
    gather(x_, weights_.index, k.get());
    gather(grad_, positions_.masked, g.get());
    exact_gradients(
        ExactRows<T>{q.get(), k.get(), y.get(), g.get(), two.get(), two.get() + stride_, stride_, channels()}, weights_,
        paper);
    scatter(q.get(), positions_.masked);
    add(k.get(), weights_.index, T(0), T(1));
  }

  void straight(T weight) {
    if (weights_.count() == 0) return copy(nullptr);
    copy_weighted(weight);
    const Buffer<T> rows(weights_.count() * stride_);
    gather(grad_, positions_.masked, rows.get());
    run_tasks(ceil_div(channels(), kChannelsPerTask), weights_.count() * kChannelsPerTask, [&](int64_t, int64_t task) {
      alignas(64) T z[kChannelsPerTask];
      const int64_t begin = task * kChannelsPerTask, end = std::min(channels(), begin + kChannelsPerTask);
      std::fill_n(z, kChannelsPerTask, T(0));
      attended_gradients(rows.get(), stride_, weights_, begin, end, z);
    });
    add(rows.get(), weights_.index, weight, weight);
  }

  void official(T weight) {
    if (weights_.count() == 0) return copy(nullptr);
    copy_weighted(weight);
    const std::vector<WholeWeight<T>> whole = whole_weights(weights_, Distinct(weights_.index, x_.positions()));
    std::vector<int64_t> from, to;
    for (const WholeWeight<T>& one : whole) {
      from.push_back(positions_.masked[one.row]);
      to.push_back(weights_.index[one.column]);
    }
    const Buffer<T> rows(static_cast<int64_t>(whole.size()) * stride_);
    gather(grad_, from, rows.get());
    for (size_t i = 0; i < whole.size(); ++i)
      for (int64_t c = 0; c < channels(); ++c) rows[i * stride_ + c] *= whole[i].value;
    add(rows.get(), to, weight, weight);
  }

 private:
  int64_t channels() const { return x_.channels; }

  // The output's gradient, times (1 + weight) at known positions.
  void copy_weighted(T weight) {
    std::vector<T> factor(x_.positions(), T(1) + weight);
    for (const int64_t p : positions_.masked) factor[p] = T(1);
    copy(factor.data());
  }

  void copy(const T* factor) {
    const std::vector<MapPart> parts = parts_of(grad_x_);
    run_tasks(static_cast<int64_t>(parts.size()), x_.positions() * kChunk,
              [&](int64_t, int64_t i) { copy_vectors(grad_, grad_x_, factor, parts[i]); });
  }

  // Calls task(first, count) for pieces of a list of `total` rows.
  template <class Task>
  void for_rows(int64_t total, const Task& task) {
    run_tasks(ceil_div(total, kRowsPerTask), kRowsPerTask * channels(), [&](int64_t, int64_t block) {
      const int64_t first = block * kRowsPerTask;
      task(first, std::min(kRowsPerTask, total - first));
    });
  }

  void gather(const VectorMap<const Element>& map, const std::vector<int64_t>& positions, T* rows) {
    for_rows(static_cast<int64_t>(positions.size()), [&](int64_t first, int64_t count) {
      int64_t offsets[kRowsPerTask];
      for (int64_t i = 0; i < count; ++i) offsets[i] = map.offset(positions[first + i]);
      gather_rows(map, offsets, count, rows + first * stride_, stride_);
    });
  }

  void scatter(const T* rows, const std::vector<int64_t>& positions) {
    for_rows(static_cast<int64_t>(positions.size()), [&](int64_t first, int64_t count) {
      int64_t offsets[kRowsPerTask];
      for (int64_t i = 0; i < count; ++i) offsets[i] = grad_x_.offset(positions[first + i]);
      scatter_rows(rows + first * stride_, stride_, offsets, count, grad_x_);
    });
  }

  // Known positions: the gradient becomes g + own * g + other * (sum of the position's rows), rounded once.
  void add(T* rows, const std::vector<int64_t>& positions, T own, T other) {
    if (positions.empty()) return;
    const Distinct distinct(positions, x_.positions());
    run_tasks(ceil_div(channels(), kChannelsPerTask), static_cast<int64_t>(positions.size()) * kChannelsPerTask,
              [&](int64_t, int64_t task) {
                const int64_t begin = task * kChannelsPerTask;
                add_up_rows(rows, stride_, distinct, begin, std::min(channels(), begin + kChannelsPerTask));
              });
    for_rows(static_cast<int64_t>(distinct.positions.size()), [&](int64_t first, int64_t count) {
      const Buffer<T> sums(count * stride_);
      int64_t offsets[kRowsPerTask];
      for (int64_t i = 0; i < count; ++i) offsets[i] = grad_.offset(distinct.positions[first + i]);
      gather_rows(grad_, offsets, count, sums.get(), stride_);
      for (int64_t i = 0; i < count; ++i) {
        const T* row = rows + distinct.first[first + i] * stride_;
        T* sum = sums.get() + i * stride_;
        for (int64_t c = 0; c < channels(); ++c) sum[c] += own * sum[c] + other * row[c];
        offsets[i] = grad_x_.offset(distinct.positions[first + i]);
      }
      scatter_rows(sums.get(), stride_, offsets, count, grad_x_);
    });
  }

  VectorMap<const Element> grad_, x_;
  VectorMap<Element> grad_x_;
  Positions positions_;
  const Weights<T>& weights_;
  int64_t stride_ = row_stride<T>(x_.channels);
};

template <class T, class Element>
void backward(const Tensor& grad, const Tensor& x, const Tensor& flags, const Tensor& index, const Tensor& alpha,
              const Tensor& beta, const Tensor& total, bool paper, const std::string& gradient, T triple_weight,
              const Tensor& grad_x) {
  const int64_t batch = x.size(0), count = x.size(2) * x.size(3);
  for (int64_t b = 0; b < batch; ++b) {
    Positions positions(flags.const_data_ptr<bool>() + (flags.size(0) > 1 ? b * count : 0), count);
    const Weights<T> weights(positions.masked, index.const_data_ptr<int64_t>() + b * count,
                             alpha.const_data_ptr<T>() + b * count, beta.const_data_ptr<T>() + b * count,
                             total.const_data_ptr<T>() + b * count);
    for (const int64_t at : weights.index)
      STD_TORCH_CHECK(at >= 0 && at < count, "index: expected the known positions that the forward found, got ", at);
    SampleGradient<T, Element> sample(vectors_of<const Element>(grad, b), vectors_of<const Element>(x, b),
                                      vectors_of<Element>(grad_x, b), std::move(positions), weights);
    if (gradient == "exact")
      sample.exact(paper);
    else if (gradient == "straight")
      sample.straight(triple_weight);
    else
      sample.official(triple_weight);
  }
}

}  // namespace

void coherent_semantic_attention_backward(const Tensor& grad, const Tensor& x, const Tensor& flags, const Tensor& index,
                                          const Tensor& alpha, const Tensor& beta, const Tensor& total,
                                          const std::string& variant, const std::string& gradient, double triple_weight,
                                          const Tensor& grad_x) {
  check_rank(grad, "grad", 4);
  check_rank(x, "x", 4);
  check_rank(grad_x, "grad_x", 4);
  check_dense(flags, "flags", 3);
  for (const Tensor* weight : {&index, &alpha, &beta, &total}) check_dense(*weight, "index, alpha, beta, total", 3);
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), "grad: expected the dtype of x");
  dispatch_element(x.scalar_type(), "x", [&](auto zero, auto element) {
    using T = decltype(zero);
    backward<T, decltype(element)>(grad, x, flags, index, alpha, beta, total, variant == "paper", gradient,
                                   static_cast<T>(triple_weight), grad_x);
  });
}

}  // namespace inpaint

STABLE_TORCH_LIBRARY_IMPL(inpaint_native, CPU, m) {
  m.impl("coherent_semantic_attention_backward", TORCH_BOX(&inpaint::coherent_semantic_attention_backward));
}
