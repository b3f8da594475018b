// The host side of contextual_attention's CPU kernels: which cells are wanted, and how they are cut into strips.
#pragma once

#include <dlfcn.h>

#include "attention_strip.h"

namespace inpaint {

Tensor contextual_attention_key_norm(const Tensor& key, int64_t patch, const std::string& rule_name, double eps);

// Python's signal check, where this process runs Python: an interrupted kernel stops between two strips.
inline void stop_if_interrupted() {
  using Ensure = int (*)();
  using Release = void (*)(int);
  using Check = int (*)();
  static const auto ensure = reinterpret_cast<Ensure>(dlsym(RTLD_DEFAULT, "PyGILState_Ensure"));
  static const auto release = reinterpret_cast<Release>(dlsym(RTLD_DEFAULT, "PyGILState_Release"));
  static const auto check = reinterpret_cast<Check>(dlsym(RTLD_DEFAULT, "PyErr_CheckSignals"));
  static const auto clear = reinterpret_cast<void (*)()>(dlsym(RTLD_DEFAULT, "PyErr_Clear"));
  if (!ensure || !release || !check || !clear) return;
  const int state = ensure();
  const bool interrupted = check() != 0;
  if (interrupted) clear();
  release(state);
  STD_TORCH_CHECK(!interrupted, "inpaint_kernels: interrupted");
}

// A strip holds exp(logits) of some rows of queries: as many as keep the halo small (four rows more are correlated),
// but not so many that fresh memory costs more than the halo saves (measured at 4,096 and 9,216 keys: as fast as one
// strip of everything, at a third of its memory; three strips for 4,096 keys beside two of 38 rows: 0.43 CPU seconds
// for either, 0.77 and 0.74 where every key has a weight, and 16 MiB less that are kept between calls), and within what
// one call may take for strips, value cells and output.
constexpr int64_t kStripRows = 16;
constexpr int64_t kStripMinBytes = int64_t{24} << 20, kStripMaxBytes = int64_t{640} << 20;
constexpr int64_t kWorkspaceBytes = int64_t{880} << 20, kWorkspaceMinBytes = int64_t{160} << 20;
// Value cells are packed once where they fit into this, else band by band for every strip.
constexpr int64_t kValueBytes = int64_t{160} << 20, kValueBandBytes = int64_t{64} << 20;

// The backward holds three arrays of a strip's size (probabilities, their gradients and those of their diagonal sums):
// as many rows of queries as keep the halo small, within these bounds.
constexpr int64_t kBackwardStripRows = 8;
constexpr int64_t kBackwardStripMinBytes = int64_t{40} << 20, kBackwardStripMaxBytes = int64_t{256} << 20;

// The queries whose probabilities the cells [begin, end) need, as a mask over the query grid.
inline void mark_queries(const std::vector<int64_t>& cells, int64_t begin, int64_t end, GridSize queries, int64_t reach,
                         std::vector<uint8_t>& wanted, int64_t* count) {
  const int64_t cell_width = queries.width + reach - 1;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t y = cells[i] / cell_width, x = cells[i] % cell_width;
    for (int64_t e = 0; e < reach; ++e) {
      for (int64_t d = 0; d < reach; ++d) {
        if (y - e < 0 || y - e >= queries.height || x - d < 0 || x - d >= queries.width) continue;
        uint8_t& mark = wanted[(y - e) * queries.width + x - d];
        *count += !mark;
        mark = 1;
      }
    }
  }
}

// Cells of the output that are wanted, in order: all of them, or those that touch the rate x rate pixels of a selected
// query.
inline std::vector<int64_t> wanted_cells(const bool* selected, GridSize queries, const Semantics& semantics) {
  const GridSize cells = cell_grid(queries, semantics.reach());
  std::vector<uint8_t> wanted(cells.count(), selected == nullptr);
  for (int64_t p = 0; selected && p < queries.count(); ++p) {
    if (!selected[p]) continue;
    const auto range = [&](int64_t position, int64_t limit) {
      const int64_t first = position * semantics.rate + semantics.pad_put;
      return std::pair<int64_t, int64_t>(first / semantics.rate,
                                         std::min(limit - 1, (first + semantics.rate - 1) / semantics.rate));
    };
    const auto [top, bottom] = range(p / queries.width, cells.height);
    const auto [left, right] = range(p % queries.width, cells.width);
    for (int64_t y = top; y <= bottom; ++y)
      for (int64_t x = left; x <= right; ++x) wanted[y * cells.width + x] = 1;
  }
  std::vector<int64_t> list;
  for (int64_t i = 0; i < cells.count(); ++i)
    if (wanted[i]) list.push_back(i);
  return list;
}

// Cells in the widest row of the list, but not more than there are queries in a row.
inline int64_t widest_row(const std::vector<int64_t>& cells, GridSize queries, int64_t reach) {
  const int64_t cell_width = queries.width + reach - 1;
  int64_t row = -1, count = 0, widest = 1;
  for (const int64_t cell : cells) {
    count = cell / cell_width == row ? count + 1 : 1;
    row = cell / cell_width;
    widest = std::max(widest, count);
  }
  return std::min(widest, queries.width);
}

// A piece of the wanted cells and the queries it needs.
struct StripCells {
  std::vector<int64_t> cells;
  PositionList queries;
};

// Cuts the cells, at row ends where possible, so that no piece needs more than `capacity` queries (or more than one
// cell's).
inline std::vector<StripCells> cut_strips(const std::vector<int64_t>& cells, GridSize queries, int64_t reach,
                                          int64_t capacity) {
  const int64_t cell_width = queries.width + reach - 1, total = static_cast<int64_t>(cells.size());
  std::vector<StripCells> strips;
  for (int64_t begin = 0; begin < total;) {
    std::vector<uint8_t> wanted(queries.count(), 0);
    int64_t count = 0, end = begin, row_end = begin;
    while (end < total) {
      mark_queries(cells, end, end + 1, queries, reach, wanted, &count);
      if (count > capacity && end > begin) break;
      ++end;
      if (end == total || cells[end] / cell_width != cells[end - 1] / cell_width) row_end = end;
    }
    if (row_end > begin) end = row_end;
    std::fill(wanted.begin(), wanted.end(), 0);
    count = 0;
    mark_queries(cells, begin, end, queries, reach, wanted, &count);
    strips.push_back({{cells.begin() + begin, cells.begin() + end}, PositionList(wanted)});
    begin = end;
  }
  return strips;
}

// Everything about one call that does not depend on the strip.
template <class T>
struct AttentionInputs {
  GridSize queries, keys;
  int64_t channels, value_channels, value_height, value_width;
  Semantics semantics;

  AttentionInputs(const Tensor& query, const Tensor& key, const Tensor& value, const Semantics& s)
      : queries{query.size(2), query.size(3)},
        keys{key.size(2), key.size(3)},
        channels(query.size(1)),
        value_channels(value.size(1)),
        value_height(value.size(2)),
        value_width(value.size(3)),
        semantics(s) {
    check_rank(query, "query", 4);
    check_rank(key, "key", 4);
    check_rank(value, "value", 4);
    STD_TORCH_CHECK(value.size(2) == 1 || value.size(3) == 1 || value.stride(2) == value.size(3) * value.stride(3),
                    "value: expected the rows of a plane one after the other");
    STD_TORCH_CHECK(s.patch <= kMaxPatch && s.fuse <= kMaxFuse, "patch, fuse: expected at most ", kMaxPatch);
  }
  int64_t reach() const { return semantics.reach(); }
  // Queries that fit into a strip of `bytes`.
  int64_t capacity(int64_t bytes) const {
    const int64_t row = keys.height * (keys.width + reach()) * static_cast<int64_t>(sizeof(T));
    return std::max<int64_t>(1, std::min(bytes / row, queries.count()));
  }
  // The same for `rows` rows of `width` queries, within bounds.
  int64_t capacity_of_rows(int64_t rows, int64_t width, int64_t min_bytes, int64_t max_bytes) const {
    const int64_t bytes = rows * width * keys.count() * static_cast<int64_t>(sizeof(T));
    return capacity(std::clamp(bytes, min_bytes, max_bytes));
  }
  CellPixels value_pixels(const PhaseGroup& group) const {
    return {value_channels, value_height, value_width, semantics.rate, semantics.pad_cut, group.phases};
  }
  CellPixels output_pixels(const PhaseGroup& group) const {
    return {value_channels,
            semantics.rate * queries.height,
            semantics.rate * queries.width,
            semantics.rate,
            semantics.pad_put,
            group.phases};
  }
};

inline std::vector<int64_t> shape_of(const Tensor& x) { return {x.size(0), x.size(1), x.size(2), x.size(3)}; }

template <class T>
Buffer<T> reciprocals(const T* values, int64_t count) {
  Buffer<T> result(count);
  for (int64_t i = 0; i < count; ++i) result[i] = T(1) / values[i];
  return result;
}

// 1 / (number of patches that cover a pixel) or 1 / the constant, for every output row or column.
template <class T>
std::vector<T> coverage_weights(int64_t positions, const Semantics& semantics) {
  std::vector<T> weights(semantics.rate * positions);
  for (int64_t pixel = 0; pixel < semantics.rate * positions; ++pixel) {
    int64_t covering = 0;
    for (int64_t e = 0; e < semantics.reach(); ++e) {
      const int64_t p = (pixel + semantics.pad_put) / semantics.rate - e;
      covering += p >= 0 && p < positions && pixel + semantics.pad_put - semantics.rate * p < semantics.paste_size;
    }
    weights[pixel] = T(1) / static_cast<T>(std::max<int64_t>(1, covering));
  }
  return weights;
}

// What an output pixel is multiplied by: 1 / divisor where it is wanted, 0 elsewhere.
template <class T>
class PixelWeights {
 public:
  PixelWeights(GridSize queries, const Semantics& semantics, const bool* selected)
      : queries_(queries),
        rate_(semantics.rate),
        selected_(selected),
        divisor_(static_cast<T>(semantics.divisor)),
        rows_(coverage_weights<T>(queries.height, semantics)),
        columns_(coverage_weights<T>(queries.width, semantics)) {}
  T operator()(int64_t pixel) const {
    const int64_t width = rate_ * queries_.width, y = pixel / width, x = pixel % width;
    if (selected_ && !selected_[y / rate_ * queries_.width + x / rate_]) return T(0);
    return divisor_ > 0 ? T(1) / divisor_ : rows_[y] * columns_[x];
  }

 private:
  GridSize queries_;
  int64_t rate_;
  const bool* selected_;
  T divisor_;
  std::vector<T> rows_, columns_;
};

constexpr int kMaxPasteTerms = 64;  // of one diagonal sum: reach^2

// The diagonal sums B(u, w) of kTileRows cells with a piece of the cell rows of the keys, as a tile for multiply_tile.
template <class T>
class DiagonalTile {
 public:
  DiagonalTile(const AttentionStrip<T>& strip, const PositionList& queries, GridSize query_grid, int64_t reach)
      : strip_(strip),
        queries_(queries),
        query_grid_(query_grid),
        cell_width_(query_grid.width + reach - 1),
        tile_(kTileSize<T>, true),
        inner_(kTileInner) {}

  // The cells that the next tiles are of: cells[0..count), at most kTileRows.
  void set_cells(const int64_t* cells, int64_t count, const PhaseGroup& group) {
    const int64_t key_rows = strip_.keys().height;
    alive_.assign(key_rows + group.reach_y - 1, 0);
    for (int64_t r = 0; r < kTileRows; ++r) {
      terms_[r].clear();
      if (r >= count) continue;
      const int64_t y = cells[r] / cell_width_, x = cells[r] % cell_width_;
      for (int64_t e = 0; e < group.reach_y; ++e) {
        if (y - e < 0 || y - e >= query_grid_.height) continue;
        for (int64_t d = 0; d < group.reach_x; ++d) {
          if (x - d < 0 || x - d >= query_grid_.width) continue;
          const int32_t i = queries_.local((y - e) * query_grid_.width + x - d);
          if (i < 0) continue;
          terms_[r].push_back({i, static_cast<int32_t>(e), static_cast<int32_t>(d)});
          const uint8_t* present = strip_.present_rows(i);
          for (int64_t v = 0; v < key_rows; ++v) alive_[v + e] |= present[v];
        }
      }
    }
  }

  // Their sums with key cells (top + t / width, left + t % width) for t in [0, length). Returns whether any is not
  // zero; then inner() lists the t in which one is.
  bool build(int64_t top, int64_t left, int64_t width, int64_t length) {
    int found = 0;
    for (int64_t t = 0; t < length; t += width) {
      const int64_t w_y = top + t / width;
      if (w_y >= static_cast<int64_t>(alive_.size()) || !alive_[w_y]) continue;
      build_row(w_y, left, width, tile_.get() + t);
      const int first = found;
      found += nonzero_columns(tile_.get() + t, static_cast<int>(width), inner_.data() + found);
      for (int i = first; i < found; ++i) inner_[i] += static_cast<int32_t>(t);
    }
    count_ = found;
    return found > 0;
  }
  const T* tile() const { return tile_.get(); }
  const int32_t* inner() const { return inner_.data(); }
  int count() const { return count_; }

 private:
  // One probability row of a diagonal sum: A(u - (e, d), .) of the strip's query `query`.
  struct Term {
    int32_t query, e, d;
  };

  void build_row(int64_t w_y, int64_t left, int64_t width, T* to) {
    const T* rows[kMaxPasteTerms];
    T weights[kMaxPasteTerms];
    for (int64_t r = 0; r < kTileRows; ++r) {
      int used = 0;
      for (const Term& term : terms_[r]) {
        const int64_t v = w_y - term.e;
        if (v < 0 || v >= strip_.keys().height || !strip_.present(term.query, v)) continue;
        rows[used] = strip_.row(term.query, v) + left - term.d;
        weights[used++] = strip_.inverse_sum(term.query);
      }
      weighted_sum(to + r * kTileStride, rows, weights, used, width);
    }
  }

  const AttentionStrip<T>& strip_;
  const PositionList& queries_;
  GridSize query_grid_;
  int64_t cell_width_;
  Buffer<T> tile_;
  std::vector<Term> terms_[kTileRows];
  std::vector<uint8_t> alive_;  // by cell row of the keys: whether any cell has a sum that is not zero
  std::vector<int32_t> inner_;
  int count_ = 0;
};

// Pieces of the key cells that fit into a tile: several whole cell rows, or a part of one.
struct KeyPiece {
  int64_t top, left, width, length;  // length: cells in all
  int64_t first_cell(int64_t cell_width) const { return top * cell_width + left; }
};

inline std::vector<KeyPiece> key_pieces(GridSize cells) {
  std::vector<KeyPiece> pieces;
  if (cells.width <= kTileInner) {
    const int64_t rows = kTileInner / cells.width;
    for (int64_t top = 0; top < cells.height; top += rows)
      pieces.push_back({top, 0, cells.width, std::min(rows, cells.height - top) * cells.width});
    return pieces;
  }
  for (int64_t top = 0; top < cells.height; ++top) {
    for (int64_t left = 0; left < cells.width; left += kTileInner) {
      const int64_t width = std::min<int64_t>(kTileInner, cells.width - left);
      pieces.push_back({top, left, width, width});
    }
  }
  return pieces;
}

}  // namespace inpaint
