// The CPU convolution: how the work is cut, and the ways to compute a piece of it. convolution.cpp and
// convolution_short.cpp compile them for their memory types.
//
// A task is some output rows of a strip of columns. The input rows that it needs are packed one by one - padded,
// enlarged, mirrored, masked and converted on the way, so that no such copy of the whole input exists -, the sums of a
// row and a panel of channels are computed into a small buffer, and the epilogue writes them to the output.
//
//   Direct    any kernel, stride and dilation: the products of the definition
//   Winograd  3 x 3 with stride 1: 16 products where the definition has 36; 36 instead of 144 for 16-bit elements
//   Gathered  the products of the definition for few outputs under a large weight, which is read only once
//
// Every output has one fixed order of additions, whatever the number of threads.
#pragma once

#include <memory>
#include <vector>

#include "convolution_kernels.h"
#include "convolution_weights.h"
#include "memory.h"
#include "tasks.h"

namespace inpaint {
namespace {  // each file has its own, compiled for its memory types

// Measured with 96 -> 192 channels: what one core keeps in its second-level cache beside the rest.
constexpr int64_t kRowBytes = 256 << 10;     // packed input rows of a strip
constexpr int64_t kWeightBytes = 192 << 10;  // weights that one pass over a strip multiplies with, 64 bytes at a time
constexpr int64_t kTileBytes = 384 << 10;    // Winograd's transformed inputs
// With vectors of 32 bytes a product needs twice the loads, which only the first-level cache delivers in time.
constexpr int64_t kNarrowWeightBytes = 16 << 10;
constexpr int64_t kMostTiles = 64;
// A weight for which tiles are kept: a core with wide vectors multiplies faster than the last cache delivers it. Others
// lose by it below 12 MB: 256 to 256 channels (4 MB) of 172 x 172 pixels take 244 ms with it and 154 without, 512 to
// 512 (16 MB) of 32 x 32 pixels 24 and 35.
constexpr int64_t kLargeWeightBytes = 3 << 20, kLargeWeightBytesOfNarrow = 12 << 20;
constexpr int64_t kKeptBytes = 16 << 20;  // of these tiles
constexpr int64_t kBands = 8;             // pieces of the height, for threads to share
constexpr int64_t kSmallestBand = 2, kLargestBand = 32;
// Sums that begin with nothing.
template <class T>
alignas(64) constexpr T kNothing[kWidestPanel] = {};

// ---- Plan --------------------------------------------------------------------------------------------------------

// Output rows that are `phases` apart read input rows that are `dilation` apart: taken class by class, a dilated
// convolution is a dense one.
int64_t phases_of(const Axis& axis) { return axis.stride == 1 ? std::min(axis.dilation, axis.outputs) : 1; }

// What one task computes: rows [begin, end) of class `phase`, strip `strip`.
struct Piece {
  int64_t b, phase, begin, end, strip;
};

// Cuts the rows of every class, `rows_together` of which are computed at once, into bands.
std::vector<Piece> cut(int64_t batch, const Axis& y, int64_t rows_together, int64_t strips) {
  std::vector<Piece> pieces;
  const int64_t phases = phases_of(y);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t strip = 0; strip < strips; ++strip) {
      for (int64_t phase = 0; phase < phases; ++phase) {
        const int64_t rows = ceil_div(ceil_div(y.outputs - phase, phases), rows_together);
        const int64_t band = std::clamp(ceil_div(rows, kBands), kSmallestBand, kLargestBand);
        for (int64_t begin = 0; begin < rows; begin += band)
          pieces.push_back({b, phase, begin, std::min(begin + band, rows), strip});
      }
    }
  }
  return pieces;
}

// The packed input rows of a task; each is packed once while the task goes down.
template <class T>
class RowRing {
 public:
  RowRing(int64_t slots, int64_t row_size)
      : slots_(slots), row_size_(row_size), memory_(slots * row_size), held_(slots, kNone) {}

  void clear() { std::fill(held_.begin(), held_.end(), kNone); }

  // The slot for position number `number` of a task; pack() fills it if it holds another one.
  template <class Pack>
  INPAINT_INLINE const T* row(int64_t number, const Pack& pack) {
    const int64_t slot = number % slots_;
    T* memory = memory_.get() + slot * row_size_;
    if (held_[slot] != number) {
      held_[slot] = number;
      pack(memory);
    }
    return memory;
  }

 private:
  static constexpr int64_t kNone = -1;
  int64_t slots_, row_size_;
  Buffer<T> memory_;
  std::vector<int64_t> held_;
};

// ---- Direct ------------------------------------------------------------------------------------------------------

// How many inner indices one pass over positions with vectors of `bytes` multiplies: their weights stay in cache.
template <class Products, int bytes>
int64_t inner_together(const Panels& panels) {
  constexpr int64_t together = bytes == 64 ? kWeightBytes : kNarrowWeightBytes;
  const int64_t columns = std::min<int64_t>(panels.columns() * int64_t{sizeof(typename Products::Sum)}, 3 * bytes);
  return std::max<int64_t>(together * Products::kDepth / columns, 1);
}

// The largest part of a length, at most `most`, into which it divides evenly in multiples of `depth`; else all of it.
inline int64_t equal_part(int64_t length, int64_t most, int64_t depth) {
  for (int64_t parts = ceil_div(length, most); parts <= length / depth; ++parts)
    if (length % (parts * depth) == 0) return length / parts;
  return length;
}

template <class Products, class Element>
class Direct {
  typedef typename Products::Sum T;
  typedef typename Products::Packed Packed;

 public:
  explicit Direct(const Convolution<T, Element>& convolution)
      : convolution_(convolution),
        panels_(convolution.weight),
        channels_(packed_channels<Products>(convolution.weight)),
        weights_(convolution, panels_, convolution.weight.taps() * channels_) {
    const Axis &y = convolution.y, &x = convolution.x;
    const int64_t pixel = convolution.y.kernel * channels_ * static_cast<int64_t>(sizeof(Packed)) * x.stride;
    const int64_t wanted = std::max<int64_t>(kRowBytes / pixel / kPositions, 4) * kPositions;
    const int64_t strips = ceil_div(x.outputs, wanted);
    strip_ = round_up(ceil_div(x.outputs, strips), kPositions);
    columns_ = (strip_ - 1) * x.stride + (x.kernel - 1) * x.dilation + 1;
    stages_.push_back(cut(convolution.batch, y, 1, ceil_div(x.outputs, strip_)));
    // Taps of a kernel row are one run where they are neighbours.
    runs_per_row_ = x.dilation == 1 ? 1 : x.kernel;
    run_length_ = x.dilation == 1 ? x.kernel * channels_ : channels_;
  }

  struct Worker {
    explicit Worker(const Direct& plan)
        : rows(plan.rows_in_ring(), plan.columns_ * plan.channels_),
          sums(plan.strip_ * plan.panels_.columns()),
          columns(plan.columns_) {}
    RowRing<Packed> rows;
    Buffer<T> sums;
    std::vector<int32_t> columns;
    std::vector<Run<Packed>> runs;
  };

  const std::vector<std::vector<Piece>>& stages() const { return stages_; }

  template <int positions, int bytes>
  INPAINT_INLINE void run(const Piece& piece, Worker& worker) const {
    const Axis &y = convolution_.y, &x = convolution_.x;
    const int64_t left = piece.strip * strip_, count = std::min(strip_, x.outputs - left);
    for (int64_t i = 0; i < columns_; ++i) worker.columns[i] = static_cast<int32_t>(x.source(x.position(left) + i));
    worker.rows.clear();
    const int64_t phases = phases_of(y), most = inner_together<Products, bytes>(panels_);
    const int64_t length = equal_part(run_length_, most, Products::kDepth);
    for (int64_t t = piece.begin; t < piece.end; ++t) {
      const int64_t out_y = piece.phase + t * phases;
      collect_runs(piece, t, out_y, length, worker);
      for (int64_t panel = 0; panel < panels_.count(); ++panel) {
        multiply_row<positions, bytes>(worker, panel, round_up(count, kPositions), length);
        finish(convolution_, {piece.b, out_y, left, 1, count}, panels_.channels(panel),
               weights_.bias.get() + panel * panels_.columns(), worker.sums.get());
      }
    }
  }

 private:
  // Rows of a task are numbered so that one is found again: with stride 1 the next row's tap i is this one's tap i + 1.
  int64_t row_number(int64_t t, int64_t tap) const {
    const Axis& y = convolution_.y;
    return y.stride == 1 ? t + tap : t * y.stride + tap * y.dilation;
  }
  int64_t rows_in_ring() const { return row_number(0, convolution_.y.kernel - 1) + 1; }

  // The runs of an output row, without those in rows of zeros.
  INPAINT_INLINE void collect_runs(const Piece& piece, int64_t t, int64_t out_y, int64_t length, Worker& worker) const {
    const Axis& y = convolution_.y;
    const int64_t across = convolution_.x.dilation * channels_;
    worker.runs.clear();
    for (int64_t i = 0; i < y.kernel; ++i) {
      const int64_t position = y.position(out_y) + i * y.dilation, source = y.source(position);
      if (source < 0) continue;
      const Packed* row = worker.rows.row(row_number(t, i), [&](Packed* to) INPAINT_INLINE_LAMBDA {
        pack_row(convolution_, piece.b, source, worker.columns.data(), columns_, to, channels_);
      });
      const Packed* weights = weights_.weights + i * convolution_.x.kernel * channels_ * panels_.block();
      for (int64_t j = 0; j < runs_per_row_; ++j)
        for (int64_t k = 0; k < run_length_; k += length)
          worker.runs.push_back({row + j * across + k, weights + (j * channels_ + k) * panels_.block()});
    }
  }

  template <int positions, int bytes>
  INPAINT_INLINE void multiply_row(Worker& worker, int64_t panel, int64_t count, int64_t length) const {
    const int64_t columns = panels_.columns(), stride = convolution_.x.stride * channels_;
    const int64_t total = static_cast<int64_t>(worker.runs.size());
    const T* start = weights_.start.get() + panel * columns;
    for (int64_t p = 0; total == 0 && p < count; ++p) std::copy_n(start, columns, worker.sums.get() + p * columns);
    const int64_t together = std::max<int64_t>(inner_together<Products, bytes>(panels_) / length, 1);
    for (int64_t first = 0; first < total; first += together) {
      const Runs<Packed> runs{worker.runs.data() + first, std::min(together, total - first), length, stride};
      multiply<Products, positions, bytes>(runs, count, panel * weights_.panel_size, weights_.layout,
                                           first > 0 ? kNothing<T> : start, worker.sums.get(), first > 0);
    }
  }

  const Convolution<T, Element>& convolution_;
  Panels panels_;
  int64_t channels_;  // of a packed pixel
  PanelWeights<Products> weights_;
  int64_t strip_, columns_, runs_per_row_, run_length_;
  std::vector<std::vector<Piece>> stages_;
};

// ---- Winograd ----------------------------------------------------------------------------------------------------

// Tiles of one class of columns: outputs x + phases * (kOutputs * tile + {0, ..., kOutputs - 1}).
struct TileSpan {
  int64_t phase, begin, end;
};

template <class T, class Element>
class Winograd {
  typedef SingleProducts<T> Products;
  static constexpr int kOutputs = kWinogradOutputs<Element>, kInputs = kOutputs + 2;
  static constexpr int64_t kProducts = kInputs * kInputs;
  // The product, row 1 and column 1, which is added once to each of the outputs: it may begin with the bias.
  static constexpr int64_t kBiasProduct = kInputs + 1;

 public:
  explicit Winograd(const Convolution<T, Element>& convolution)
      : convolution_(convolution),
        panels_(convolution.weight),
        channels_(convolution.input.channels),
        stride_(round_up(channels_, kChunk)),
        weights_(convolution, panels_, kProducts * stride_) {
    const Axis &y = convolution.y, &x = convolution.x;
    const int64_t per_tile = kProducts * stride_ * static_cast<int64_t>(sizeof(T));
    const int64_t rows = ceil_div(y.outputs, kOutputs), tiles = ceil_div(x.outputs, kOutputs);
    const int64_t weight_bytes = panels_.count() * weights_.panel_size * static_cast<int64_t>(sizeof(T));
    const int64_t limit = std::clamp<int64_t>(kTileBytes / per_tile / kPositions, 1, kMostTiles / kPositions);
    const int64_t tiles_in_strip = std::min(tiles, limit * kPositions);
    // Strip by strip the weight is read again for each; otherwise the tiles are, for each panel.
    keeps_tiles_ = y.dilation == 1 && x.dilation == 1 &&
                   weight_bytes > (has_wide_vectors() ? kLargeWeightBytes : kLargeWeightBytesOfNarrow) &&
                   tiles_in_strip * (panels_.count() + 1) < convolution.weight.rows;
    if (!keeps_tiles_) {
      cut_strips(limit * kPositions);
      plane_ = most_tiles_;
      stages_.push_back(cut(convolution.batch, y, kOutputs, static_cast<int64_t>(strips_.size())));
      return;
    }
    cut_strips(round_up(tiles, kPositions));
    const int64_t all = convolution.batch * rows;
    rows_together_ = std::clamp<int64_t>(kKeptBytes / (tiles * per_tile), 1, all);
    plane_ = round_up(rows_together_ * tiles, kPositions);
    kept_ = Buffer<T>(kProducts * plane_ * stride_, plane_ != rows_together_ * tiles);
    for (int64_t first = 0; first < all; first += rows_together_) {
      const int64_t last = std::min(all, first + rows_together_);
      std::vector<Piece> transforms, products;
      for (int64_t row = first; row < last; ++row) transforms.push_back({row / rows, 0, row % rows, row % rows + 1, 0});
      for (int64_t panel = 0; panel < panels_.count(); ++panel)
        products.push_back({0, 0, first, last, kPanelPiece + panel});
      stages_.push_back(std::move(transforms));
      stages_.push_back(std::move(products));
    }
  }

  struct Worker {
    explicit Worker(const Winograd& plan)
        : rows(kInputs, plan.most_columns_ * plan.stride_),
          inputs(plan.keeps_tiles_ ? 0 : kProducts * plan.plane_ * plan.stride_),
          products(kProducts * plan.plane_ * plan.panels_.columns()),
          sums(kOutputs * kOutputs * plan.most_tiles_ * plan.panels_.columns()) {}
    RowRing<T> rows;
    Buffer<T> inputs, products, sums;
    std::vector<int32_t> columns;
  };

  const std::vector<std::vector<Piece>>& stages() const { return stages_; }

  template <int positions, int bytes>
  INPAINT_INLINE void run(const Piece& piece, Worker& worker) const {
    if (piece.strip >= kPanelPiece) return run_panel<positions, bytes>(piece, worker);
    const std::vector<TileSpan>& spans = strips_[piece.strip];
    list_columns(spans, worker.columns);
    worker.rows.clear();
    for (int64_t t = piece.begin; t < piece.end; ++t) {
      if (keeps_tiles_) {
        const int64_t row = (piece.b * tile_rows() + t) % rows_together_;
        transform_inputs(piece, t, spans, worker, kept_.get() + row * tiles_of(spans) * stride_);
        continue;
      }
      transform_inputs(piece, t, spans, worker, worker.inputs.get());
      for (int64_t panel = 0; panel < panels_.count(); ++panel) {
        multiply_tiles<positions, bytes>(worker.inputs.get(), panel, round_up(tiles_of(spans), kPositions), worker);
        finish_tiles(piece, t, spans, panel, 0, worker);
      }
    }
  }

 private:
  static constexpr int64_t kPanelPiece = int64_t{1} << 32;  // from here on the strip of a piece is a panel

  // Rows of tiles of a sample.
  int64_t tile_rows() const { return ceil_div(convolution_.y.outputs, kOutputs); }

  // One panel of weights, which then leaves the caches, for the tiles of some rows.
  template <int positions, int bytes>
  INPAINT_INLINE void run_panel(const Piece& piece, Worker& worker) const {
    const std::vector<TileSpan>& spans = strips_[0];
    const int64_t panel = piece.strip - kPanelPiece, tiles = tiles_of(spans), rows = tile_rows();
    multiply_tiles<positions, bytes>(kept_.get(), panel, round_up((piece.end - piece.begin) * tiles, kPositions),
                                     worker);
    for (int64_t row = piece.begin; row < piece.end; ++row)
      finish_tiles({row / rows, 0, 0, 0, 0}, row % rows, spans, panel, (row - piece.begin) * tiles, worker);
  }

  static int64_t tiles_of(const std::vector<TileSpan>& spans) {
    int64_t tiles = 0;
    for (const TileSpan& span : spans) tiles += span.end - span.begin;
    return tiles;
  }

  // From the products of a row of tiles, the first of which is number `first`, to the output.
  INPAINT_INLINE void finish_tiles(const Piece& piece, int64_t t, const std::vector<TileSpan>& spans, int64_t panel,
                                   int64_t first, Worker& worker) const {
    const int64_t columns = panels_.columns(), tiles = tiles_of(spans);
    for (int64_t tile = 0; tile < tiles; ++tile)
      transform_output<T, kOutputs>(worker.products.get() + (first + tile) * columns, plane_ * columns, columns,
                                    worker.sums.get() + kOutputs * tile * columns, row_of_sums());
    finish_rows(piece, t, spans, panel, worker);
  }

  int64_t row_of_sums() const { return kOutputs * most_tiles_ * panels_.columns(); }

  static int64_t columns_of(const TileSpan& span) { return kOutputs * (span.end - span.begin) + 2; }

  void cut_strips(int64_t limit) {
    const Axis& x = convolution_.x;
    const int64_t phases = phases_of(x);
    std::vector<TileSpan> all;
    int64_t total = 0;
    for (int64_t phase = 0; phase < phases; ++phase) {
      all.push_back({phase, 0, ceil_div(ceil_div(x.outputs - phase, phases), kOutputs)});
      total += all.back().end;
    }
    const int64_t strips = ceil_div(total, limit);
    const int64_t per_strip = std::min(limit, round_up(ceil_div(total, strips), kPositions));
    int64_t room = 0;
    for (const TileSpan& span : all) {
      for (int64_t begin = span.begin; begin < span.end;) {
        if (room == 0) {
          strips_.emplace_back();
          room = per_strip;
        }
        const int64_t end = std::min(span.end, begin + room);
        strips_.back().push_back({span.phase, begin, end});
        room -= end - begin;
        begin = end;
      }
    }
    most_tiles_ = per_strip;
    most_columns_ = 0;
    for (const std::vector<TileSpan>& strip : strips_) {
      int64_t columns = 0;
      for (const TileSpan& span : strip) columns += columns_of(span);
      most_columns_ = std::max(most_columns_, columns);
    }
  }

  // The input columns of a strip: those of its spans one after the other.
  void list_columns(const std::vector<TileSpan>& spans, std::vector<int32_t>& columns) const {
    const Axis& x = convolution_.x;
    columns.clear();
    for (const TileSpan& span : spans)
      for (int64_t i = 0; i < columns_of(span); ++i)
        columns.push_back(
            static_cast<int32_t>(x.source(x.position(span.phase) + (kOutputs * span.begin + i) * x.dilation)));
  }

  INPAINT_INLINE void transform_inputs(const Piece& piece, int64_t t, const std::vector<TileSpan>& spans,
                                       Worker& worker, T* to) const {
    const Axis& y = convolution_.y;
    const int64_t count = static_cast<int64_t>(worker.columns.size());
    const T* rows[kInputs];
    for (int i = 0; i < kInputs; ++i) {
      const int64_t number = kOutputs * t + i;
      const int64_t source = y.source(y.position(piece.phase) + number * y.dilation);
      rows[i] = worker.rows.row(number, [&](T* to) INPAINT_INLINE_LAMBDA {
        pack_row(convolution_, piece.b, source, worker.columns.data(), count, to, stride_);
      });
    }
    for (const TileSpan& span : spans) {
      transform_input<T, kOutputs>(rows, span.end - span.begin, stride_, to, plane_ * stride_);
      to += (span.end - span.begin) * stride_;
      for (const T*& row : rows) row += columns_of(span) * stride_;
    }
  }

  template <int positions, int bytes>
  INPAINT_INLINE void multiply_tiles(const T* inputs, int64_t panel, int64_t tiles, Worker& worker) const {
    const int64_t columns = panels_.columns();
    const int64_t length = equal_part(channels_, inner_together<Products, bytes>(panels_), 1);
    for (int64_t product = 0; product < kProducts; ++product) {
      const T* start = product == kBiasProduct ? weights_.start.get() + panel * columns : kNothing<T>;
      for (int64_t k = 0; k < channels_; k += length) {
        const Run<T> run{inputs + product * plane_ * stride_ + k,
                         weights_.weights + (product * stride_ + k) * panels_.block()};
        multiply<Products, positions, bytes>({&run, 1, length, stride_}, tiles, panel * weights_.panel_size,
                                             weights_.layout, k > 0 ? kNothing<T> : start,
                                             worker.products.get() + product * plane_ * columns, k > 0);
      }
    }
  }

  INPAINT_INLINE void finish_rows(const Piece& piece, int64_t t, const std::vector<TileSpan>& spans, int64_t panel,
                                  Worker& worker) const {
    const Axis &y = convolution_.y, &x = convolution_.x;
    const int64_t y_phases = phases_of(y), x_phases = phases_of(x), columns = panels_.columns();
    for (int64_t i = 0; i < kOutputs; ++i) {
      const int64_t out_y = piece.phase + y_phases * (kOutputs * t + i);
      if (out_y >= y.outputs) break;
      T* sums = worker.sums.get() + i * row_of_sums();
      for (const TileSpan& span : spans) {
        const int64_t first = span.phase + x_phases * kOutputs * span.begin;
        const int64_t tiles = span.end - span.begin;
        const int64_t count = std::min(kOutputs * tiles, ceil_div(x.outputs - first, x_phases));
        finish(convolution_, {piece.b, out_y, first, x_phases, count}, panels_.channels(panel),
               weights_.bias.get() + panel * columns, sums);
        sums += kOutputs * tiles * columns;
      }
    }
  }

  const Convolution<T, Element>& convolution_;
  Panels panels_;
  int64_t channels_, stride_;  // stride: channels of a packed pixel
  PanelWeights<Products> weights_;
  std::vector<std::vector<TileSpan>> strips_;
  int64_t most_tiles_, most_columns_;
  // Where a large weight meets few tiles, those of some rows are transformed first, and then each panel of the weight
  // is read only once for all: product p of a tile is kept_[p][tile][channel]. `plane_`: tiles of a product, there or
  // in a worker.
  bool keeps_tiles_;
  int64_t rows_together_ = 0, plane_;
  Buffer<T> kept_;
  std::vector<std::vector<Piece>> stages_;
};

// ---- Gathered ----------------------------------------------------------------------------------------------------

// First a matrix of the inputs of every output is made, row by row; then a task is a panel of weights for all of them.
template <class Products, class Element>
class Gathered {
  typedef typename Products::Sum T;
  typedef typename Products::Packed Packed;
  static constexpr int64_t kGather = -1;  // the strip of a piece that gathers

 public:
  explicit Gathered(const Convolution<T, Element>& convolution)
      : convolution_(convolution),
        panels_(convolution.weight),
        channels_(packed_channels<Products>(convolution.weight)),
        depth_(convolution.weight.taps() * channels_),
        outputs_(convolution.batch * convolution.y.outputs * convolution.x.outputs),
        matrix_(round_up(outputs_, kPositions) * depth_),
        weights_(convolution, panels_, depth_) {
    std::fill_n(matrix_.get() + outputs_ * depth_, (round_up(outputs_, kPositions) - outputs_) * depth_, Packed{});
    for (int64_t b = 0; b < convolution.batch; ++b)
      for (int64_t row = 0; row < convolution.y.outputs; ++row) stages_[0].push_back({b, 0, row, row + 1, kGather});
    for (int64_t panel = 0; panel < panels_.count(); ++panel) stages_[1].push_back({0, 0, 0, 0, panel});
  }

  struct Worker {
    explicit Worker(const Gathered& plan)
        : row(plan.columns() * plan.channels_),
          sums(round_up(plan.outputs_, kPositions) * plan.panels_.columns()),
          columns(plan.columns()) {}
    Buffer<Packed> row;
    Buffer<T> sums;
    std::vector<int32_t> columns;
  };

  const std::vector<std::vector<Piece>>& stages() const { return stages_; }

  template <int positions, int bytes>
  INPAINT_INLINE void run(const Piece& piece, Worker& worker) const {
    if (piece.strip == kGather)
      gather_row(piece.b, piece.begin, worker);
    else
      multiply_panel<positions, bytes>(piece.strip, worker);
  }

 private:
  // Input columns that a row of outputs reads.
  int64_t columns() const {
    const Axis& x = convolution_.x;
    return (x.outputs - 1) * x.stride + (x.kernel - 1) * x.dilation + 1;
  }

  INPAINT_INLINE void gather_row(int64_t b, int64_t out_y, Worker& worker) const {
    const Axis &y = convolution_.y, &x = convolution_.x;
    for (int64_t i = 0; i < columns(); ++i) worker.columns[i] = static_cast<int32_t>(x.source(x.position(0) + i));
    Packed* outputs = matrix_.get() + (b * y.outputs + out_y) * x.outputs * depth_;
    for (int64_t i = 0; i < y.kernel; ++i) {
      const int64_t source = y.source(y.position(out_y) + i * y.dilation);
      pack_row(convolution_, b, source, worker.columns.data(), columns(), worker.row.get(), channels_);
      for (int64_t out_x = 0; out_x < x.outputs; ++out_x)
        for (int64_t j = 0; j < x.kernel; ++j)
          std::copy_n(worker.row.get() + (out_x * x.stride + j * x.dilation) * channels_, channels_,
                      outputs + out_x * depth_ + (i * x.kernel + j) * channels_);
    }
  }

  template <int positions, int bytes>
  INPAINT_INLINE void multiply_panel(int64_t panel, Worker& worker) const {
    const int64_t columns = panels_.columns(), count = round_up(outputs_, kPositions);
    const int64_t length = equal_part(depth_, inner_together<Products, bytes>(panels_), Products::kDepth);
    for (int64_t k = 0; k < depth_; k += length) {
      const Run<Packed> run{matrix_.get() + k, weights_.weights + k * panels_.block()};
      multiply<Products, positions, bytes>(
          {&run, 1, length, depth_}, count, panel * weights_.panel_size, weights_.layout,
          k > 0 ? kNothing<T> : weights_.start.get() + panel * columns, worker.sums.get(), k > 0);
    }
    const int64_t width = convolution_.x.outputs, height = convolution_.y.outputs;
    for (int64_t row = 0; row < convolution_.batch * height; ++row)
      finish(convolution_, {row / height, row % height, 0, 1, width}, panels_.channels(panel),
             weights_.bias.get() + panel * columns, worker.sums.get() + row * width * columns);
  }

  const Convolution<T, Element>& convolution_;
  Panels panels_;
  int64_t channels_, depth_, outputs_;  // channels of a packed pixel, packed inputs of an output, outputs in all
  Buffer<Packed> matrix_;
  PanelWeights<Products> weights_;
  std::vector<std::vector<Piece>> stages_{2};
};

// ---- Instruction sets --------------------------------------------------------------------------------------------

template <class T, class Element>
using DirectSingle = Direct<SingleProducts<T>, Element>;
template <class T, class Element>
using GatheredSingle = Gathered<SingleProducts<T>, Element>;

// One version per register file: 8 x 3 vectors of 64 bytes in 32 registers, 4 x 3 of 32 or 16 bytes in 16.
#define INPAINT_RUN_PIECE(Way, T, Element, attributes, positions, bytes)                                              \
  attributes inline void run_piece(const Way<T, Element>& way, const Piece& piece, Way<T, Element>::Worker& worker) { \
    way.template run<positions, bytes>(piece, worker);                                                                \
  }
#ifdef INPAINT_X86_VERSIONS
#define INPAINT_RUN_PIECE_VERSIONS(Way, T, Element)                                                 \
  INPAINT_RUN_PIECE(Way, T, Element, __attribute__((target("arch=x86-64-v4"))), kPositions, 64)     \
  INPAINT_RUN_PIECE(Way, T, Element, __attribute__((target("arch=x86-64-v3"))), kPositions / 2, 32) \
  INPAINT_RUN_PIECE(Way, T, Element, __attribute__((target("default"))), kPositions / 2, 16)
#else
#define INPAINT_RUN_PIECE_VERSIONS(Way, T, Element) INPAINT_RUN_PIECE(Way, T, Element, , kPositions / 2, 16)
#endif
#define INPAINT_RUN_PIECE_WAYS(T, Element)               \
  INPAINT_RUN_PIECE_VERSIONS(DirectSingle, T, Element)   \
  INPAINT_RUN_PIECE_VERSIONS(GatheredSingle, T, Element) \
  INPAINT_RUN_PIECE_VERSIONS(Winograd, T, Element)

template <class Way, class Convolution>
void run_pieces(const Convolution& convolution) {
  if (convolution.batch == 0 || convolution.weight.rows == 0) return;
  const Way way(convolution);
  std::vector<std::unique_ptr<typename Way::Worker>> workers(worker_count());
  for (const std::vector<Piece>& pieces : way.stages()) {
    run_tasks(static_cast<int64_t>(pieces.size()), kParallelWork, [&](int64_t w, int64_t i) {
      if (workers[w] == nullptr) workers[w] = std::make_unique<typename Way::Worker>(way);
      run_piece(way, pieces[i], *workers[w]);
    });
  }
}

template <class T, class Element>
void convolve_by_single_products(const Convolution<T, Element>& convolution) {
  if (uses_winograd(convolution.weight)) return run_pieces<Winograd<T, Element>>(convolution);
  if (convolution.weight.few_outputs) return run_pieces<GatheredSingle<T, Element>>(convolution);
  run_pieces<DirectSingle<T, Element>>(convolution);
}

}  // namespace
}  // namespace inpaint
