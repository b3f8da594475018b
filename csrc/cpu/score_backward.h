// The adjoints of the passes of patch_scores.h, in reverse order: from dS to the gradients of query, key and key norm.
#pragma once

#include <numeric>

#include "contextual_attention.h"

namespace inpaint {

// Rows in a ring of key-row slabs that may be absent, which stands for all zero.
template <class T>
class SparseRing {
 public:
  SparseRing(int64_t slabs, int64_t rows, int64_t width, int64_t border)
      : values_(slabs, rows, width, border), present_(slabs * rows, true), slabs_(slabs), rows_(rows) {}
  T* row(int64_t v, int64_t i) const { return values_.row(v, i); }
  const T* present_row(int64_t v, int64_t i) const { return i >= 0 && flag(v, i) ? row(v, i) : nullptr; }
  uint8_t& flag(int64_t v, int64_t i) const { return present_[v % slabs_ * rows_ + i]; }

 private:
  SlabRing<T> values_;
  Buffer<uint8_t> present_;
  int64_t slabs_, rows_;
};

// to = sum of the non-null sources; whether there is any.
template <class T>
bool sum_present(T* to, const T* const* sources, int count, int64_t width) {
  if (std::all_of(sources, sources + count, [](const T* s) { return s == nullptr; })) return false;
  sum_rows(to, sources, count, width);
  return true;
}

// From dS (in the strip) to the gradients of query, key and key norm. Follows ScoreSweep's passes backwards, one key
// row after the other, while a sweep delivers S0 for the gradient of the norm.
template <class T>
class ScoreBackward {
 public:
  ScoreBackward(const QueryPlan& plan, const AttentionInputs<T>& inputs, const MapView<T>& query, const MapView<T>& key,
                const CellPanels<T>& key_columns, const T* inverse_norm, const AttentionStrip<T>& score_gradients)
      : plan_(plan),
        inputs_(inputs),
        query_(query),
        key_(key),
        key_columns_(key_columns),
        inverse_norm_(inverse_norm),
        score_gradients_(score_gradients),
        row_plan_(plan.rows, inputs.queries, inputs.semantics.patch, 0),
        width_(inputs.keys.width),
        sources_(pixel_list(row_plan_)),
        query_columns_(FlatMap<T>::planes(query.data, inputs.queries.count()),
                       pixels_of(inputs.channels, inputs.queries), inputs.queries.width, sources_.size(),
                       sources_.data()),
        column_gradients_(4, plan.columns.size(), width_, std::max(1, plan.half)),
        row_gradients_(plan.before + plan.after + 2, plan.rows.size(), width_, 1),
        patch_gradients_(2, row_plan_.patches.size(), width_, std::max(plan.before, plan.after)),
        correlation_gradients_(2, sources_.size() + kTileRows, round_up(width_, kTileColumns<T>), 0),
        query_gradient_(sources_.size() * query_columns_.panels() * kTileColumns<T>, true),
        blocks_{kRowsPerBlock, plan.rows.size()},
        norm_terms_(blocks_.count() * inputs.keys.count(), true) {
    const PositionList pixels = PositionList(marks(sources_, inputs.queries.count()));
    const auto column = [&](int64_t p, int e) {
      return column_neighbour(p, e, inputs_.queries.height, inputs_.queries.width);
    };
    const auto row = [&](int64_t p, int d) { return row_neighbour(p, d, inputs_.queries.count()); };
    const auto above = [&](int64_t p, int dy) {
      const int64_t q = p + dy * inputs_.queries.width;
      return q >= 0 && q < inputs_.queries.count() ? q : int64_t{kNowhere};
    };
    const auto beside = [&](int64_t p, int dx) {
      const int64_t x = p % inputs_.queries.width + dx;
      return x >= 0 && x < inputs_.queries.width ? p + dx : int64_t{kNowhere};
    };
    column_terms_ = QueryPlan::terms(plan.columns, plan.scores, -plan.half, plan.half, column);
    row_terms_ = QueryPlan::terms(plan.rows, plan.columns, -plan.half, plan.half, row);
    patch_terms_ = QueryPlan::terms(row_plan_.patches, plan.rows, -plan.after, plan.before, above);
    pixel_terms_ = QueryPlan::terms(pixels, row_plan_.patches, -plan.after, plan.before, beside);
    for (int64_t w = 0; w < worker_count(); ++w) tiles_.emplace_back(kTileSize<T>, true);
  }

  // Adds to dquery [C, hq, wq], dkey [keys][channels rounded up] and norm_sums [hk, wk] (sum over p of dS0 S0).
  void run(T* dquery, T* dkey, T* norm_sums) {
    ScoreSweep<T> sweep(row_plan_, query_, key_, inverse_norm_);
    const auto emit = [&](int64_t v, int64_t i, const T* scores) { fuse_rows(v, i, scores); };
    const int64_t height = inputs_.keys.height, before = plan_.before;
    const Blocks columns{kRowsPerBlock, plan_.columns.size()}, patches{kRowsPerBlock, row_plan_.patches.size()};
    const Blocks pixels{kRowsPerBlock, static_cast<int64_t>(sources_.size())}, keys{kTileRows, width_};
    run_tasks(columns.count(), kRowsPerBlock * width_, [&](int64_t, int64_t b) {
      for (int64_t v = 0; v < std::min<int64_t>(2, height); ++v) fuse_columns(columns, b, v);
    });
    // As in the sweep, every pass of a phase works on a key row whose terms the phases before have finished: dS0 of v,
    // then dT two key rows ahead of it, dH, dG and dkey behind it.
    const int64_t passes[] = {sweep.tasks(), columns.count(), patches.count(), pixels.count(), keys.count()};
    const int64_t tasks = std::accumulate(std::begin(passes), std::end(passes), int64_t{0});
    const int64_t phases = height + before + 3 - sweep.summed(0);
    run_phases(phases, tasks, sweep.work() / 4, [&](int64_t worker, int64_t t, int64_t i) {
      const int64_t v = sweep.summed(t);
      const auto inside = [&](int64_t key_row) { return key_row >= 0 && key_row < height; };
      int64_t pass = 0;
      for (; i >= passes[pass]; ++pass) i -= passes[pass];
      if (pass == 0) sweep.step(worker, t, i, emit);
      if (pass == 1 && v >= 0 && inside(v + 2)) fuse_columns(columns, i, v + 2);
      if (pass == 2 && inside(v - before - 1)) sum_patches(patches, i, v - before - 1);
      if (pass == 3 && inside(v - before - 2)) add_query_gradient(worker, pixels, i, v - before - 2);
      if (pass == 4 && inside(v - before - 3)) add_key_gradient(i, v - before - 3, dkey);
    });
    scatter_query_gradient(dquery);
    for (int64_t b = 0; b < blocks_.count(); ++b)
      for (int64_t q = 0; q < inputs_.keys.count(); ++q) norm_sums[q] += norm_terms_[b * inputs_.keys.count() + q];
  }

 private:
  static CellPixels pixels_of(int64_t channels, GridSize grid) {
    static const std::vector<std::pair<int64_t, int64_t>> single{{0, 0}};
    return {channels, grid.height, grid.width, 1, 0, single};
  }
  static std::vector<uint8_t> marks(const std::vector<int64_t>& list, int64_t count) {
    std::vector<uint8_t> wanted(count, 0);
    for (const int64_t p : list) wanted[p] = 1;
    return wanted;
  }
  // The pixels whose correlations the patches of a plan contain, sorted.
  static std::vector<int64_t> pixel_list(const QueryPlan& plan) {
    std::vector<uint8_t> wanted(plan.grid.count(), 0);
    for (int64_t i = 0; i < plan.patches.size(); ++i) {
      for (int dx = -plan.before; dx <= plan.after; ++dx) {
        const int64_t x = plan.patches[i] % plan.grid.width + dx;
        if (x >= 0 && x < plan.grid.width) wanted[plan.patches[i] + dx] = 1;
      }
    }
    std::vector<int64_t> list;
    for (int64_t p = 0; p < plan.grid.count(); ++p)
      if (wanted[p]) list.push_back(p);
    return list;
  }

  // dT of one block with key row v, from dS in the strip.
  void fuse_columns(const Blocks& blocks, int64_t b, int64_t v) {
    const int half = plan_.half;
    const int64_t height = inputs_.keys.height;
    for (int64_t i = blocks.begin(b); i < blocks.end(b); ++i) {
      const T* sources[kMaxFuse];
      for (int e = -half; e <= half; ++e) {
        const int32_t row = column_terms_[e + half][i];
        const int64_t wrap = v + e < 0 ? -1 : v + e >= height ? 1 : 0, key_row = v + e - wrap * height;
        const bool found = row >= 0 && score_gradients_.present(row, key_row);
        sources[e + half] = found ? score_gradients_.row(row, key_row) + wrap : nullptr;
      }
      column_gradients_.flag(v, i) = sum_present(column_gradients_.row(v, i), sources, 2 * half + 1, width_);
    }
  }

  // dS0 with key row v, its product with S0, and dS0 / n.
  void fuse_rows(int64_t v, int64_t i, const T* scores) {
    const int half = plan_.half;
    const T* sources[kMaxFuse];
    T* to = row_gradients_.row(v, i);
    for (int d = -half; d <= half; ++d) {
      const T* row = column_gradients_.present_row(v, row_terms_[d + half][i]);
      sources[d + half] = row ? row + d : nullptr;
    }
    bool any = sum_present(to, sources, 2 * half + 1, width_);
    for (int d = 1; d <= half; ++d) {  // what lies past the two ends of the key row
      const T* before = v > 0 ? column_gradients_.present_row(v - 1, row_terms_[half - d][i]) : nullptr;
      const T* after =
          v + 1 < inputs_.keys.height ? column_gradients_.present_row(v + 1, row_terms_[half + d][i]) : nullptr;
      if (!before && !after) continue;
      if (!any) std::fill_n(to, width_, T(0));
      any = true;
      for (int u = 0; before && u < d; ++u) to[u] += before[width_ - d + u];
      for (int u = 0; after && u < d; ++u) to[width_ - d + u] += after[u];
    }
    row_gradients_.flag(v, i) = any;
    if (!any) return;
    T* terms = norm_terms_.get() + i / blocks_.rows_per_block * inputs_.keys.count() + v * width_;
    for (int64_t u = 0; u < width_; ++u) terms[u] += to[u] * scores[u];
    multiply_row(to, inverse_norm_ + v * width_, width_);
  }

  // dH of one block with key row v.
  void sum_patches(const Blocks& blocks, int64_t b, int64_t v) {
    for (int64_t i = blocks.begin(b); i < blocks.end(b); ++i) {
      const T* sources[kMaxPatch];
      int count = 0;
      for (int dy = -plan_.after; dy <= plan_.before; ++dy) {
        const int32_t row = patch_terms_[dy + plan_.after][i];
        const bool inside = v + dy >= 0 && v + dy < inputs_.keys.height;
        sources[count++] = inside ? row_gradients_.present_row(v + dy, row) : nullptr;
      }
      patch_gradients_.flag(v, i) = sum_present(patch_gradients_.row(v, i), sources, count, width_);
    }
  }

  // dG of one block with key row v, and dquery += dG key.
  void add_query_gradient(int64_t worker, const Blocks& blocks, int64_t b, int64_t v) {
    for (int64_t i = blocks.begin(b); i < blocks.end(b); ++i) {
      const T* sources[kMaxPatch];
      int count = 0;
      for (int dx = -plan_.after; dx <= plan_.before; ++dx) {
        const T* row = patch_gradients_.present_row(v, pixel_terms_[dx + plan_.after][i]);
        sources[count++] = row ? row + dx : nullptr;
      }
      correlation_gradients_.flag(v, i) = sum_present(correlation_gradients_.row(v, i), sources, count, width_);
    }
    for (int64_t begin = blocks.begin(b); begin < blocks.end(b); begin += kTileRows)
      for (int64_t left = 0; left < width_; left += kTileInner)
        add_query_gradient_tile(tiles_[worker].get(), begin, std::min(blocks.end(b), begin + kTileRows), left, v);
  }

  // dquery += dG key for at most kTileRows queries and kTileInner keys of key row v.
  void add_query_gradient_tile(T* tile, int64_t begin, int64_t end, int64_t left, int64_t v) {
    const int64_t count = std::min<int64_t>(kTileInner, width_ - left);
    const int64_t stride = query_columns_.panels() * kTileColumns<T>;
    bool any = false;
    for (int64_t r = 0; r < kTileRows; ++r) {
      const T* row = begin + r < end ? correlation_gradients_.present_row(v, begin + r) : nullptr;
      if (row)
        std::copy_n(row + left, count, tile + r * kTileStride);
      else
        std::fill_n(tile + r * kTileStride, count, T(0));
      any |= row != nullptr;
    }
    int32_t inner[kTileInner];
    const int found = any ? nonzero_columns(tile, static_cast<int>(count), inner) : 0;
    T sums[kTileRows * kTileColumns<T>];
    for (int64_t j = 0; found > 0 && j < query_columns_.panels(); ++j) {
      multiply_tile(tile, key_columns_.panel(j) + (v * width_ + left) * kTileColumns<T>, inner, found, sums,
                    kTileColumns<T>, false);
      for (int64_t r = 0; r < end - begin; ++r)
        for (int64_t n = 0; n < kTileColumns<T>; ++n)
          query_gradient_[(begin + r) * stride + j * kTileColumns<T> + n] += sums[r * kTileColumns<T> + n];
    }
  }

  // dkey(q) += sum over p of dG(p, q) query[p], for kTileRows keys q of key row v.
  void add_key_gradient(int64_t group, int64_t v, T* dkey) const {
    const int64_t left = group * kTileRows, count = std::min<int64_t>(kTileRows, width_ - left);
    const int64_t stride = query_columns_.panels() * kTileColumns<T>;
    const T* first = correlation_gradients_.row(v, 0) + left;
    const int64_t row_stride = correlation_gradients_.row(v, 1) - correlation_gradients_.row(v, 0);
    std::vector<int32_t> inner;
    for (int64_t i = 0; i < static_cast<int64_t>(sources_.size()); ++i) {
      const T* row = first + i * row_stride;
      if (correlation_gradients_.flag(v, i) && std::any_of(row, row + count, [](T x) { return x != 0; }))
        inner.push_back(static_cast<int32_t>(i));
    }
    T sums[kTileRows * kTileColumns<T>];
    for (int64_t j = 0; !inner.empty() && j < query_columns_.panels(); ++j) {
      multiply_transposed_tile(first, row_stride, query_columns_.panel(j), inner.data(), static_cast<int>(inner.size()),
                               sums, kTileColumns<T>);
      for (int64_t r = 0; r < count; ++r)
        for (int64_t n = 0; n < kTileColumns<T>; ++n)
          dkey[(v * width_ + left + r) * stride + j * kTileColumns<T> + n] += sums[r * kTileColumns<T> + n];
    }
  }

  void scatter_query_gradient(T* dquery) const {
    const int64_t stride = query_columns_.panels() * kTileColumns<T>;
    for (int64_t c = 0; c < inputs_.channels; ++c)
      for (size_t i = 0; i < sources_.size(); ++i)
        dquery[c * inputs_.queries.count() + sources_[i]] += query_gradient_[static_cast<int64_t>(i) * stride + c];
  }

  const QueryPlan& plan_;
  const AttentionInputs<T>& inputs_;
  MapView<T> query_, key_;
  const CellPanels<T>& key_columns_;
  const T* inverse_norm_;
  const AttentionStrip<T>& score_gradients_;
  QueryPlan row_plan_;
  int64_t width_;
  std::vector<int64_t> sources_;  // pixels of the query map that take part
  CellPanels<T> query_columns_;
  SparseRing<T> column_gradients_, row_gradients_, patch_gradients_, correlation_gradients_;
  Buffer<T> query_gradient_;
  Blocks blocks_;
  Buffer<T> norm_terms_;  // [blocks of plan.rows][keys], added up in a fixed order
  std::vector<std::vector<int32_t>> column_terms_, row_terms_, patch_terms_, pixel_terms_;
  std::vector<Buffer<T>> tiles_;  // per worker
};

}  // namespace inpaint
