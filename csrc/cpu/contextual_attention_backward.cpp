// contextual_attention, backward, on the CPU. Nothing was saved: strip by strip the probabilities are computed again.
//
// With Y the weighted output gradient as cells, the paste gives dV(w) = sum_u B(u, w) Y(u) and dB(u, w) = <Y(u), V(w)>;
// the diagonal sum dA(p, q) = sum_e dB(p + e, q + e) and the softmax dL = A (dA - <A, dA>) follow, then the adjoints of
// the passes of patch_scores.h in reverse order. All of them are diagonal sums again, with steps of opposite sign, and
// linear in dB, so a query whose cells lie in two strips simply receives two contributions. Rows that are all zero are
// skipped throughout: behind a saturated softmax they are nearly all.
#include "contextual_attention.h"

namespace inpaint {
namespace {

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

// ---- The paste -----------------------------------------------------------------------------------------------------

// Rows of a [rows, channels] matrix as tiles for multiply_tile: [groups of kTileRows][chunks of kTileInner][kTileSize].
template <class T>
class RowTiles {
 public:
  RowTiles(const CellPanels<T>& panels, int64_t rows, int64_t columns)
      : columns_(columns),
        chunks_(ceil_div(columns, kTileInner)),
        data_(ceil_div(rows, kTileRows) * chunks_ * kTileSize<T>, true) {
    run_tasks(ceil_div(rows, kTileRows), kTileRows * columns, [&](int64_t, int64_t g) {
      for (int64_t i = g * kTileRows; i < std::min(rows, (g + 1) * kTileRows); ++i)
        for (int64_t n = 0; n < columns; ++n)
          tile(g, n / kTileInner)[i % kTileRows * kTileStride + n % kTileInner] = panels.at(i, n);
    });
  }
  T* tile(int64_t group, int64_t chunk) const { return data_.get() + (group * chunks_ + chunk) * kTileSize<T>; }
  int64_t chunks() const { return chunks_; }
  int chunk_size(int64_t chunk) const {
    return static_cast<int>(std::min<int64_t>(kTileInner, columns_ - chunk * kTileInner));
  }

 private:
  int64_t columns_, chunks_;
  Buffer<T> data_;
};

std::vector<int32_t> iota(int64_t count) {
  std::vector<int32_t> result(count);
  for (int64_t i = 0; i < count; ++i) result[i] = static_cast<int32_t>(i);
  return result;
}

// One phase group's share of a call: the value cells in both layouts and the gradient of the value cells.
template <class T>
struct ValueCells {
  CellPanels<T> by_column;  // [columns][cells]: inner index cells
  KeyPanels<T> by_cell;     // [cell rows][cells of a row]: inner index columns
  Buffer<T> gradient;       // [cells][columns rounded up]
  int64_t stride;

  ValueCells(const T* value, const CellPixels& pixels, GridSize cells)
      : by_column(value, pixels, cells.width, cells.count()),
        by_cell(planes(by_column, pixels, cells).get(), pixels.columns(), cells),
        gradient(cells.count() * by_column.panels() * kTileColumns<T>, true),
        stride(by_column.panels() * kTileColumns<T>) {}

  // The gradient's cells are disjoint pixels of the value map.
  void scatter(const CellPixels& pixels, GridSize cells, T* to) const {
    const int64_t phases = static_cast<int64_t>(pixels.phases.size()), plane = pixels.height * pixels.width;
    run_tasks(cells.height, cells.width * stride, [&](int64_t, int64_t y) {
      for (int64_t x = 0; x < cells.width; ++x) {
        for (int64_t phase = 0; phase < phases; ++phase) {
          const int64_t pixel = pixels.pixel(y, x, phase);
          if (pixel < 0) continue;
          const T* sums = gradient.get() + (y * cells.width + x) * stride;
          for (int64_t c = 0; c < pixels.channels; ++c) to[c * plane + pixel] = sums[c * phases + phase];
        }
      }
    });
  }

 private:
  static Buffer<T> planes(const CellPanels<T>& panels, const CellPixels& pixels, GridSize cells) {
    Buffer<T> result(pixels.columns() * cells.count());
    run_tasks(pixels.columns(), cells.count(), [&](int64_t, int64_t n) {
      for (int64_t cell = 0; cell < cells.count(); ++cell) result[n * cells.count() + cell] = panels.at(cell, n);
    });
    return result;
  }
};

// dB of a strip's cells: [cells][cell rows of the keys][cell columns], rows present or zero.
template <class T>
class CellGradients {
 public:
  CellGradients(int64_t capacity, GridSize key_cells)
      : key_cells_(key_cells), data_(capacity * key_cells.count()), present_(capacity * key_cells.height) {}
  void clear(int64_t cells) { std::fill_n(present_.get(), cells * key_cells_.height, uint8_t{0}); }
  T* row(int64_t cell, int64_t w_y) const { return data_.get() + (cell * key_cells_.height + w_y) * key_cells_.width; }
  uint8_t& present(int64_t cell, int64_t w_y) const { return present_[cell * key_cells_.height + w_y]; }

 private:
  GridSize key_cells_;
  Buffer<T> data_;
  Buffer<uint8_t> present_;
};

// Adds this strip's dV and computes its dB for one phase group. A task owns one cell row of the keys.
template <class T>
class PasteBackward {
 public:
  PasteBackward(const AttentionInputs<T>& inputs, const PhaseGroup& group, ValueCells<T>& values,
                const T* weighted_gradient, const AttentionStrip<T>& strip, const StripCells& part)
      : inputs_(inputs),
        group_(group),
        values_(values),
        strip_(strip),
        part_(part),
        cell_width_(inputs.queries.width + inputs.reach() - 1),
        cells_(static_cast<int64_t>(part.cells.size())),
        columns_(inputs.output_pixels(group).columns()),
        gradient_(weighted_gradient, inputs.output_pixels(group), cell_width_, cells_, part.cells.data()),
        gradient_tiles_(gradient_, cells_, columns_),
        chunk_(iota(kTileInner)) {}

  void run(CellGradients<T>& cell_gradients) {
    const GridSize key_cells = cell_grid(inputs_.keys, inputs_.reach());
    struct Worker {
      Buffer<T> sums, products;
      std::vector<int32_t> inner;
    };
    std::vector<Worker> workers(worker_count());
    const int64_t stride = round_up(key_cells.width, kTileColumns<T>);
    run_tasks(key_cells.height, cells_ * key_cells.width, [&](int64_t w, int64_t w_y) {
      Worker& worker = workers[w];
      if (worker.inner.empty()) {
        worker.sums = Buffer<T>(cells_ * stride + kTileRows, true);
        worker.products = Buffer<T>(kTileRows * stride);
        worker.inner.resize(cells_);
      }
      const std::vector<int32_t> present = diagonal_sums(w_y, worker.sums.get(), stride);
      if (present.empty()) return;
      add_value_gradient(w_y, worker.sums.get(), stride, present, worker.inner.data());
      cell_products(w_y, worker.sums.get(), present, worker.products.get(), stride, cell_gradients);
    });
  }

 private:
  // B of all cells of the strip with cell row w_y, [cells][stride]; the cells for which it is not zero.
  std::vector<int32_t> diagonal_sums(int64_t w_y, T* sums, int64_t stride) const {
    std::vector<int32_t> present;
    const int64_t width = inputs_.keys.width + inputs_.reach() - 1;
    for (int64_t i = 0; i < cells_; ++i) {
      bool first = true;
      for_each_term(part_.cells[i], w_y, [&](int32_t query, int64_t v, int64_t shift) {
        if (first) std::fill_n(sums + i * stride, width, T(0));
        first = false;
        add_scaled_row(sums + i * stride, strip_.row(query, v) - shift, strip_.inverse_sum(query), width);
      });
      if (!first) present.push_back(static_cast<int32_t>(i));
    }
    return present;
  }

  template <class Visit>
  void for_each_term(int64_t cell, int64_t w_y, const Visit& visit) const {
    const int64_t y = cell / cell_width_, x = cell % cell_width_;
    for (int64_t e = 0; e < group_.reach_y; ++e) {
      if (w_y - e < 0 || w_y - e >= inputs_.keys.height || y - e < 0 || y - e >= inputs_.queries.height) continue;
      for (int64_t d = 0; d < group_.reach_x; ++d) {
        if (x - d < 0 || x - d >= inputs_.queries.width) continue;
        const int32_t i = part_.queries.local((y - e) * inputs_.queries.width + x - d);
        if (i >= 0 && strip_.present(i, w_y - e)) visit(i, w_y - e, d);
      }
    }
  }

  // dV(w, n) += sum_u B(u, w) Y(u, n) for the cells w of one row.
  void add_value_gradient(int64_t w_y, const T* sums, int64_t stride, const std::vector<int32_t>& present,
                          int32_t* inner) const {
    const int64_t width = inputs_.keys.width + inputs_.reach() - 1;
    T rows[kTileRows * kTileColumns<T>];
    for (int64_t left = 0; left < width; left += kTileRows) {
      const int64_t count = std::min<int64_t>(kTileRows, width - left);
      int found = 0;
      for (const int32_t i : present) {
        const T* row = sums + i * stride + left;
        if (std::any_of(row, row + count, [](T x) { return x != 0; })) inner[found++] = i;
      }
      if (found == 0) continue;
      for (int64_t j = 0; j < gradient_.panels(); ++j) {
        multiply_transposed_tile(sums + left, stride, gradient_.panel(j), inner, found, rows, kTileColumns<T>);
        for (int64_t r = 0; r < count; ++r) {
          T* to = values_.gradient.get() + (w_y * width + left + r) * values_.stride + j * kTileColumns<T>;
          for (int64_t n = 0; n < kTileColumns<T>; ++n) to[n] += rows[r * kTileColumns<T> + n];
        }
      }
    }
  }

  // dB(u, w) = sum_n Y(u, n) V(w, n) for the cells w of one row, in the tiles where B is not zero; 0 in the others.
  void cell_products(int64_t w_y, const T* sums, const std::vector<int32_t>& present, T* products, int64_t stride,
                     CellGradients<T>& cell_gradients) const {
    const int64_t width = inputs_.keys.width + inputs_.reach() - 1;
    for (size_t begin = 0, end = 0; begin < present.size(); begin = end) {
      const int64_t group = present[begin] / kTileRows;
      while (end < present.size() && present[end] / kTileRows == group) ++end;
      for (int64_t j = 0; j < values_.by_cell.panels(); ++j) {
        const int64_t left = j * kTileColumns<T>, count = std::min<int64_t>(kTileColumns<T>, width - left);
        const bool any = std::any_of(present.begin() + begin, present.begin() + end, [&](int32_t cell) {
          const T* row = sums + cell * stride + left;
          return std::any_of(row, row + count, [](T x) { return x != 0; });
        });
        for (int64_t r = 0; !any && r < kTileRows; ++r) std::fill_n(products + r * stride + left, count, T(0));
        for (int64_t chunk = 0; any && chunk < gradient_tiles_.chunks(); ++chunk)
          multiply_tile(gradient_tiles_.tile(group, chunk),
                        values_.by_cell.panel(w_y, j) + chunk * kTileInner * kTileColumns<T>, chunk_.data(),
                        gradient_tiles_.chunk_size(chunk), products + left, stride, chunk > 0);
      }
      for (size_t i = begin; i < end; ++i) {
        std::copy_n(products + present[i] % kTileRows * stride, width, cell_gradients.row(present[i], w_y));
        cell_gradients.present(present[i], w_y) = 1;
      }
    }
  }

  const AttentionInputs<T>& inputs_;
  const PhaseGroup& group_;
  ValueCells<T>& values_;
  const AttentionStrip<T>& strip_;
  const StripCells& part_;
  int64_t cell_width_, cells_, columns_;
  CellPanels<T> gradient_;
  RowTiles<T> gradient_tiles_;
  std::vector<int32_t> chunk_;
};

// dA of the strip's queries: [queries][hk][wk + gap], rows present or zero.
template <class T>
class ProbabilityGradients {
 public:
  ProbabilityGradients(int64_t capacity, GridSize keys)
      : keys_(keys), data_(capacity * keys.count()), present_(capacity * keys.height) {}
  void clear(int64_t queries) { std::fill_n(present_.get(), queries * keys_.height, uint8_t{0}); }
  T* row(int64_t i, int64_t v) const { return data_.get() + (i * keys_.height + v) * keys_.width; }
  uint8_t& present(int64_t i, int64_t v) const { return present_[i * keys_.height + v]; }

 private:
  GridSize keys_;
  Buffer<T> data_;
  Buffer<uint8_t> present_;
};

// ---- The scores ----------------------------------------------------------------------------------------------------

// From dS (in the strip) to the gradients of query, key and key norm. Follows ScoreSweep's passes backwards, one key
// row after the other, while a sweep delivers S0 for the gradient of the norm.
template <class T>
class ScoreBackward {
 public:
  ScoreBackward(const QueryPlan& plan, const AttentionInputs<T>& inputs, const T* query, const KeyPanels<T>& keys,
                const CellPanels<T>& key_columns, const T* inverse_norm, const AttentionStrip<T>& score_gradients)
      : plan_(plan),
        inputs_(inputs),
        keys_(keys),
        key_columns_(key_columns),
        inverse_norm_(inverse_norm),
        score_gradients_(score_gradients),
        row_plan_(plan.rows, inputs.queries, inputs.semantics.patch, 0),
        width_(inputs.keys.width),
        sources_(pixel_list(row_plan_)),
        query_columns_(query, pixels_of(inputs.channels, inputs.queries), inputs.queries.width, sources_.size(),
                       sources_.data()),
        column_gradients_(3, plan.columns.size(), width_, std::max(1, plan.half)),
        row_gradients_(plan.before + plan.after + 1, plan.rows.size(), width_, 1),
        patch_gradients_(1, row_plan_.patches.size(), width_, std::max(plan.before, plan.after)),
        correlation_gradients_(1, sources_.size() + kTileRows, round_up(width_, kTileColumns<T>), 0),
        query_gradient_(sources_.size() * query_columns_.panels() * kTileColumns<T>, true),
        blocks_{kRowsPerBlock, plan.rows.size()},
        norm_terms_(blocks_.count() * inputs.keys.count(), true),
        query_(query) {
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
  }

  // Adds to dquery [C, hq, wq], dkey [keys][channels rounded up] and norm_sums [hk, wk] (sum over p of dS0 S0).
  void run(T* dquery, T* dkey, T* norm_sums) {
    const int64_t height = inputs_.keys.height;
    for (int64_t v = 0; v < std::min<int64_t>(2, height); ++v) fuse_columns(v);
    ScoreSweep<T>(row_plan_, query_, keys_, inputs_.keys, inverse_norm_)
        .run([&](int64_t v, int64_t i, const T* scores) { fuse_rows(v, i, scores); },
             [&](int64_t v) {
               if (v + 2 < height) fuse_columns(v + 2);
               if (v >= plan_.before) correlate(v - plan_.before, dkey);
             });
    for (int64_t v = std::max<int64_t>(0, height - plan_.before); v < height; ++v) correlate(v, dkey);
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

  // dT with key row v, from dS in the strip.
  void fuse_columns(int64_t v) {
    const int half = plan_.half;
    const int64_t height = inputs_.keys.height;
    run_tasks(plan_.columns.size(), width_, [&](int64_t, int64_t i) {
      const T* sources[kMaxFuse];
      for (int e = -half; e <= half; ++e) {
        const int32_t row = column_terms_[e + half][i];
        const int64_t wrap = v + e < 0 ? -1 : v + e >= height ? 1 : 0, key_row = v + e - wrap * height;
        const bool found = row >= 0 && score_gradients_.present(row, key_row);
        sources[e + half] = found ? score_gradients_.row(row, key_row) + wrap : nullptr;
      }
      column_gradients_.flag(v, i) = sum_present(column_gradients_.row(v, i), sources, 2 * half + 1, width_);
    });
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

  // dH and dG with key row v, and their products with the key and the query features.
  void correlate(int64_t v, T* dkey) {
    const int64_t pixels = static_cast<int64_t>(sources_.size());
    run_tasks(row_plan_.patches.size(), width_, [&](int64_t, int64_t i) {
      const T* sources[kMaxPatch];
      int count = 0;
      for (int dy = -plan_.after; dy <= plan_.before; ++dy) {
        const int32_t row = patch_terms_[dy + plan_.after][i];
        const bool inside = v + dy >= 0 && v + dy < inputs_.keys.height;
        sources[count++] = inside ? row_gradients_.present_row(v + dy, row) : nullptr;
      }
      patch_gradients_.flag(0, i) = sum_present(patch_gradients_.row(0, i), sources, count, width_);
    });
    run_tasks(ceil_div(pixels, kTileRows), kTileRows * width_, [&](int64_t, int64_t g) { add_query_gradient(g, v); });
    std::vector<int32_t> present;
    for (int64_t i = 0; i < pixels; ++i)
      if (correlation_gradients_.flag(0, i)) present.push_back(static_cast<int32_t>(i));
    if (!present.empty())
      run_tasks(ceil_div(width_, kTileRows), kTileRows * static_cast<int64_t>(present.size()),
                [&](int64_t, int64_t g) { add_key_gradient(g, v, present, dkey); });
  }

  // dG of kTileRows queries, and dquery += dG key.
  void add_query_gradient(int64_t group, int64_t v) {
    const int64_t begin = group * kTileRows, end = std::min<int64_t>(begin + kTileRows, sources_.size());
    const int64_t stride = query_columns_.panels() * kTileColumns<T>;
    bool any = false;
    for (int64_t i = begin; i < end; ++i) {
      const T* sources[kMaxPatch];
      int count = 0;
      for (int dx = -plan_.after; dx <= plan_.before; ++dx) {
        const T* row = patch_gradients_.present_row(0, pixel_terms_[dx + plan_.after][i]);
        sources[count++] = row ? row + dx : nullptr;
      }
      const bool present = sum_present(correlation_gradients_.row(0, i), sources, count, width_);
      correlation_gradients_.flag(0, i) = present;
      any |= present;
    }
    if (!any) return;
    Buffer<T> tile(kTileSize<T>);
    int32_t inner[kTileInner];
    for (int64_t left = 0; left < width_; left += kTileInner) {
      const int64_t count = std::min<int64_t>(kTileInner, width_ - left);
      for (int64_t r = 0; r < kTileRows; ++r) {
        T* to = tile.get() + r * kTileStride;
        const bool present = begin + r < end && correlation_gradients_.flag(0, begin + r);
        if (present)
          std::copy_n(correlation_gradients_.row(0, begin + r) + left, count, to);
        else
          std::fill_n(to, count, T(0));
      }
      const int found = nonzero_columns(tile.get(), static_cast<int>(count), inner);
      T sums[kTileRows * kTileColumns<T>];
      for (int64_t j = 0; found > 0 && j < query_columns_.panels(); ++j) {
        multiply_tile(tile.get(), key_columns_.panel(j) + (v * width_ + left) * kTileColumns<T>, inner, found, sums,
                      kTileColumns<T>, false);
        for (int64_t r = 0; r < end - begin; ++r)
          for (int64_t n = 0; n < kTileColumns<T>; ++n)
            query_gradient_[(begin + r) * stride + j * kTileColumns<T> + n] += sums[r * kTileColumns<T> + n];
      }
    }
  }

  // dkey(q) += sum over p of dG(p, q) query[p], for kTileRows keys q of key row v.
  void add_key_gradient(int64_t group, int64_t v, const std::vector<int32_t>& present, T* dkey) const {
    const int64_t left = group * kTileRows, count = std::min<int64_t>(kTileRows, width_ - left);
    const int64_t stride = query_columns_.panels() * kTileColumns<T>;
    const int64_t row_stride = correlation_gradients_.row(0, 1) - correlation_gradients_.row(0, 0);
    const T* gradients = correlation_gradients_.row(0, 0) + left;
    std::vector<int32_t> inner;
    for (const int32_t i : present) {
      const T* row = gradients + i * row_stride;
      if (std::any_of(row, row + count, [](T x) { return x != 0; })) inner.push_back(i);
    }
    if (inner.empty()) return;
    T sums[kTileRows * kTileColumns<T>];
    for (int64_t j = 0; j < query_columns_.panels(); ++j) {
      multiply_transposed_tile(gradients, row_stride, query_columns_.panel(j), inner.data(),
                               static_cast<int>(inner.size()), sums, kTileColumns<T>);
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
  const KeyPanels<T>& keys_;
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
  const T* query_;
  std::vector<std::vector<int32_t>> column_terms_, row_terms_, patch_terms_, pixel_terms_;
};

// ---- The softmax ---------------------------------------------------------------------------------------------------

// dA(p, q) += sum over e of dB(p + e, q + e), on the key rows that the strip holds.
template <class T>
void gather_probability_gradients(const AttentionInputs<T>& inputs, const PhaseGroup& group, const StripCells& part,
                                  const PositionList& cells, const CellGradients<T>& cell_gradients,
                                  const AttentionStrip<T>& strip, ProbabilityGradients<T>& gradients) {
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
                      const ProbabilityGradients<T>& gradients) {
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
void attend_backward(const AttentionInputs<T>& inputs, const T* gradient, const T* query, const T* key, const T* value,
                     NormRule rule, T eps, const T* norm, const KeyLogits<T>& logits, const bool* selected,
                     const Gradients<T>& out) {
  const Semantics& semantics = inputs.semantics;
  const KeyPanels<T> keys(key, inputs.channels, inputs.keys);
  const std::vector<std::pair<int64_t, int64_t>> single{{0, 0}};
  const CellPanels<T> key_columns(key, CellPixels{inputs.channels, inputs.keys.height, inputs.keys.width, 1, 0, single},
                                  inputs.keys.width, inputs.keys.count());
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
  const std::vector<StripCells> parts = cut_strips(wanted_cells(selected, inputs.queries, semantics), inputs.queries,
                                                   inputs.reach(), inputs.capacity(kBackwardStripBytes));
  int64_t query_capacity = 0, cell_capacity = 0;
  for (const StripCells& part : parts) {
    query_capacity = std::max(query_capacity, part.queries.size());
    cell_capacity = std::max(cell_capacity, static_cast<int64_t>(part.cells.size()));
  }
  AttentionStrip<T> strip(query_capacity, inputs.keys, inputs.reach());
  ProbabilityGradients<T> probability_gradients(query_capacity, inputs.keys);
  Buffer<T> dkey(inputs.keys.count() * key_columns.panels() * kTileColumns<T>, true);
  Buffer<T> norm_sums(inputs.keys.count(), true);
  Semantics unclamped = semantics;
  unclamped.floor = -1;
  for (const StripCells& part : parts) {
    stop_if_interrupted();
    const QueryPlan plan(part.queries, inputs.queries, semantics.patch, semantics.fuse);
    strip.compute(plan, query, keys, inverse_norm.get(), logits, semantics);
    probability_gradients.clear(plan.scores.size());
    std::vector<uint8_t> wanted(cells.count(), 0);
    for (const int64_t cell : part.cells) wanted[cell] = 1;
    const PositionList strip_cells(wanted);
    {
      CellGradients<T> cell_gradients(cell_capacity, key_cells);
      for (size_t g = 0; g < groups.size(); ++g) {
        cell_gradients.clear(strip_cells.size());
        PasteBackward<T>(inputs, groups[g], values[g], weighted.get(), strip, part).run(cell_gradients);
        gather_probability_gradients(inputs, groups[g], part, strip_cells, cell_gradients, strip,
                                     probability_gradients);
      }
    }
    if (semantics.floor >= 0) strip.compute(plan, query, keys, inverse_norm.get(), logits, unclamped);
    softmax_backward(strip, plan.scores.size(), logits, semantics.floor, probability_gradients);
    ScoreBackward<T>(plan, inputs, query, keys, key_columns, inverse_norm.get(), strip)
        .run(out.query, dkey.get(), norm_sums.get());
  }
  for (size_t g = 0; g < groups.size(); ++g) values[g].scatter(inputs.value_pixels(groups[g]), key_cells, out.value);
  run_tasks(inputs.channels, inputs.keys.count(), [&](int64_t, int64_t c) {
    for (int64_t q = 0; q < inputs.keys.count(); ++q)
      out.key[c * inputs.keys.count() + q] = dkey[q * key_columns.panels() * kTileColumns<T> + c];
  });
  add_norm_gradient(inputs, rule, eps, key, norm, norm_sums.get(), out.key);
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
      attend_backward(inputs, gradient.const_data_ptr<T>() + plane(gradient), query.const_data_ptr<T>() + plane(query),
                      key.const_data_ptr<T>() + plane(key), value.const_data_ptr<T>() + plane(value),
                      parse_norm_rule(norm_rule), static_cast<T>(eps),
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
