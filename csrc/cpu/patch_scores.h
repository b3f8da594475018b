// Patch scores of query positions against all keys, key row by key row, in memory that does not grow with the keys.
//
// Pixel correlations G(p, q) = <query[p], key[q]> of one key row are a matrix product. Everything after it is a sum
// along diagonals, where p and q step together:
//   H(p, q)  = sum_dx G(p + (0, dx), q + (0, dx))        the patch, horizontally (in the worker's scratch)
//   S0(p, q) = sum_dy H(p + (dy, 0), q + (dy, 0)) / n_q  the patch, vertically
//   T(p, q)  = sum_d  S0(R_d p, R_d q)                   the fuse's row-major pass
//   S(p, q)  = sum_e  T(C_e p, C_e q)                    the fuse's column-major pass
// On the query side a step is a look-up in an index list, so borders, the fuse's wrap-around, boxes and scattered
// queries are all the same code. On the key side it is a shift of a contiguous row, or another key row out of a short
// ring.
#pragma once

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include "../common.h"
#include "../math/contextual_attention.h"
#include "memory.h"
#include "simd.h"
#include "tasks.h"
#include "tile_gemm.h"

namespace inpaint {

constexpr int64_t kRowsPerBlock = 192;  // a multiple of kTileRows whose correlations with a key row fit in L2

constexpr int kMaxPatch = 63, kMaxFuse = 63;  // sources of one diagonal sum

struct GridSize {
  int64_t height, width;
  int64_t count() const { return height * width; }
};

// The optional per-key tensors [B or 1, hk, wk] of a call, for one sample (a batch of 1 serves all).
template <class T>
const T* sample_of(const std::optional<Tensor>& tensor, int64_t sample) {
  if (!tensor) return nullptr;
  const int64_t size = tensor->size(1) * tensor->size(2);
  return static_cast<const T*>(tensor->data_ptr()) + (tensor->size(0) > 1 ? sample * size : 0);
}

// ---- Maps --------------------------------------------------------------------------------------------------------

// A [C, H, W] map of any strides.
template <class T>
struct MapView {
  const T* data;
  int64_t channels;
  GridSize grid;
  int64_t channel_stride, row_stride, column_stride;

  const T* at(int64_t channel, int64_t y, int64_t x) const {
    return data + channel * channel_stride + y * row_stride + x * column_stride;
  }
};

template <class T>
MapView<T> view_of(const Tensor& map, int64_t sample) {
  return {map.const_data_ptr<T>() + sample * map.stride(0),
          map.size(1),
          {map.size(2), map.size(3)},
          map.stride(1),
          map.stride(2),
          map.stride(3)};
}

// Rows of a map as panels for multiply_tile: [kept rows][panels][C][kTileColumns], zero beyond the last column.
template <class T>
class RowPanels {
 public:
  RowPanels(const MapView<T>& map, int64_t kept_rows)
      : map_(map),
        panels_(ceil_div(map.grid.width, kTileColumns<T>)),
        kept_(kept_rows),
        data_(kept_ * row_size(), true) {}
  int64_t channels() const { return map_.channels; }
  int64_t panels() const { return panels_; }
  const T* panel(int64_t y, int64_t j) const {
    return data_.get() + y % kept_ * row_size() + j * channels() * kTileColumns<T>;
  }

  // Gathers row y; it replaces row y - kept_rows.
  void pack(int64_t y) const {
    for (int64_t j = 0; j < panels_; ++j) {
      const int64_t first = j * kTileColumns<T>, count = std::min<int64_t>(kTileColumns<T>, map_.grid.width - first);
      T* to = data_.get() + y % kept_ * row_size() + j * channels() * kTileColumns<T>;
      for (int64_t c = 0; c < channels(); ++c, to += kTileColumns<T>)
        for (int64_t x = 0; x < count; ++x) to[x] = *map_.at(c, y, first + x);
    }
  }

 private:
  int64_t row_size() const { return panels_ * channels() * kTileColumns<T>; }
  MapView<T> map_;
  int64_t panels_, kept_;
  Buffer<T> data_;
};

// ---- Queries -----------------------------------------------------------------------------------------------------

constexpr int32_t kNowhere = -1;

// A sorted list of grid positions with the inverse map.
class PositionList {
 public:
  PositionList() = default;
  explicit PositionList(const std::vector<uint8_t>& wanted) : local_(wanted.size(), kNowhere) {
    for (size_t p = 0; p < wanted.size(); ++p) {
      if (!wanted[p]) continue;
      local_[p] = static_cast<int32_t>(positions_.size());
      positions_.push_back(static_cast<int64_t>(p));
    }
  }
  int64_t size() const { return static_cast<int64_t>(positions_.size()); }
  int64_t operator[](int64_t i) const { return positions_[i]; }
  // Where a position stands in the list; kNowhere for one that is not in it or negative.
  int32_t local(int64_t position) const { return position < 0 ? kNowhere : local_[position]; }

 private:
  std::vector<int64_t> positions_;
  std::vector<int32_t> local_;
};

// The queries each pass needs so that `scores` are complete, and where each finds its terms in the list before it.
struct QueryPlan {
  GridSize grid;
  int before, after;                               // reach of the patch around its position
  int half;                                        // reach of the fuse, 0: none
  PositionList scores, columns, rows, patches;     // S, T, S0 and H
  std::vector<std::vector<int32_t>> column_terms;  // [e][i]: C_e of scores[i] in columns
  std::vector<std::vector<int32_t>> row_terms;     // [d][i]: R_d of columns[i] in rows
  std::vector<std::vector<int32_t>> patch_terms;   // [dy][i]: rows[i] + (dy, 0) in patches

  QueryPlan(PositionList wanted, GridSize size, int64_t patch, int64_t fuse)
      : grid(size),
        before(static_cast<int>((patch - 1) / 2)),
        after(static_cast<int>(patch - 1) - before),
        half(static_cast<int>(fuse / 2)),
        scores(std::move(wanted)) {
    const auto column = [&](int64_t p, int e) { return column_neighbour(p, e, grid.height, grid.width); };
    const auto row = [&](int64_t p, int d) { return row_neighbour(p, d, grid.count()); };
    const auto below = [&](int64_t p, int dy) {
      const int64_t q = p + dy * grid.width;
      return q >= 0 && q < grid.count() ? q : kNowhere;
    };
    columns = neighbours(scores, -half, half, column);
    rows = neighbours(columns, -half, half, row);
    patches = neighbours(rows, -before, after, below);
    column_terms = terms(scores, columns, -half, half, column);
    row_terms = terms(columns, rows, -half, half, row);
    patch_terms = terms(rows, patches, -before, after, below);
  }

  // Where every step of every list entry stands in `source`: [step][entry], kNowhere if it does not.
  template <class Step>
  static std::vector<std::vector<int32_t>> terms(const PositionList& list, const PositionList& source, int first,
                                                 int last, const Step& step) {
    std::vector<std::vector<int32_t>> result;
    for (int d = first; d <= last; ++d) {
      auto& found = result.emplace_back(list.size());
      for (int64_t i = 0; i < list.size(); ++i) found[i] = source.local(step(list[i], d));
    }
    return result;
  }

 private:
  template <class Step>
  PositionList neighbours(const PositionList& list, int first, int last, const Step& step) const {
    std::vector<uint8_t> wanted(grid.count(), 0);
    for (int64_t i = 0; i < list.size(); ++i)
      for (int d = first; d <= last; ++d)
        if (const int64_t q = step(list[i], d); q >= 0) wanted[q] = 1;
    return PositionList(wanted);
  }
};

// Consecutive pieces of a list of `count` rows.
struct Blocks {
  int64_t rows_per_block, total;
  int64_t count() const { return ceil_div(total, rows_per_block); }
  int64_t begin(int64_t block) const { return block * rows_per_block; }
  int64_t end(int64_t block) const { return std::min(total, (block + 1) * rows_per_block); }
};

// One block of QueryPlan::patches with the queries whose correlations it needs, packed as tiles for multiply_tile.
template <class T>
struct CorrelationBlock {
  int64_t groups = 0;                       // of kTileRows correlation rows
  std::vector<std::vector<int32_t>> terms;  // [dx][i]: row of the correlations, kNowhere outside the map
  Buffer<T> tiles;                          // [groups][chunks of kTileInner channels][kTileSize]
};

// Blocks are cut at the ends of grid rows where that is possible: there the patch has no neighbours to share.
inline Blocks patch_blocks(const QueryPlan& plan) {
  const int64_t width = plan.grid.width;
  const int64_t rows = width >= kRowsPerBlock ? ceil_div(width, ceil_div(width, kRowsPerBlock + kRowsPerBlock / 2))
                                              : ceil_div(kRowsPerBlock, width) * width;
  return {rows, plan.patches.size()};
}

template <class T>
CorrelationBlock<T> correlation_block(const QueryPlan& plan, int64_t begin, int64_t end, const MapView<T>& query) {
  CorrelationBlock<T> block;
  const GridSize grid = plan.grid;
  const int64_t channels = query.channels;
  const auto beside = [&](int64_t p, int dx) -> int64_t {
    const int64_t x = p % grid.width + dx;
    return x >= 0 && x < grid.width ? p + dx : kNowhere;
  };
  std::vector<int64_t> needed;
  for (int64_t i = begin; i < end; ++i)
    for (int dx = -plan.before; dx <= plan.after; ++dx)
      if (const int64_t p = beside(plan.patches[i], dx); p >= 0) needed.push_back(p);
  std::sort(needed.begin(), needed.end());
  needed.erase(std::unique(needed.begin(), needed.end()), needed.end());
  const auto local = [&](int64_t p) {
    return p < 0 ? kNowhere : static_cast<int32_t>(std::lower_bound(needed.begin(), needed.end(), p) - needed.begin());
  };
  for (int dx = -plan.before; dx <= plan.after; ++dx) {
    auto& found = block.terms.emplace_back(end - begin);
    for (int64_t i = begin; i < end; ++i) found[i - begin] = local(beside(plan.patches[i], dx));
  }
  const int64_t chunks = ceil_div(channels, kTileInner), count = static_cast<int64_t>(needed.size());
  block.groups = ceil_div(count, kTileRows);
  block.tiles = Buffer<T>(block.groups * chunks * kTileSize<T>, true);
  for (int64_t c = 0; c < channels; ++c) {
    T* column = block.tiles.get() + c / kTileInner * kTileSize<T> + c % kTileInner;
    for (int64_t i = 0; i < count; ++i)
      column[(i / kTileRows) * chunks * kTileSize<T> + i % kTileRows * kTileStride] =
          *query.at(c, needed[i] / grid.width, needed[i] % grid.width);
  }
  return block;
}

// ---- The sweep ---------------------------------------------------------------------------------------------------

// Rings of one value per (query of a list, key of one key row), a slab per key row. Around each row's keys there are
// `border` values that a row shares with the next: zeros, unless somebody writes them.
template <class T>
class SlabRing {
 public:
  SlabRing() = default;
  SlabRing(int64_t slabs, int64_t rows, int64_t width, int64_t border)
      : slabs_(slabs),
        rows_(rows),
        border_(round_up(border, kLanes<T>)),
        stride_(border_ + round_up(width, kLanes<T>)),
        data_(slabs * rows * stride_ + border_, true) {}
  int64_t stride() const { return stride_; }
  T* row(int64_t slab, int64_t i) const { return data_.get() + (slab % slabs_ * rows_ + i) * stride_ + border_; }

 private:
  int64_t slabs_ = 1, rows_ = 0, border_ = 0, stride_ = 0;
  Buffer<T> data_;
};

// Runs the passes over all key rows and hands every finished row S(p, key row v) to `emit(v, i, row)`, i indexing
// plan.scores, row of wk values that emit may overwrite. For one i the calls come one after the other, in an order of v
// that is always the same (with a fuse, the first fuse / 2 key rows come last).
template <class T>
class ScoreSweep {
 public:
  // inverse_norm [hk, wk] or null for 1.
  ScoreSweep(const QueryPlan& plan, const MapView<T>& query, const MapView<T>& key, const T* inverse_norm)
      : plan_(plan),
        keys_(key, 2),
        grid_(key.grid),
        inverse_norm_(inverse_norm),
        patch_blocks_(patch_blocks(plan)),
        column_blocks_{kRowsPerBlock, plan.columns.size()},
        score_blocks_{kRowsPerBlock, plan.scores.size()},
        inner_(std::min<int64_t>(kTileInner, key.channels)),
        workers_(worker_count()) {
    blocks_.resize(patch_blocks_.count());
    run_tasks(patch_blocks_.count(), kRowsPerBlock * key.channels, [&](int64_t, int64_t b) {
      blocks_[b] = correlation_block(plan_, patch_blocks_.begin(b), patch_blocks_.end(b), query);
    });
    for (int64_t k = 0; k < static_cast<int64_t>(inner_.size()); ++k) inner_[k] = static_cast<int32_t>(k);
    allocate();
    if (grid_.height > 0) keys_.pack(0);
  }

  template <class Emit>
  void run(const Emit& emit) {
    run_phases(phases(), tasks(), work(), [&](int64_t worker, int64_t t, int64_t b) { step(worker, t, b, emit); });
  }

  // The sweep as `phases()` phases of `tasks()` tasks each, for run_phases. In phase t every pass works on a key row
  // whose terms the phases before have finished: correlations of key row t, S0 and T of `summed(t)`, S of `fused(t)`.
  int64_t phases() const { return grid_.height + emit_lag() + std::min<int64_t>(plan_.half, grid_.height); }
  int64_t tasks() const { return 1 + blocks(); }
  int64_t work() const {
    return grid_.width * keys_.channels() * std::min<int64_t>(kRowsPerBlock, plan_.patches.size());
  }
  int64_t summed(int64_t t) const { return t - sum_lag(); }

  template <class Emit>
  void step(int64_t worker, int64_t t, int64_t b, const Emit& emit) {
    if (b == blocks()) {
      if (t + 1 < grid_.height) keys_.pack(t + 1);
      return;
    }
    if (t < grid_.height && b < patch_blocks_.count()) correlate(worker, b, t);
    if (summed(t) >= 0 && summed(t) < grid_.height && b < column_blocks_.count()) {
      if (plan_.half)
        sum_patches_and_fuse_rows(worker, b, summed(t));
      else
        emit_patch_sums(worker, b, summed(t), emit);
    }
    if (plan_.half && fused(t) >= 0 && b < score_blocks_.count()) fuse_columns(worker, b, fused(t), emit);
  }

 private:
  // The terms of a diagonal sum: where each one's rows are and which of them every query takes.
  class Terms {
   public:
    void add(const T* from, const int32_t* index) {
      from_[count_] = from;
      index_[count_++] = index;
    }
    ListedRows<T> rows(int64_t stride) const { return {from_, index_, count_, stride}; }

   private:
    static constexpr int kMaxTerms = std::max(kMaxPatch, kMaxFuse);
    const T* from_[kMaxTerms];
    const int32_t* index_[kMaxTerms];
    int count_ = 0;
  };

  // The rows [first, last) of S0 that one block of T sums, and the last `half` scores of each with the key row before.
  struct RowBlock {
    int64_t first, last;
    Buffer<T> ends;
  };

  int64_t blocks() const { return std::max({patch_blocks_.count(), column_blocks_.count(), score_blocks_.count()}); }
  // The last keys of T take terms from the next key row's S0.
  int64_t sum_lag() const { return plan_.after + 1 + (plan_.half ? 1 : 0); }
  int64_t emit_lag() const { return plan_.half ? sum_lag() + plan_.half + 1 : sum_lag(); }
  // The key row whose S is emitted in phase t: the first `half` ones, which need the last key rows, come at the end.
  int64_t fused(int64_t t) const {
    const int64_t v = t - emit_lag();
    return v >= grid_.height ? v - grid_.height : v >= plan_.half ? v : kNowhere;
  }

  void allocate() {
    const int64_t width = grid_.width, half = plan_.half;
    int64_t most_rows = 0;
    correlation_border_ = round_up(std::max(plan_.before, plan_.after), kLanes<T>);
    correlation_stride_ = 2 * correlation_border_ + keys_.panels() * kTileColumns<T>;
    int64_t groups = 0;
    for (const auto& block : blocks_) groups = std::max(groups, block.groups);
    patch_ring_ = SlabRing<T>(plan_.before + 1 + sum_lag(), plan_.patches.size(), width, 0);
    if (half) {
      kept_ = std::min<int64_t>(2 * half, grid_.height);
      kept_columns_ = SlabRing<T>(kept_, plan_.columns.size(), width, half);
      column_ring_ = SlabRing<T>(2 * half + 2, plan_.columns.size(), width, half);
      for (int64_t b = 0; b < column_blocks_.count(); ++b) {
        const auto [first, last] = row_range(column_blocks_.begin(b), column_blocks_.end(b));
        row_blocks_.push_back({first, last, Buffer<T>((last - first) * half, true)});
        most_rows = std::max(most_rows, last - first);
      }
    }
    for (int64_t w = 0; w < workers_; ++w) {
      correlations_.emplace_back(groups * kTileRows * correlation_stride_, true);
      line_.emplace_back(round_up(width, kLanes<T>));
      if (half) rows_.emplace_back(1, most_rows, width, 2 * half);
    }
  }

  // The ring slab of T that holds key row v; the first ones are kept, the last key rows wrap around to them.
  T* column_slab(int64_t v) const { return v < kept_ ? kept_columns_.row(v, 0) : column_ring_.row(v, 0); }

  // H of one block of queries with key row v.
  void correlate(int64_t worker, int64_t b, int64_t v) {
    const CorrelationBlock<T>& block = blocks_[b];
    const int64_t channels = keys_.channels(), chunks = ceil_div(channels, kTileInner);
    T* correlations = correlations_[worker].get() + correlation_border_;
    for (int64_t j = 0; j < keys_.panels(); ++j) {
      for (int64_t g = 0; g < block.groups; ++g) {
        T* to = correlations + g * kTileRows * correlation_stride_ + j * kTileColumns<T>;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          const int64_t first = chunk * kTileInner;
          multiply_tile(block.tiles.get() + (g * chunks + chunk) * kTileSize<T>,
                        keys_.panel(v, j) + first * kTileColumns<T>, inner_.data(),
                        static_cast<int>(std::min<int64_t>(kTileInner, channels - first)), to, correlation_stride_,
                        chunk > 0);
        }
      }
    }
    Terms terms;
    for (int dx = -plan_.before; dx <= plan_.after; ++dx)
      terms.add(correlations + dx, block.terms[dx + plan_.before].data());
    sum_listed_rows(patch_ring_.row(v, patch_blocks_.begin(b)), patch_ring_.stride(), terms.rows(correlation_stride_),
                    0, patch_blocks_.end(b) - patch_blocks_.begin(b), nullptr, grid_.width);
  }

  // S0 of the queries [begin, end) of plan.rows with the first `length` keys of key row v.
  void sum_patches(int64_t v, int64_t begin, int64_t end, T* to, int64_t to_stride, int64_t length) const {
    Terms terms;
    for (int dy = -plan_.before; dy <= plan_.after; ++dy)
      if (v + dy >= 0 && v + dy < grid_.height)
        terms.add(patch_ring_.row(v + dy, 0), plan_.patch_terms[dy + plan_.before].data());
    sum_listed_rows(to, to_stride, terms.rows(patch_ring_.stride()), begin, end,
                    inverse_norm_ ? inverse_norm_ + v * grid_.width : nullptr, length);
  }

  template <class Emit>
  void emit_patch_sums(int64_t worker, int64_t b, int64_t v, const Emit& emit) {
    T* line = line_[worker].get();
    for (int64_t i = column_blocks_.begin(b); i < column_blocks_.end(b); ++i) {
      sum_patches(v, i, i + 1, line, 0, grid_.width);
      emit(v, i, line);
    }
  }

  // T of one block with key row v.
  void sum_patches_and_fuse_rows(int64_t worker, int64_t b, int64_t v) {
    const int half = plan_.half;
    const SlabRing<T>& scores = rows_[worker];
    const RowBlock& block = row_blocks_[b];
    T* own = scores.row(0, 0);
    sum_patches(v, block.first, block.last, own, scores.stride(), grid_.width);
    continue_past_row_ends(block, v, own, scores.stride());
    Terms terms;
    for (int d = -half; d <= half; ++d)
      terms.add(own - block.first * scores.stride() + d, plan_.row_terms[d + half].data());
    const int64_t begin = column_blocks_.begin(b);
    sum_listed_rows(column_slab(v) + begin * column_ring_.stride(), column_ring_.stride(), terms.rows(scores.stride()),
                    begin, column_blocks_.end(b), nullptr, grid_.width);
  }

  // Around S0 with key row v: the last keys of the row before it and the first of the row after it.
  void continue_past_row_ends(const RowBlock& block, int64_t v, T* scores, int64_t stride) const {
    const int64_t half = plan_.half, width = grid_.width, count = block.last - block.first;
    for (int64_t i = 0; i < count; ++i) {
      std::copy_n(block.ends.get() + i * half, half, scores + i * stride - half);
      std::copy_n(scores + i * stride + width - half, half, block.ends.get() + i * half);
    }
    if (v + 1 < grid_.height) {
      sum_patches(v + 1, block.first, block.last, scores + width, stride, half);
    } else {
      for (int64_t i = 0; i < count; ++i) std::fill_n(scores + i * stride + width, half, T(0));
    }
  }

  // The rows of S0 that T of [begin, end) sums: a consecutive piece of the list.
  std::pair<int64_t, int64_t> row_range(int64_t begin, int64_t end) const {
    int64_t first = plan_.rows.size(), last = 0;
    for (const auto& terms : plan_.row_terms) {
      for (int64_t i = begin; i < end; ++i) {
        if (terms[i] < 0) continue;
        first = std::min<int64_t>(first, terms[i]);
        last = std::max<int64_t>(last, terms[i] + 1);
      }
    }
    return {first, last};
  }

  // S of one block with key row v.
  template <class Emit>
  void fuse_columns(int64_t worker, int64_t b, int64_t v, const Emit& emit) {
    const int half = plan_.half;
    Terms terms;
    for (int e = -half; e <= half; ++e) {
      const int64_t wrap = v + e < 0 ? -1 : v + e >= grid_.height ? 1 : 0;
      terms.add(column_slab(v + e - wrap * grid_.height) + wrap, plan_.column_terms[e + half].data());
    }
    const ListedRows<T> rows = terms.rows(column_ring_.stride());
    T* line = line_[worker].get();
    for (int64_t i = score_blocks_.begin(b); i < score_blocks_.end(b); ++i) {
      sum_listed_rows(line, 0, rows, i, i + 1, nullptr, grid_.width);
      emit(v, i, line);
    }
  }

  const QueryPlan& plan_;
  RowPanels<T> keys_;  // of the key row that is correlated and of the next
  GridSize grid_;
  const T* inverse_norm_;
  Blocks patch_blocks_, column_blocks_, score_blocks_;
  std::vector<int32_t> inner_;
  int64_t workers_, kept_ = 0, correlation_border_ = 0, correlation_stride_ = 0;
  std::vector<CorrelationBlock<T>> blocks_;
  SlabRing<T> patch_ring_, column_ring_, kept_columns_;
  std::vector<RowBlock> row_blocks_;
  std::vector<Buffer<T>> correlations_, line_;  // per worker
  std::vector<SlabRing<T>> rows_;               // per worker
};

}  // namespace inpaint
