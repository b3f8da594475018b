// contextual_attention, backward, on the CPU. Nothing was saved: strip by strip the probabilities are computed again.
//
// With Y the weighted output gradient as cells, the paste gives dV(w) = sum_u B(u, w) Y(u) and dB(u, w) = <Y(u), V(w)>;
// the diagonal sum dA(p, q) = sum_e dB(p + e, q + e) and the softmax dL = A (dA - <A, dA>) follow, then the adjoints of
// the passes of patch_scores.h in reverse order. All of them are diagonal sums again, with steps of opposite sign, and
// linear in dB, so a query whose cells lie in two strips simply receives two contributions. Rows that are all zero are
// skipped throughout: behind a saturated softmax they are nearly all.
#include "contextual_attention.h"
#include "paste_backward.h"
#include "score_backward.h"

namespace inpaint {
namespace {

// ---- The softmax ---------------------------------------------------------------------------------------------------

// dA(p, q) += sum over e of dB(p + e, q + e), on the key rows that the strip holds.
template <class T>
void gather_probability_gradients(const AttentionInputs<T>& inputs, const PhaseGroup& group, const StripCells& part,
                                  const PositionList& cells, const SparseRows<T>& cell_gradients,
                                  const AttentionStrip<T>& strip, SparseRows<T>& gradients) {
  const int64_t cell_width = inputs.queries.width + inputs.reach() - 1;
  run_tasks(part.queries.size(), inputs.keys.count(), [&](int64_t, int64_t i) {
    const int64_t y = part.queries[i] / inputs.queries.width, x = part.queries[i] % inputs.queries.width;
    for (int64_t v = 0; v < inputs.keys.height; ++v) {
      if (!strip.present(i, v)) continue;
      T* to = gradients.row(i, v);
      if (!gradients.present(i, v)) std::fill_n(to, inputs.keys.width, T(0));
      gradients.present(i, v) = 1;
      for (int64_t e = 0; e < group.reach_y; ++e) {
        for (int64_t d = 0; d < group.reach_x; ++d) {
          const int32_t cell = cells.local((y + e) * cell_width + x + d);
          if (cell >= 0 && cell_gradients.present(cell, v + e))
            add_scaled_row(to, cell_gradients.row(cell, v + e) + d, T(1), inputs.keys.width);
        }
      }
    }
  });
}

// dS = A (dA - <A, dA>) factor, in place of the strip's exponentials. Where a floor replaced a probability its gradient
// stops.
template <class T>
void softmax_backward(const AttentionStrip<T>& strip, int64_t queries, const KeyLogits<T>& logits, double floor,
                      const SparseRows<T>& gradients) {
  const int64_t width = strip.keys().width;
  run_tasks(queries, strip.keys().count(), [&](int64_t, int64_t i) {
    const T inverse_sum = strip.inverse_sum(i);
    T dot = 0;
    for (int64_t v = 0; v < strip.keys().height; ++v) {
      if (!strip.present(i, v)) continue;
      T* gradient = gradients.row(i, v);
      const T* values = strip.row(i, v);
      for (int64_t u = 0; floor > 0 && u < width; ++u)
        if (values[u] * inverse_sum < static_cast<T>(floor)) gradient[u] = 0;
      dot += dot_row(values, gradient, width);
    }
    dot *= inverse_sum;
    for (int64_t v = 0; v < strip.keys().height; ++v)
      if (strip.present(i, v))
        softmax_gradient_row(strip.row(i, v), gradients.row(i, v), logits.factor.get() + v * width, inverse_sum, dot,
                             width);
  });
}

// ---- The key norm --------------------------------------------------------------------------------------------------

// d(norm) / d(squared norm), 0 where the norm is a constant.
template <class T>
T norm_slope(NormRule rule, T norm, T eps) {
  switch (rule) {
    case NormRule::kMax:
      return norm > eps ? T(0.5) / norm : T(0);
    case NormRule::kSum:
      return T(0.5) / norm;
    case NormRule::kAdd:
      return norm > eps ? T(0.5) / (norm - eps) : T(0);
    case NormRule::kNone:
      break;
  }
  return T(0);
}

// dkey += the gradient through n_q: dn = -sum_p dS0 S0 / n, and every pixel of the patch receives 2 key dN.
template <class T>
void add_norm_gradient(const AttentionInputs<T>& inputs, NormRule rule, T eps, const T* key, const T* norm,
                       const T* norm_sums, T* dkey) {
  const GridSize keys = inputs.keys;
  const int64_t before = (inputs.semantics.patch - 1) / 2, after = inputs.semantics.patch - 1 - before;
  Buffer<T> slope(keys.count());
  for (int64_t q = 0; q < keys.count(); ++q)
    slope[q] = norm_sums[q] == 0 ? T(0) : -norm_sums[q] / norm[q] * norm_slope(rule, norm[q], eps);
  run_tasks(keys.height, keys.width * inputs.channels, [&](int64_t, int64_t y) {
    for (int64_t x = 0; x < keys.width; ++x) {
      T sum = 0;  // of the patches that contain this pixel
      for (int64_t v = std::max<int64_t>(0, y - after); v <= std::min(keys.height - 1, y + before); ++v)
        for (int64_t u = std::max<int64_t>(0, x - after); u <= std::min(keys.width - 1, x + before); ++u)
          sum += slope[v * keys.width + u];
      for (int64_t c = 0, q = y * keys.width + x; c < inputs.channels; ++c, q += keys.count())
        dkey[q] += 2 * key[q] * sum;
    }
  });
}

// ---- One sample ----------------------------------------------------------------------------------------------------

template <class T>
struct Gradients {
  T *query, *key, *value;  // zero on entry
};

template <class T>
void attend_backward(const AttentionInputs<T>& inputs, const T* gradient, const MapView<T>& query,
                     const MapView<T>& key, const T* value, NormRule rule, T eps, const T* norm,
                     const KeyLogits<T>& logits, const bool* selected, const Gradients<T>& out) {
  const Semantics& semantics = inputs.semantics;
  const std::vector<std::pair<int64_t, int64_t>> single{{0, 0}};
  const CellPanels<T> key_columns(FlatMap<T>::planes(key.data, inputs.keys.count()),
                                  CellPixels{inputs.channels, inputs.keys.height, inputs.keys.width, 1, 0, single},
                                  inputs.keys.width, inputs.keys.count(), nullptr);
  const Buffer<T> inverse_norm = reciprocals(norm, inputs.keys.count());
  const GridSize key_cells = cell_grid(inputs.keys, inputs.reach()), cells = cell_grid(inputs.queries, inputs.reach());
  const int64_t pixels = semantics.rate * semantics.rate * inputs.queries.count();
  const PixelWeights<T> weights(inputs.queries, semantics, selected);
  Buffer<T> weighted(inputs.value_channels * pixels);
  run_tasks(inputs.value_channels, pixels, [&](int64_t, int64_t c) {
    for (int64_t p = 0; p < pixels; ++p) {
      const T weight = weights(p);  // a pixel that is not wanted has no gradient, whatever arrives there
      weighted[c * pixels + p] = weight == 0 ? T(0) : weight * gradient[c * pixels + p];
    }
  });
  const std::vector<PhaseGroup> groups = phase_groups(semantics);
  std::vector<ValueCells<T>> values;
  for (const PhaseGroup& group : groups) values.emplace_back(value, inputs.value_pixels(group), key_cells);
  const std::vector<int64_t> wanted = wanted_cells(selected, inputs.queries, semantics);
  const std::vector<StripCells> parts =
      cut_strips(wanted, inputs.queries, inputs.reach(),
                 inputs.capacity_of_rows(kBackwardStripRows, widest_row(wanted, inputs.queries, inputs.reach()),
                                         kBackwardStripMinBytes, kBackwardStripMaxBytes));
  int64_t query_capacity = 0, cell_capacity = 0;
  for (const StripCells& part : parts) {
    query_capacity = std::max(query_capacity, part.queries.size());
    cell_capacity = std::max(cell_capacity, static_cast<int64_t>(part.cells.size()));
  }
  AttentionStrip<T> strip(query_capacity, inputs.keys, inputs.reach());
  SparseRows<T> probability_gradients(query_capacity, inputs.keys);
  Buffer<T> dkey(inputs.keys.count() * key_columns.panels() * kTileColumns<T>, true);
  Buffer<T> norm_sums(inputs.keys.count(), true);
  Semantics unclamped = semantics;
  unclamped.floor = -1;
  for (const StripCells& part : parts) {
    stop_if_interrupted();
    const QueryPlan plan(part.queries, inputs.queries, semantics.patch, semantics.fuse);
    strip.compute(plan, query, key, inverse_norm.get(), logits, semantics);
    probability_gradients.clear(plan.scores.size());
    std::vector<uint8_t> wanted(cells.count(), 0);
    for (const int64_t cell : part.cells) wanted[cell] = 1;
    const PositionList strip_cells(wanted);
    {
      SparseRows<T> cell_gradients(cell_capacity, key_cells);
      for (size_t g = 0; g < groups.size(); ++g) {
        cell_gradients.clear(strip_cells.size());
        PasteBackward<T>(inputs, groups[g], values[g], weighted.get(), strip, part).run(cell_gradients);
        gather_probability_gradients(inputs, groups[g], part, strip_cells, cell_gradients, strip,
                                     probability_gradients);
      }
    }
    if (semantics.floor >= 0) strip.compute(plan, query, key, inverse_norm.get(), logits, unclamped);
    softmax_backward(strip, plan.scores.size(), logits, semantics.floor, probability_gradients);
    ScoreBackward<T>(plan, inputs, query, key, key_columns, inverse_norm.get(), strip)
        .run(out.query, dkey.get(), norm_sums.get());
  }
  for (size_t g = 0; g < groups.size(); ++g) values[g].scatter(inputs.value_pixels(groups[g]), key_cells, out.value);
  run_tasks(inputs.channels, inputs.keys.count(), [&](int64_t, int64_t c) {
    for (int64_t q = 0; q < inputs.keys.count(); ++q)
      out.key[c * inputs.keys.count() + q] = dkey[q * key_columns.panels() * kTileColumns<T> + c];
  });
  add_norm_gradient(inputs, rule, eps, key.data, norm, norm_sums.get(), out.key);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> contextual_attention_backward(
    const Tensor& gradient, const Tensor& query, const Tensor& key, const Tensor& value,
    const std::optional<Tensor>& valid, const std::optional<Tensor>& key_scale, const std::optional<Tensor>& key_bias,
    const std::optional<Tensor>& selected, int64_t patch, const std::string& norm_rule, double eps, int64_t fuse,
    double scale, const std::string& masking, double fill, std::optional<double> floor, int64_t rate,
    int64_t paste_size, int64_t pad_cut, int64_t pad_put, double divisor) {
  const Semantics semantics{
      patch,   fuse,    scale,  parse_masking(masking), fill, floor.value_or(-1.0), rate, paste_size,
      pad_cut, pad_put, divisor};
  check_dense(gradient, "gradient", 4);
  check_dense(query, "query", 4);
  check_dense(key, "key", 4);
  Tensor dquery = torch::stable::new_zeros(query, shape_of(query));
  Tensor dkey = torch::stable::new_zeros(key, shape_of(key));
  Tensor dvalue = torch::stable::new_zeros(value, shape_of(value));
  const Tensor norm = contextual_attention_key_norm(key, patch, norm_rule, eps);
  dispatch_float_double(query.scalar_type(), "query", [&](auto zero) {
    using T = decltype(zero);
    const AttentionInputs<T> inputs(query, key, value, semantics);
    const bool* wanted = selected ? static_cast<const bool*>(selected->data_ptr()) : nullptr;
    for (int64_t b = 0; b < query.size(0); ++b) {
      const KeyLogits<T> logits(semantics, inputs.keys.count(), sample_of<bool>(valid, b), sample_of<T>(key_scale, b),
                                sample_of<T>(key_bias, b));
      const auto plane = [b](const Tensor& x) { return b * x.size(1) * x.size(2) * x.size(3); };
      attend_backward(inputs, gradient.const_data_ptr<T>() + plane(gradient), view_of<T>(query, b), view_of<T>(key, b),
                      value.const_data_ptr<T>() + plane(value), parse_norm_rule(norm_rule), static_cast<T>(eps),
                      norm.const_data_ptr<T>() + b * inputs.keys.count(), logits, wanted,
                      Gradients<T>{dquery.mutable_data_ptr<T>() + plane(query), dkey.mutable_data_ptr<T>() + plane(key),
                                   dvalue.mutable_data_ptr<T>() + plane(value)});
    }
  });
  return {dquery, dkey, dvalue};
}

}  // namespace inpaint

STABLE_TORCH_LIBRARY_IMPL(inpaint_native, CPU, m) {
  m.impl("contextual_attention_backward", TORCH_BOX(&inpaint::contextual_attention_backward));
}
