// The paste's adjoint: from the gradient of the output to those of the value map and of the diagonal sums.
//
// With Y the weighted output gradient as cells: dV(w) = sum_u B(u, w) Y(u) and dB(u, w) = <Y(u), V(w)>.
#pragma once

#include "contextual_attention.h"

namespace inpaint {

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

inline std::vector<int32_t> iota(int64_t count) {
  std::vector<int32_t> result(count);
  for (int64_t i = 0; i < count; ++i) result[i] = static_cast<int32_t>(i);
  return result;
}

// One phase group's share of a call: the value cells, and the gradient of the value cells.
template <class T>
struct ValueCells {
  RowPanels<T> by_cell;  // [cell rows][cells of a row]: inner index columns
  int64_t stride;        // columns, rounded up to whole panels
  Buffer<T> gradient;    // [cells][stride]

  ValueCells(const T* value, const CellPixels& pixels, GridSize cells)
      : by_cell(packed(value, pixels, cells)),
        stride(round_up(pixels.columns(), kTileColumns<T>)),
        gradient(cells.count() * stride, true) {}

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
  static RowPanels<T> packed(const T* value, const CellPixels& pixels, GridSize cells) {
    const int64_t phases = static_cast<int64_t>(pixels.phases.size()), plane = pixels.height * pixels.width;
    const Buffer<T> map(pixels.columns() * cells.count());  // [columns, cell rows, cells of a row]
    run_tasks(pixels.columns(), cells.count(), [&](int64_t, int64_t n) {
      for (int64_t cell = 0; cell < cells.count(); ++cell) {
        const int64_t pixel = pixels.pixel(cell / cells.width, cell % cells.width, n % phases);
        map[n * cells.count() + cell] = pixel < 0 ? T(0) : value[n / phases * plane + pixel];
      }
    });
    RowPanels<T> panels({map.get(), pixels.columns(), cells, cells.count(), cells.width, 1}, cells.height);
    run_tasks(cells.height, cells.width * pixels.columns(), [&](int64_t, int64_t y) { panels.pack(y); });
    return panels;
  }
};

// Gradients of a strip, [queries or cells][rows of the key grid][columns], whose rows are present or all zero: dA of
// its queries and dB of its cells.
template <class T>
class SparseRows {
 public:
  SparseRows(int64_t capacity, GridSize grid)
      : grid_(grid), data_(capacity * grid.count()), present_(capacity * grid.height) {}
  void clear(int64_t count) { std::fill_n(present_.get(), count * grid_.height, uint8_t{0}); }
  T* row(int64_t i, int64_t y) const { return data_.get() + (i * grid_.height + y) * grid_.width; }
  uint8_t& present(int64_t i, int64_t y) const { return present_[i * grid_.height + y]; }

 private:
  GridSize grid_;
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
        gradient_(FlatMap<T>::planes(weighted_gradient, inputs.output_pixels(group).count()),
                  inputs.output_pixels(group), cell_width_, cells_, part.cells.data()),
        gradient_tiles_(gradient_, cells_, columns_),
        chunk_(iota(kTileInner)) {}

  void run(SparseRows<T>& cell_gradients) {
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
      const T* rows[kMaxPasteTerms];
      T weights[kMaxPasteTerms];
      int used = 0;
      for_each_term(part_.cells[i], w_y, [&](int32_t query, int64_t v, int64_t shift) {
        rows[used] = strip_.row(query, v) - shift;
        weights[used++] = strip_.inverse_sum(query);
      });
      if (used == 0) continue;
      weighted_sum(sums + i * stride, rows, weights, used, width);
      present.push_back(static_cast<int32_t>(i));
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
                     SparseRows<T>& cell_gradients) const {
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

}  // namespace inpaint
