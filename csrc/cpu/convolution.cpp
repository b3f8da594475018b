// The CPU convolution: how the work is cut, and the two ways to compute a piece of it.
//
// A task is some output rows of a strip of columns. The input rows that it needs are packed one by one - padded,
// enlarged, mirrored, masked and converted on the way, so that no such copy of the whole input exists -, the sums of a
// row and a panel of channels are computed into a small buffer, and the epilogue writes them to the output.
//
//   Direct    any kernel, stride and dilation: the products of the definition
//   Winograd  3 x 3 with stride 1: 16 products where the definition has 36; 36 instead of 144 for 16-bit elements
//
// Every output has one fixed order of additions, whatever the number of threads.
#include "convolution.h"

#include <vector>

#include "convolution_kernels.h"
#include "memory.h"
#include "tasks.h"

namespace inpaint {
namespace {

// Measured with 96 -> 192 channels: what one core keeps in its second-level cache beside the rest.
constexpr int64_t kRowBytes = 256 << 10;     // packed input rows of a strip
constexpr int64_t kWeightBytes = 192 << 10;  // weights that one pass over a strip multiplies with
constexpr int64_t kTileBytes = 384 << 10;    // Winograd's transformed inputs
constexpr int64_t kMostTiles = 64;
constexpr int64_t kPackedChannels = 32;  // whose weights one task packs
constexpr int64_t kBands = 8;            // pieces of the height, for threads to share
constexpr int64_t kSmallestBand = 2, kLargestBand = 32;
// Fewer channels than this and Winograd's transforms cost more than they save: beside products one by one, and beside
// pairs of bfloat16.
constexpr int64_t kWinogradChannels = 16, kWinogradChannelsForPairs = 32;

// ---- Weights -----------------------------------------------------------------------------------------------------

// How the rows of the weight become panels of columns.
class Panels {
 public:
  Panels(int64_t rows, bool gated, bool gate_first) : gated_(gated), gate_first_(gate_first) {
    outputs_ = gated ? rows / 2 : rows;
    constexpr struct {
      int64_t columns;
      double cost;  // of one column: a narrow panel has fewer products per load
    } kinds[] = {{48, 1.0}, {32, 1.05}, {16, 1.25}, {8, 1.3}};
    double least = 0;
    for (const auto& kind : kinds) {
      const int64_t width = gated ? kind.columns / 2 : kind.columns;
      if (width < kChunk) continue;
      const double cost = ceil_div(outputs_, width) * kind.columns * kind.cost;
      if (width_ != 0 && cost >= least) continue;
      least = cost;
      columns_ = kind.columns;
      width_ = width;
    }
  }

  int64_t count() const { return ceil_div(outputs_, width_); }
  int64_t columns() const { return columns_; }

  PanelChannels channels(int64_t panel) const {
    return {panel * width_, std::min(width_, outputs_ - panel * width_), columns_, width_};
  }

  // The row of the weight in a column; -1: none.
  int64_t row(int64_t panel, int64_t column) const {
    const bool gate = column >= width_;
    const int64_t output = panel * width_ + (gate ? column - width_ : column);
    if (output >= outputs_) return -1;
    return gated_ && gate != gate_first_ ? outputs_ + output : output;
  }

 private:
  bool gated_, gate_first_;
  int64_t outputs_, columns_ = 0, width_ = 0;
};

// weights [panel][inner / kDepth][column][kDepth], inner index product * stride + channel; bias [panel][column]; start
// [panel][column], what the sums begin with: the bias, or 0 where it is added after they are scaled.
template <class Products>
struct PackedWeights {
  Buffer<typename Products::Packed> weights;
  Buffer<typename Products::Sum> bias, start;
  int64_t panel_size;
};

// The taps of kChunk channels in kChunk columns, lines[channel * taps + tap][column]; those of one column are
// neighbours in memory, so they are read as they lie and transposed.
template <class T, class Element>
void load_kernels(const Element* const* rows, int64_t first, int64_t channels, int64_t taps, T* lines) {
  const int64_t end = channels * taps;
  for (int64_t at = first * taps; at < (first + kChunk) * taps; at += kChunk, lines += kChunk * kChunk) {
    Chunk<T> block[kChunk] = {};
    for (int64_t n = 0; n < kChunk; ++n)
      if (rows[n] != nullptr && at < end) block[n] = load_channels<T>(rows[n] + at, end - at);
    transpose(block);
    for (int64_t i = 0; i < kChunk; ++i) store_chunk<T>(lines + i * kChunk, block[i]);
  }
}

// `transform(kernel [taps], to [products])` turns the taps of a channel into what is multiplied, for kChunk columns at
// once.
template <class Products, class Element, class Transform>
PackedWeights<Products> pack_weights(const Convolution<typename Products::Sum, Element>& convolution,
                                     const Panels& panels, int64_t products, int64_t stride,
                                     const Transform& transform) {
  typedef typename Products::Sum T;
  typedef typename Products::Packed Packed;
  constexpr int64_t depth = Products::kDepth;
  const int64_t channels = convolution.input.channels, columns = panels.columns();
  const int64_t taps = convolution.y.kernel * convolution.x.kernel, size = products * stride * columns;
  PackedWeights<Products> packed{Buffer<Packed>(panels.count() * size, stride != channels),
                                 Buffer<T>(panels.count() * columns), Buffer<T>(panels.count() * columns), size};
  const bool scaled = convolution.epilogue.scale.data != nullptr;
  for (int64_t i = 0; i < panels.count() * columns; ++i) {
    const int64_t row = panels.row(i / columns, i % columns);
    packed.bias[i] = row >= 0 && convolution.bias != nullptr ? load_one<T>(convolution.bias + row) : T(0);
    packed.start[i] = scaled ? T(0) : packed.bias[i];
  }
  const int64_t blocks = ceil_div(channels, kPackedChannels);
  run_tasks(panels.count() * blocks, products * kPackedChannels * columns, [&](int64_t, int64_t task) {
    const int64_t panel = task / blocks, first = task % blocks * kPackedChannels;
    Packed* to = packed.weights.get() + panel * size;
    const Buffer<T> lines(taps * kChunk * kChunk), values(products * kChunk);
    for (int64_t begin = first; begin < std::min(channels, first + kPackedChannels); begin += kChunk) {
      for (int64_t column = 0; column < columns; column += kChunk) {
        const Element* rows[kChunk];
        for (int64_t lane = 0; lane < kChunk; ++lane) {
          const int64_t row = panels.row(panel, column + lane);
          rows[lane] = row < 0 ? nullptr : convolution.weight + row * channels * taps;
        }
        load_kernels<T>(rows, begin, channels, taps, lines.get());
        for (int64_t c = begin; c < std::min(channels, begin + kChunk); ++c) {
          transform(lines.get() + (c - begin) * taps * kChunk, values.get());
          for (int64_t i = 0; i < products; ++i) {
            const int64_t inner = i * stride + c;
            Packed* target = to + (inner / depth * columns + column) * depth + inner % depth;
            if constexpr (depth == 1) {
              store_chunk<T>(target, load_chunk<T>(values.get() + i * kChunk));
            } else {
              Packed lanes[kChunk];
              store_chunk<T>(lanes, load_chunk<T>(values.get() + i * kChunk));
              for (int64_t lane = 0; lane < kChunk; ++lane) target[lane * depth] = lanes[lane];
            }
          }
        }
      }
    }
  });
  return packed;
}

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

template <class Products, class Element>
class Direct {
  typedef typename Products::Sum T;
  typedef typename Products::Packed Packed;

 public:
  explicit Direct(const Convolution<T, Element>& convolution)
      : convolution_(convolution),
        panels_(convolution.rows, convolution.epilogue.gated, convolution.epilogue.gate_first),
        channels_(round_up(convolution.input.channels, Products::kDepth)),
        weights_(pack_weights<Products>(convolution, panels_, taps(), channels_,
                                        [this](const T* kernel, T* to) { std::copy_n(kernel, taps() * kChunk, to); })) {
    const Axis &y = convolution.y, &x = convolution.x;
    const int64_t pixel = convolution.y.kernel * channels_ * static_cast<int64_t>(sizeof(Packed)) * x.stride;
    const int64_t wanted = std::max<int64_t>(kRowBytes / pixel / kPositions, 4) * kPositions;
    const int64_t strips = ceil_div(x.outputs, wanted);
    strip_ = round_up(ceil_div(x.outputs, strips), kPositions);
    columns_ = (strip_ - 1) * x.stride + (x.kernel - 1) * x.dilation + 1;
    pieces_ = cut(convolution.batch, y, 1, ceil_div(x.outputs, strip_));
    // Taps of a kernel row are one run where they are neighbours.
    runs_per_row_ = x.dilation == 1 ? 1 : x.kernel;
    run_length_ = x.dilation == 1 ? x.kernel * channels_ : channels_;
    const int64_t run_bytes = run_length_ * panels_.columns() * static_cast<int64_t>(sizeof(Packed));
    runs_together_ = std::max<int64_t>(kWeightBytes / run_bytes, 1);
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

  const std::vector<Piece>& pieces() const { return pieces_; }

  template <int positions, int bytes>
  INPAINT_INLINE void run(const Piece& piece, Worker& worker) const {
    const Axis &y = convolution_.y, &x = convolution_.x;
    const int64_t left = piece.strip * strip_, count = std::min(strip_, x.outputs - left);
    for (int64_t i = 0; i < columns_; ++i) worker.columns[i] = static_cast<int32_t>(x.source(x.position(left) + i));
    worker.rows.clear();
    const int64_t phases = phases_of(y);
    for (int64_t t = piece.begin; t < piece.end; ++t) {
      const int64_t out_y = piece.phase + t * phases;
      collect_runs(piece, t, out_y, worker);
      for (int64_t panel = 0; panel < panels_.count(); ++panel) {
        multiply_row<positions, bytes>(worker, panel, round_up(count, kPositions));
        finish(convolution_, {piece.b, out_y, left, 1, count}, panels_.channels(panel),
               weights_.bias.get() + panel * panels_.columns(), worker.sums.get());
      }
    }
  }

 private:
  int64_t taps() const { return convolution_.y.kernel * convolution_.x.kernel; }

  // Rows of a task are numbered so that one is found again: with stride 1 the next row's tap i is this one's tap i + 1.
  int64_t row_number(int64_t t, int64_t tap) const {
    const Axis& y = convolution_.y;
    return y.stride == 1 ? t + tap : t * y.stride + tap * y.dilation;
  }
  int64_t rows_in_ring() const { return row_number(0, convolution_.y.kernel - 1) + 1; }

  // The runs of an output row, without those in rows of zeros.
  INPAINT_INLINE void collect_runs(const Piece& piece, int64_t t, int64_t out_y, Worker& worker) const {
    const Axis& y = convolution_.y;
    const int64_t across = convolution_.x.dilation * channels_;
    worker.runs.clear();
    for (int64_t i = 0; i < y.kernel; ++i) {
      const int64_t position = y.position(out_y) + i * y.dilation, source = y.source(position);
      if (source < 0) continue;
      const Packed* row = worker.rows.row(row_number(t, i), [&](Packed* to) INPAINT_INLINE_LAMBDA {
        pack_row(convolution_, piece.b, source, worker.columns.data(), columns_, to, channels_);
      });
      const Packed* weights = weights_.weights.get() + i * convolution_.x.kernel * channels_ * panels_.columns();
      for (int64_t j = 0; j < runs_per_row_; ++j)
        worker.runs.push_back({row + j * across, weights + j * channels_ * panels_.columns()});
    }
  }

  template <int positions, int bytes>
  INPAINT_INLINE void multiply_row(Worker& worker, int64_t panel, int64_t count) const {
    const int64_t columns = panels_.columns(), stride = convolution_.x.stride * channels_;
    const int64_t total = static_cast<int64_t>(worker.runs.size());
    const T* start = weights_.start.get() + panel * columns;
    for (int64_t p = 0; total == 0 && p < count; ++p) std::copy_n(start, columns, worker.sums.get() + p * columns);
    for (int64_t first = 0; first < total; first += runs_together_) {
      const Runs<Packed> runs{worker.runs.data() + first, std::min(runs_together_, total - first), run_length_, stride};
      for (int64_t p = 0; p < count; p += kPositions)
        multiply<Products, positions, bytes>(runs, p * stride, panel * weights_.panel_size, columns,
                                             first > 0 ? kNothing<T> : start, worker.sums.get() + p * columns,
                                             first > 0);
    }
  }

  const Convolution<T, Element>& convolution_;
  Panels panels_;
  int64_t channels_;  // of a packed pixel
  PackedWeights<Products> weights_;
  int64_t strip_, columns_, runs_per_row_, run_length_, runs_together_;
  std::vector<Piece> pieces_;
};

// ---- Winograd ----------------------------------------------------------------------------------------------------

// Tiles of one class of columns: outputs x + phases * (kOutputs * tile + {0, ..., kOutputs - 1}).
struct TileSpan {
  int64_t phase, begin, end;
};

template <class T, class Element>
class Winograd {
  typedef SingleProducts<T> Products;
  // 16 bits have few digits to lose.
  static constexpr int kOutputs = sizeof(Element) == 2 ? 4 : 2, kInputs = kOutputs + 2;
  static constexpr int64_t kProducts = kInputs * kInputs;
  // The product, row 1 and column 1, which is added once to each of the outputs: it may begin with the bias.
  static constexpr int64_t kBiasProduct = kInputs + 1;

 public:
  static bool pays(const Convolution<T, Element>& convolution, bool pairs) {
    const Axis &y = convolution.y, &x = convolution.x;
    const int64_t channels = std::min(convolution.input.channels, convolution.rows);
    return y.kernel == 3 && x.kernel == 3 && y.stride == 1 && x.stride == 1 &&
           channels >= (pairs ? kWinogradChannelsForPairs : kWinogradChannels);
  }

  explicit Winograd(const Convolution<T, Element>& convolution)
      : convolution_(convolution),
        panels_(convolution.rows, convolution.epilogue.gated, convolution.epilogue.gate_first),
        channels_(convolution.input.channels),
        stride_(round_up(channels_, kChunk)),
        weights_(pack_weights<Products>(convolution, panels_, kProducts, stride_, transform_kernels<T, kOutputs>)) {
    const int64_t per_tile = kProducts * stride_ * static_cast<int64_t>(sizeof(T));
    const int64_t limit = std::clamp<int64_t>(kTileBytes / per_tile / kPositions, 1, kMostTiles / kPositions);
    cut_strips(limit * kPositions);
    pieces_ = cut(convolution.batch, convolution.y, kOutputs, static_cast<int64_t>(strips_.size()));
  }

  struct Worker {
    explicit Worker(const Winograd& plan)
        : rows(kInputs, plan.most_columns_ * plan.stride_),
          inputs(kProducts * plan.most_tiles_ * plan.stride_),
          products(kProducts * plan.most_tiles_ * plan.panels_.columns()),
          sums(kOutputs * kOutputs * plan.most_tiles_ * plan.panels_.columns()) {}
    RowRing<T> rows;
    Buffer<T> inputs, products, sums;
    std::vector<int32_t> columns;
  };

  const std::vector<Piece>& pieces() const { return pieces_; }

  template <int positions, int bytes>
  INPAINT_INLINE void run(const Piece& piece, Worker& worker) const {
    const std::vector<TileSpan>& spans = strips_[piece.strip];
    list_columns(spans, worker.columns);
    worker.rows.clear();
    int64_t tiles = 0;
    for (const TileSpan& span : spans) tiles += span.end - span.begin;
    for (int64_t t = piece.begin; t < piece.end; ++t) {
      transform_inputs(piece, t, spans, worker);
      for (int64_t panel = 0; panel < panels_.count(); ++panel) {
        multiply_tiles<positions, bytes>(worker, panel, round_up(tiles, kPositions));
        for (int64_t tile = 0; tile < tiles; ++tile)
          transform_output<T, kOutputs>(worker.products.get() + tile * panels_.columns(),
                                        most_tiles_ * panels_.columns(), panels_.columns(),
                                        worker.sums.get() + kOutputs * tile * panels_.columns(), row_of_sums());
        finish_rows(piece, t, spans, panel, worker);
      }
    }
  }

 private:
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
                                       Worker& worker) const {
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
    T* to = worker.inputs.get();
    for (const TileSpan& span : spans) {
      transform_input<T, kOutputs>(rows, span.end - span.begin, stride_, to, most_tiles_ * stride_);
      to += (span.end - span.begin) * stride_;
      for (const T*& row : rows) row += columns_of(span) * stride_;
    }
  }

  template <int positions, int bytes>
  INPAINT_INLINE void multiply_tiles(Worker& worker, int64_t panel, int64_t tiles) const {
    const int64_t columns = panels_.columns();
    for (int64_t product = 0; product < kProducts; ++product) {
      const T* start = product == kBiasProduct ? weights_.start.get() + panel * columns : kNothing<T>;
      const Run<T> run{worker.inputs.get() + product * most_tiles_ * stride_,
                       weights_.weights.get() + product * stride_ * columns};
      const Runs<T> runs{&run, 1, channels_, stride_};
      T* to = worker.products.get() + product * most_tiles_ * columns;
      for (int64_t tile = 0; tile < tiles; tile += kPositions)
        multiply<Products, positions, bytes>(runs, tile * stride_, panel * weights_.panel_size, columns, start,
                                             to + tile * columns, false);
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
  PackedWeights<Products> weights_;
  std::vector<std::vector<TileSpan>> strips_;
  int64_t most_tiles_, most_columns_;
  std::vector<Piece> pieces_;
};

// ---- Instruction sets --------------------------------------------------------------------------------------------

template <class T, class Element>
using DirectSingle = Direct<SingleProducts<T>, Element>;

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
INPAINT_RUN_PIECE_VERSIONS(DirectSingle, float, float)
INPAINT_RUN_PIECE_VERSIONS(DirectSingle, double, double)
INPAINT_RUN_PIECE_VERSIONS(DirectSingle, float, HalfBits)
INPAINT_RUN_PIECE_VERSIONS(DirectSingle, float, BFloatBits)
INPAINT_RUN_PIECE_VERSIONS(Winograd, float, float)
INPAINT_RUN_PIECE_VERSIONS(Winograd, double, double)
INPAINT_RUN_PIECE_VERSIONS(Winograd, float, HalfBits)
INPAINT_RUN_PIECE_VERSIONS(Winograd, float, BFloatBits)

#ifdef INPAINT_X86_VERSIONS
using DirectPairs = Direct<PairProducts, BFloatBits>;

__attribute__((target("arch=x86-64-v4"))) void run_piece(const DirectPairs& way, const Piece& piece,
                                                         DirectPairs::Worker& worker) {
  way.run<kPositions, 64>(piece, worker);
}
#endif

// Whether this CPU has AVX512_BF16.
bool has_pair_products() {
#ifdef INPAINT_X86_VERSIONS
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("x86-64-v4");
#else
  return false;
#endif
}

template <class Way, class Convolution>
void run_pieces(const Convolution& convolution) {
  const Way way(convolution);
  const std::vector<Piece>& pieces = way.pieces();
  std::vector<std::unique_ptr<typename Way::Worker>> workers(worker_count());
  run_tasks(static_cast<int64_t>(pieces.size()), kParallelWork, [&](int64_t w, int64_t i) {
    if (workers[w] == nullptr) workers[w] = std::make_unique<typename Way::Worker>(way);
    run_piece(way, pieces[i], *workers[w]);
  });
}

template <class T, class Element>
void convolve_some_way(const Convolution<T, Element>& convolution) {
  if (convolution.batch == 0 || convolution.rows == 0) return;
  const bool pairs = std::is_same_v<Element, BFloatBits> && has_pair_products();
  if (Winograd<T, Element>::pays(convolution, pairs)) return run_pieces<Winograd<T, Element>>(convolution);
#ifdef INPAINT_X86_VERSIONS
  if constexpr (std::is_same_v<Element, BFloatBits>)
    if (pairs) return run_pieces<DirectPairs>(convolution);
#endif
  run_pieces<DirectSingle<T, Element>>(convolution);
}

}  // namespace

void convolve(const Convolution<float, float>& convolution) { convolve_some_way(convolution); }
void convolve(const Convolution<double, double>& convolution) { convolve_some_way(convolution); }
void convolve(const Convolution<float, HalfBits>& convolution) { convolve_some_way(convolution); }
void convolve(const Convolution<float, BFloatBits>& convolution) { convolve_some_way(convolution); }

}  // namespace inpaint
