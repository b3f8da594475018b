// contextual_attention, forward, on the CPU.
//
// Strip by strip of output cells: (1) the logits of the strip's queries against all keys, (2) their softmax in place,
// (3) piece by piece of the key cells, the diagonal sums of the probabilities and their product with the value cells.
#include "contextual_attention.h"

namespace inpaint {
namespace {

constexpr int64_t kAccumulatorBytes = 192 << 10;  // output cells of one task, resident in L2 beside the tiles

// Consecutive cell rows of the keys whose value cells are packed together.
struct ValueBand {
  int64_t top, rows;
};

std::vector<ValueBand> value_bands(GridSize key_cells, int64_t bytes_per_row) {
  const int64_t limit = bytes_per_row * key_cells.height <= kValueBytes ? kValueBytes : kValueBandBytes;
  const int64_t rows = std::clamp<int64_t>(limit / bytes_per_row, 1, key_cells.height);
  std::vector<ValueBand> bands;
  for (int64_t top = 0; top < key_cells.height; top += rows)
    bands.push_back({top, std::min(rows, key_cells.height - top)});
  return bands;
}

// The share of one phase group and one band of value cells in the output.
template <class T>
class CellPaste {
 public:
  CellPaste(const AttentionInputs<T>& inputs, const PhaseGroup& group, const FlatMap<T>& value, const ValueBand& band,
            const PixelWeights<T>& weights)
      : inputs_(inputs),
        group_(group),
        band_(band),
        weights_(weights),
        key_cells_(cell_grid(inputs.keys, inputs.reach())),
        values_(value, inputs.value_pixels(group), key_cells_.width, band.rows * key_cells_.width, nullptr,
                band.top * key_cells_.width),
        columns_(values_.panels() * kTileColumns<T>),
        sum_stride_(columns_ + kLanes<T>),
        groups_per_task_(std::clamp<int64_t>(kAccumulatorBytes / (columns_ * kTileRows * sizeof(T)), 1, 8)),
        pieces_(key_pieces({band.rows, key_cells_.width})) {}

  // Adds to the output pixels of the strip's cells.
  void paste(const AttentionStrip<T>& strip, const StripCells& part, T* output) const {
    const int64_t total = static_cast<int64_t>(part.cells.size()), per_task = groups_per_task_ * kTileRows;
    std::vector<Worker> workers(worker_count());
    run_tasks(ceil_div(total, per_task), std::min(total, per_task) * key_cells_.width * band_.rows,
              [&](int64_t w, int64_t task) {
                Worker& worker = workers[w];
                if (worker.tiles.empty()) {
                  worker.sums = Buffer<T>(per_task * sum_stride_);
                  for (int64_t g = 0; g < groups_per_task_; ++g)
                    worker.tiles.emplace_back(strip, part.queries, inputs_.queries, inputs_.reach());
                }
                const int64_t begin = task * per_task, end = std::min(total, begin + per_task);
                std::fill_n(worker.sums.get(), per_task * sum_stride_, T(0));
                accumulate(worker, part.cells.data() + begin, end - begin);
                scatter(worker, part.cells.data() + begin, end - begin, output);
              });
  }

 private:
  struct Worker {
    std::vector<DiagonalTile<T>> tiles;
    Buffer<T> sums;
  };

  void accumulate(Worker& worker, const int64_t* cells, int64_t count) const {
    const int64_t groups = ceil_div(count, kTileRows);
    for (int64_t g = 0; g < groups; ++g)
      worker.tiles[g].set_cells(cells + g * kTileRows, std::min<int64_t>(kTileRows, count - g * kTileRows), group_);
    std::vector<uint8_t> active(groups);
    for (const KeyPiece& piece : pieces_) {
      bool any = false;
      for (int64_t g = 0; g < groups; ++g) {
        active[g] = worker.tiles[g].build(band_.top + piece.top, piece.left, piece.width, piece.length);
        any |= active[g];
      }
      if (!any) continue;
      for (int64_t j = 0; j < values_.panels(); ++j) {
        const T* panel = values_.panel(j) + piece.first_cell(key_cells_.width) * kTileColumns<T>;
        for (int64_t g = 0; g < groups; ++g) {
          if (!active[g]) continue;
          const DiagonalTile<T>& tile = worker.tiles[g];
          multiply_tile(tile.tile(), panel, tile.inner(), tile.count(),
                        worker.sums.get() + g * kTileRows * sum_stride_ + j * kTileColumns<T>, sum_stride_, true);
        }
      }
    }
  }

  // Some cells at a time, channel by channel: their pixels are neighbours in the output, their sums stay in L1.
  void scatter(const Worker& worker, const int64_t* cells, int64_t count, T* output) const {
    struct Target {
      int64_t pixel, sum;
      T weight;
    };
    constexpr int64_t kCells = 16;
    const CellPixels pixels = inputs_.output_pixels(group_);
    const int64_t phases = static_cast<int64_t>(group_.phases.size()), plane = pixels.height * pixels.width;
    const int64_t cell_width = inputs_.queries.width + inputs_.reach() - 1;
    std::vector<Target> targets;
    for (int64_t begin = 0; begin < count; begin += kCells) {
      targets.clear();
      for (int64_t i = begin; i < std::min(count, begin + kCells); ++i) {
        for (int64_t phase = 0; phase < phases; ++phase) {
          const int64_t pixel = pixels.pixel(cells[i] / cell_width, cells[i] % cell_width, phase);
          const T weight = pixel < 0 ? T(0) : weights_(pixel);
          if (weight != 0) targets.push_back({pixel, i * sum_stride_ + phase, weight});
        }
      }
      for (int64_t c = 0; c < pixels.channels; ++c)
        for (const Target& to : targets) output[c * plane + to.pixel] += to.weight * worker.sums[to.sum + c * phases];
    }
  }

  const AttentionInputs<T>& inputs_;
  const PhaseGroup& group_;
  ValueBand band_;
  const PixelWeights<T>& weights_;
  GridSize key_cells_;
  CellPanels<T> values_;
  int64_t columns_, sum_stride_, groups_per_task_;  // sum_stride_: not a multiple of 4 KiB, see kTileStride
  std::vector<KeyPiece> pieces_;
};

// The most attended key of every selected query of the strip. Queries at the border of two strips are written twice,
// with the same values.
template <class T>
void write_matches(const AttentionStrip<T>& strip, const PositionList& queries, const bool* selected, int64_t* index,
                   T* maximum) {
  run_tasks(queries.size(), strip.keys().count(), [&](int64_t, int64_t i) {
    const int64_t p = queries[i];
    if (selected && !selected[p]) return;
    std::tie(index[p], maximum[p]) = strip.most_attended(i);
  });
}

template <class T>
struct ForwardOutputs {
  T* output;
  int64_t* index;  // null: not wanted
  T* maximum;
};

template <class T>
void attend(const AttentionInputs<T>& inputs, const MapView<T>& query, const MapView<T>& key, const FlatMap<T>& value,
            const T* norm, const KeyLogits<T>& logits, const bool* selected, const ForwardOutputs<T>& out) {
  const Semantics& semantics = inputs.semantics;
  const Buffer<T> inverse_norm = reciprocals(norm, inputs.keys.count());
  const GridSize key_cells = cell_grid(inputs.keys, inputs.reach());
  const std::vector<PhaseGroup> groups = phase_groups(semantics);
  const PixelWeights<T> weights(inputs.queries, semantics, selected);
  const int64_t pixel_bytes = semantics.rate * semantics.rate * inputs.value_channels * static_cast<int64_t>(sizeof(T));
  const std::vector<ValueBand> bands = value_bands(key_cells, key_cells.width * pixel_bytes);
  std::vector<CellPaste<T>> kept;
  const auto for_each_paste = [&](const auto& visit) {
    for (const PhaseGroup& group : groups)
      for (const ValueBand& band : bands) visit(CellPaste<T>(inputs, group, value, band, weights));
  };
  if (bands.size() == 1) for_each_paste([&](CellPaste<T>&& paste) { kept.push_back(std::move(paste)); });
  const int64_t other_bytes = pixel_bytes * (inputs.queries.count() + bands[0].rows * key_cells.width);
  const int64_t most_bytes = std::clamp(kWorkspaceBytes - other_bytes, kWorkspaceMinBytes, kStripMaxBytes);
  const std::vector<int64_t> wanted = wanted_cells(selected, inputs.queries, semantics);
  const std::vector<StripCells> parts =
      cut_strips(wanted, inputs.queries, inputs.reach(),
                 inputs.capacity_of_rows(kStripRows, widest_row(wanted, inputs.queries, inputs.reach()), kStripMinBytes,
                                         most_bytes));
  int64_t capacity = 0;
  for (const StripCells& part : parts) capacity = std::max(capacity, part.queries.size());
  AttentionStrip<T> strip(capacity, inputs.keys, inputs.reach());
  for (const StripCells& part : parts) {
    stop_if_interrupted();
    strip.compute(QueryPlan(part.queries, inputs.queries, semantics.patch, semantics.fuse), query, key,
                  inverse_norm.get(), logits, semantics);
    for (const CellPaste<T>& paste : kept) paste.paste(strip, part, out.output);
    if (kept.empty()) for_each_paste([&](const CellPaste<T>& paste) { paste.paste(strip, part, out.output); });
    if (out.index) write_matches(strip, part.queries, selected, out.index, out.maximum);
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> contextual_attention_forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& valid,
    const std::optional<Tensor>& key_scale, const std::optional<Tensor>& key_bias,
    const std::optional<Tensor>& selected, int64_t patch, const std::string& norm_rule, double eps, int64_t fuse,
    double scale, const std::string& masking, double fill, std::optional<double> floor, int64_t rate,
    int64_t paste_size, int64_t pad_cut, int64_t pad_put, double divisor, bool return_offsets) {
  const Semantics semantics{
      patch,   fuse,    scale,  parse_masking(masking), fill, floor.value_or(-1.0), rate, paste_size,
      pad_cut, pad_put, divisor};
  const int64_t batch = query.size(0);
  const std::vector<int64_t> match_shape =
      return_offsets ? std::vector<int64_t>{batch, query.size(2), query.size(3)} : std::vector<int64_t>{0};
  Tensor output = torch::stable::new_zeros(value, {batch, value.size(1), rate * query.size(2), rate * query.size(3)});
  Tensor index = torch::stable::fill_(torch::stable::new_empty(query, match_shape, ScalarType::Long), -1);
  Tensor maximum = torch::stable::new_zeros(query, match_shape);
  const Tensor norm = contextual_attention_key_norm(key, patch, norm_rule, eps);
  dispatch_float_double(query.scalar_type(), "query", [&](auto zero) {
    using T = decltype(zero);
    const AttentionInputs<T> inputs(query, key, value, semantics);
    const bool* wanted = selected ? static_cast<const bool*>(selected->data_ptr()) : nullptr;
    for (int64_t b = 0; b < batch; ++b) {
      const KeyLogits<T> logits(semantics, inputs.keys.count(), sample_of<bool>(valid, b), sample_of<T>(key_scale, b),
                                sample_of<T>(key_bias, b));
      const int64_t matches = inputs.queries.count() * b;
      attend(inputs, view_of<T>(query, b), view_of<T>(key, b),
             FlatMap<T>{value.const_data_ptr<T>() + b * value.stride(0), value.stride(1),
                        value.stride(value.size(3) > 1 ? 3 : 2)},
             norm.const_data_ptr<T>() + b * inputs.keys.count(), logits, wanted,
             ForwardOutputs<T>{output.mutable_data_ptr<T>() + b * output.size(1) * output.size(2) * output.size(3),
                               return_offsets ? index.mutable_data_ptr<int64_t>() + matches : nullptr,
                               return_offsets ? maximum.mutable_data_ptr<T>() + matches : nullptr});
    }
  });
  return {output, index, maximum};
}

}  // namespace inpaint

STABLE_TORCH_LIBRARY_IMPL(inpaint_native, CPU, m) {
  m.impl("contextual_attention_forward", TORCH_BOX(&inpaint::contextual_attention_forward));
}
