// The two phases that the forward and the backward kernel of contextual_attention share: the logits of a strip of
// queries against all keys, each written once, then their softmax in place.
#pragma once

#include <string>
#include <vector>

#include "patch_scores.h"

namespace inpaint {

// The closed form's parameters; inpaint_kernels/ops/_contextual_attention_presets.py documents them.
struct Semantics {
  int64_t patch, fuse;
  double scale;
  enum class Masking { kMultiply, kExclude, kFill } masking;
  double fill, floor;  // floor: negative for none
  int64_t rate, paste_size, pad_cut, pad_put;
  double divisor;  // 0: the number of patches that overlap

  // Steps of `rate` that a pasted patch spans.
  int64_t reach() const { return ceil_div(paste_size, rate); }
};

inline Semantics::Masking parse_masking(const std::string& name) {
  if (name == "multiply") return Semantics::Masking::kMultiply;
  if (name == "inf") return Semantics::Masking::kExclude;
  if (name == "fill") return Semantics::Masking::kFill;
  STD_TORCH_CHECK(false, "masking: expected 'multiply', 'inf' or 'fill', got '", name, "'");
}

// What a key's fused score goes through: logit = score * factor + offset; afterwards the probability is multiplied by
// `keep`.
template <class T>
struct KeyLogits {
  Buffer<T> factor, offset, keep;
  bool has_keep = false;

  // valid, key_scale, key_bias: [hk, wk] or null.
  KeyLogits(const Semantics& semantics, int64_t keys, const bool* valid, const T* key_scale, const T* key_bias)
      : factor(keys), offset(keys), keep(keys), has_keep(valid && semantics.masking == Semantics::Masking::kMultiply) {
    for (int64_t q = 0; q < keys; ++q) {
      const bool eligible = !valid || valid[q];
      factor[q] = eligible ? static_cast<T>(semantics.scale) * (key_scale ? key_scale[q] : T(1)) : T(0);
      offset[q] = eligible ? (key_bias ? key_bias[q] : T(0)) : offset_of_invalid(semantics);
      keep[q] = eligible || semantics.masking == Semantics::Masking::kFill ? T(1) : T(0);
    }
  }
  const T* keep_or_null(int64_t q) const { return has_keep ? keep.get() + q : nullptr; }

 private:
  static T offset_of_invalid(const Semantics& semantics) {
    switch (semantics.masking) {
      case Semantics::Masking::kMultiply:
        return T(0);
      case Semantics::Masking::kExclude:
        return -std::numeric_limits<T>::infinity();
      case Semantics::Masking::kFill:
        return static_cast<T>(semantics.scale * semantics.fill);
    }
    return T(0);
  }
};

// exp(logit - maximum) of a list of queries: [queries][hk][wk + gap]. The columns past the keys are zero, so diagonal
// sums may read beyond either end of a key row, as far as the paste's patches and one step of the fuse's wrap reach.
// Key rows whose probabilities are all zero are marked absent and never written: in a saturated softmax that is nearly
// all of them.
template <class T>
class AttentionStrip {
 public:
  AttentionStrip(int64_t capacity, GridSize keys, int64_t reach)
      : keys_(keys),
        stride_(keys.width + std::max<int64_t>(reach - 1, 1)),
        front_(std::max<int64_t>(reach, 1)),
        data_(front_ + capacity * keys.height * stride_),
        present_(capacity * keys.height),
        maximum_(capacity),
        inverse_sum_(capacity) {
    std::fill_n(data_.get(), front_, T(0));
    for (int64_t i = 0; i + 1 < capacity; ++i)
      std::fill_n(row(i, keys.height - 1) + keys.width, stride_ - keys.width, T(0));
  }

  // Rows of a key row in the strip: values of the real keys, zero columns up to stride().
  T* row(int64_t i, int64_t v) const { return data_.get() + front_ + (i * keys_.height + v) * stride_; }
  bool present(int64_t i, int64_t v) const { return present_[i * keys_.height + v]; }
  // The same for all key rows of query i.
  const uint8_t* present_rows(int64_t i) const { return present_.get() + i * keys_.height; }
  // What turns the stored values of query i into probabilities.
  T inverse_sum(int64_t i) const { return inverse_sum_[i]; }
  int64_t stride() const { return stride_; }
  GridSize keys() const { return keys_; }

  // Phase 1 and the softmax for the queries of `plan`.
  void compute(const QueryPlan& plan, const MapView<T>& query, const MapView<T>& key, const T* inverse_norm,
               const KeyLogits<T>& logits, const Semantics& semantics) {
    const int64_t width = keys_.width, gap = stride_ - width;
    std::fill_n(maximum_.get(), plan.scores.size(), -std::numeric_limits<T>::infinity());
    ScoreSweep<T>(plan, query, key, inverse_norm).run([&](int64_t v, int64_t i, T* scores) {
      bool alive;
      const T largest = affine_alive(scores, scores, logits.factor.get() + v * width, logits.offset.get() + v * width,
                                     width, maximum_[i], &alive);
      present_[i * keys_.height + v] = alive;
      if (!alive) return;
      maximum_[i] = std::max(maximum_[i], largest);
      T* to = row(i, v);
      if (v > 0) std::fill_n(to - gap, gap, T(0));  // the row before may be absent
      std::copy_n(scores, width, to);
      std::fill_n(to + width, gap, T(0));
    });
    run_tasks(ceil_div(plan.scores.size(), kQueriesPerTask), kQueriesPerTask * keys_.count(),
              [&](int64_t, int64_t task) {
                const int64_t end = std::min(plan.scores.size(), (task + 1) * kQueriesPerTask);
                for (int64_t i = task * kQueriesPerTask; i < end; ++i) normalise(i, logits, semantics.floor);
              });
  }

  // The most probable key of query i and its probability; key 0 where every probability is 0.
  std::pair<int64_t, T> most_attended(int64_t i) const {
    std::pair<int64_t, T> best{0, T(0)};
    for (int64_t v = 0; v < keys_.height; ++v) {
      if (!present(i, v)) continue;
      const T* values = row(i, v);
      for (int64_t u = 0; u < keys_.width; ++u)
        if (values[u] > best.second) best = {v * keys_.width + u, values[u]};
    }
    best.second *= inverse_sum_[i];
    return best;
  }

 private:
  static constexpr int64_t kQueriesPerTask = 8;

  void normalise(int64_t i, const KeyLogits<T>& logits, double floor) {
    const T shift = maximum_[i] == -std::numeric_limits<T>::infinity() ? T(0) : maximum_[i];
    T sum = 0;
    for (int64_t v = 0; v < keys_.height; ++v) {
      bool any = false;
      if (present(i, v)) sum += exp_row(row(i, v), logits.keep_or_null(v * keys_.width), shift, keys_.width, &any);
      present_[i * keys_.height + v] = any;
    }
    inverse_sum_[i] = sum == 0 ? T(0) : T(1) / sum;
    if (floor >= 0) apply_floor(i, static_cast<T>(floor));
  }

  // With a floor every key contributes: the values become the probabilities themselves.
  void apply_floor(int64_t i, T floor) {
    for (int64_t v = 0; v < keys_.height; ++v) {
      T* values = row(i, v);
      if (!present(i, v)) std::fill_n(values, stride_, T(0));
      for (int64_t u = 0; u < keys_.width; ++u) {
        const T probability = values[u] * inverse_sum_[i];
        values[u] = probability < floor ? floor : probability;
      }
      present_[i * keys_.height + v] = 1;
    }
    inverse_sum_[i] = 1;
  }

  GridSize keys_;
  int64_t stride_, front_;
  Buffer<T> data_;
  Buffer<uint8_t> present_;
  Buffer<T> maximum_, inverse_sum_;
};

// ---- Paste geometry ------------------------------------------------------------------------------------------------

// The paste as r x r cells: output pixel rate * u + phase - pad_put is sum_w B(u, w) V(w, phase), V(w, phase) being
// value pixel rate * w + phase - pad_cut and B(u, w) = sum over e in [0, n)^2 of A(u - e, w - e), where n = ceil((K -
// phase) / rate) per axis. Phases with the same n share B and one matrix product; K a multiple of rate has a single
// group.
struct PhaseGroup {
  int64_t reach_y, reach_x;                         // n of the two axes
  std::vector<std::pair<int64_t, int64_t>> phases;  // (y, x)
};

inline std::vector<PhaseGroup> phase_groups(const Semantics& semantics) {
  std::vector<PhaseGroup> groups;
  for (int64_t y = 0; y < semantics.rate; ++y) {
    for (int64_t x = 0; x < semantics.rate; ++x) {
      const int64_t reach_y = ceil_div(semantics.paste_size - y, semantics.rate);
      const int64_t reach_x = ceil_div(semantics.paste_size - x, semantics.rate);
      const auto same = [&](const PhaseGroup& g) { return g.reach_y == reach_y && g.reach_x == reach_x; };
      auto group = std::find_if(groups.begin(), groups.end(), same);
      if (group == groups.end()) group = groups.insert(groups.end(), {reach_y, reach_x, {}});
      group->phases.emplace_back(y, x);
    }
  }
  return groups;
}

// Cells of a grid of `grid` positions with patches that span `reach` steps.
inline GridSize cell_grid(GridSize grid, int64_t reach) { return {grid.height + reach - 1, grid.width + reach - 1}; }

// The pixels of a [channels, height, width] map that a cell grid and a phase group address: column n of the matrix
// product stands for channel n / phases and phase n % phases.
struct CellPixels {
  int64_t channels, height, width;  // of the map
  int64_t rate, pad;
  const std::vector<std::pair<int64_t, int64_t>>& phases;

  int64_t columns() const { return channels * static_cast<int64_t>(phases.size()); }
  int64_t count() const { return height * width; }
  // Flat index of the pixel of cell (y, x) and phase number `phase` in one channel; kNowhere outside the map.
  int64_t pixel(int64_t y, int64_t x, size_t phase) const {
    const int64_t row = rate * y + phases[phase].first - pad, column = rate * x + phases[phase].second - pad;
    return row < 0 || row >= height || column < 0 || column >= width ? kNowhere : row * width + column;
  }
};

// A map of [channels][pixels] in either layout.
template <class T>
struct FlatMap {
  const T* data;
  int64_t channel_stride, pixel_stride;

  // [channels, pixels], dense.
  static FlatMap planes(const T* data, int64_t pixels) { return {data, pixels, 1}; }
};

// Map values gathered into panels for multiply_tile: [panels of columns][cells][kTileColumns], zero outside the map.
template <class T>
class CellPanels {
 public:
  // cells: flat positions in a grid of `grid_width` columns, either listed or the `count` ones from `first` on.
  CellPanels(const FlatMap<T>& map, const CellPixels& pixels, int64_t grid_width, int64_t count, const int64_t* list,
             int64_t first = 0)
      : panels_(ceil_div(pixels.columns(), kTileColumns<T>)), cells_(count), data_(panels_ * cells_ * kTileColumns<T>) {
    const int64_t phases = static_cast<int64_t>(pixels.phases.size());
    run_tasks(ceil_div(count, kCellsPerTask), kCellsPerTask * pixels.columns(), [&](int64_t, int64_t task) {
      const int64_t begin = task * kCellsPerTask, end = std::min(count, begin + kCellsPerTask);
      std::vector<int64_t> from(phases * kCellsPerTask);
      for (int64_t cell = begin; cell < end; ++cell) {
        const int64_t position = list ? list[cell] : first + cell;
        for (int64_t phase = 0; phase < phases; ++phase)
          from[phase * kCellsPerTask + cell - begin] =
              pixels.pixel(position / grid_width, position % grid_width, phase);
      }
      for (int64_t n = 0; n < panels_ * kTileColumns<T>; ++n) {
        const T* channel = n < pixels.columns() ? map.data + n / phases * map.channel_stride : nullptr;
        for (int64_t cell = begin; cell < end; ++cell) {
          const int64_t pixel = from[n % phases * kCellsPerTask + cell - begin];
          at(cell, n) = channel && pixel >= 0 ? channel[pixel * map.pixel_stride] : T(0);
        }
      }
    });
  }
  int64_t panels() const { return panels_; }
  T* panel(int64_t j) const { return data_.get() + j * cells_ * kTileColumns<T>; }
  T& at(int64_t cell, int64_t n) const {
    return panel(n / kTileColumns<T>)[cell * kTileColumns<T> + n % kTileColumns<T>];
  }

 private:
  static constexpr int64_t kCellsPerTask = 64;
  int64_t panels_, cells_;
  Buffer<T> data_;
};

}  // namespace inpaint
