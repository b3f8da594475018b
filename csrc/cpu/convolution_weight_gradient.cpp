// The gradient of a convolution's weight and bias on the CPU.
//
// A product of matrices whose inner index are the positions: grad_weight[tap] = inputs[position, channel]^T *
// gradients[position, row], summed over all pixels. Both operands are packed some image rows at a time - padded,
// enlarged, mirrored and transposed on the way, so that no copy of the whole input exists.
//
//   Winograd  3 x 3 with stride 1: a position is a tile of 2 x 2 outputs with 16 products where the definition has 36
//   Direct    any kernel and stride: a position is an output, its inputs under one row of the kernel side by side
//
// A task has a block of channels and of rows of the weight, some lines (rows of the kernel, or of the tile's products)
// and a band of the image, with sums of its own. How the work is cut does not depend on the number of threads, and the
// sums of the bands are added in their order: neither does the result.
#include <memory>
#include <vector>

#include "convolution_arguments.h"
#include "memory.h"
#include "tasks.h"
#include "weight_gradient.h"

namespace inpaint {
namespace {

// Measured with 96 -> 192 channels at 64 x 64: operands that fit the second-level cache, whose sums are then read and
// written once for so many positions.
constexpr int64_t kMostPositions = 64, kLeastPositions = 16;
constexpr int64_t kOperandBytes = 320 << 10;
constexpr int64_t kWidestBlock = 192;                            // channels, or rows of the weight
constexpr int64_t kTasks = 8, kMostSumBytes = int64_t{4} << 20;  // what the image is cut into bands for
constexpr int64_t kFewestWinogradChannels = 16;
constexpr int64_t kResultRows = 16;  // of the weight, whose gradients are written together: a cache line of sums

template <class T>
struct WeightGradient {
  int64_t batch;
  Axis y, x;
  Map<const T> input, gradient;
  T* weight;  // [gradient.channels, input.channels, y.kernel, x.kernel]
  T* bias;    // [gradient.channels] or null
};

// Not a whole number of 128 bytes: rows that are a power of two apart would share few sets of the first-level cache.
template <class T>
int64_t spread(int64_t size) {
  constexpr int64_t line = 64 / sizeof(T);
  return (ceil_div(size, line) | 1) * line;
}

// `size` cut into equal blocks of at most kWidestBlock, multiples of kChunk.
struct Blocks {
  explicit Blocks(int64_t size)
      : size(size),
        width(round_up(ceil_div(size, ceil_div(size, kWidestBlock)), kChunk)),
        count(ceil_div(size, width)) {}
  int64_t begin(int64_t block) const { return block * width; }
  int64_t valid(int64_t block) const { return std::min(width, size - begin(block)); }
  int64_t size, width, count;
};

// Positions next to each other in an output row, and where their pixels are in a packed row.
struct Strip {
  int64_t positions, input_first, input_count, gradient_first, gradient_count;
  std::vector<int32_t> inputs, gradients;  // [position][columns], counted from the first one
};

// Output columns (or rows) of a position: one, or two that are `dilation` apart.
inline std::vector<int64_t> first_outputs(const Axis& axis, bool winograd) {
  std::vector<int64_t> first;
  const int64_t phases = winograd ? std::min(axis.dilation, axis.outputs) : 1;
  for (int64_t phase = 0; phase < phases; ++phase)
    for (int64_t i = phase; i < axis.outputs; i += winograd ? 2 * axis.dilation : 1) first.push_back(i);
  return first;
}

// Indices into a packed row of what is at `sources`; those outside (-1) are the zeros behind its last pixel.
inline std::vector<int32_t> packed_indices(const std::vector<int64_t>& sources, int64_t& first, int64_t& count) {
  int64_t low = std::numeric_limits<int64_t>::max(), high = -1;
  for (int64_t source : sources) {
    if (source < 0) continue;
    low = std::min(low, source);
    high = std::max(high, source);
  }
  first = high < 0 ? 0 : low;
  count = high < 0 ? 0 : high - low + 1;
  std::vector<int32_t> indices;
  for (int64_t source : sources) indices.push_back(static_cast<int32_t>(source < 0 ? count : source - first));
  return indices;
}

template <class T>
class WeightGradientPlan {
 public:
  explicit WeightGradientPlan(const WeightGradient<T>& job)
      : job_(job),
        channels_(job.input.channels),
        rows_(job.gradient.channels),
        winograd_(uses_winograd(job)),
        lines_(winograd_ ? 4 : job.y.kernel),
        lines_together_(winograd_ ? 1 : lines_),
        products_(winograd_ ? 4 : 1),
        taps_(winograd_ ? 1 : job.x.kernel),
        a_stride_(spread<T>(taps_ * channels_.width + kChunk)),
        b_stride_(spread<T>(rows_.width)),
        first_rows_(first_outputs(job.y, winograd_)) {
    const int64_t bytes = products_ * (a_stride_ + b_stride_) * static_cast<int64_t>(sizeof(T));
    positions_ = std::clamp(kOperandBytes / bytes, kLeastPositions, kMostPositions);
    make_strips(first_outputs(job.x, winograd_));
    const int64_t blocks = channels_.count * rows_.count, groups = lines_ / lines_together_;
    const int64_t sum_bytes = blocks * block_size() * static_cast<int64_t>(sizeof(T));
    const int64_t image_rows = job.batch * static_cast<int64_t>(first_rows_.size());
    bands_ = std::clamp<int64_t>(std::min(ceil_div(kTasks, blocks * groups), kMostSumBytes / sum_bytes), 1,
                                 std::max<int64_t>(image_rows / 4, 1));
    sums_ = Buffer<T>(bands_ * blocks * block_size());
    bias_ = Buffer<T>(bands_ * rows_.count * rows_.width, true);
  }

  static bool uses_winograd(const WeightGradient<T>& job) {
    return job.y.kernel == 3 && job.x.kernel == 3 && job.y.stride == 1 && job.x.stride == 1 &&
           std::min(job.input.channels, job.gradient.channels) >= kFewestWinogradChannels;
  }

  struct Worker {
    explicit Worker(const WeightGradientPlan& plan)
        : a(plan.products_ * plan.positions_ * plan.a_stride_ + kChunk),
          b(plan.products_ * plan.positions_ * plan.b_stride_),
          inputs(2 * plan.packed_size(plan.channels_, plan.most_inputs_)),
          gradients(2 * plan.packed_size(plan.rows_, plan.most_gradients_)) {}
    Buffer<T> a, b, inputs, gradients;
  };

  int64_t tasks() const { return bands_ * channels_.count * rows_.count * (lines_ / lines_together_); }
  int64_t results() const { return ceil_div(rows_.size, kResultRows); }

  // The sums of task i.
  template <int rows, int bytes>
  INPAINT_INLINE void run(int64_t i, Worker& worker) const {
    const int64_t groups = lines_ / lines_together_;
    Task task{};
    task.first_line = i % groups * lines_together_;
    task.channel_block = i / groups % channels_.count;
    task.row_block = i / groups / channels_.count % rows_.count;
    task.band = i / groups / channels_.count / rows_.count;
    const int64_t line_size = block_size() / lines_;
    std::fill_n(block_sums(task, task.first_line), lines_together_ * line_size, T{});
    const int64_t height = static_cast<int64_t>(first_rows_.size()), total = job_.batch * height;
    const int64_t begin = total * task.band / bands_, end = total * (task.band + 1) / bands_;
    std::vector<Item> items;
    int64_t positions = 0;
    for (int64_t row = begin; row < end; ++row) {
      for (const Strip& strip : strips_) {
        if (positions + strip.positions > positions_) {
          add_items<rows, bytes>(task, items, positions, worker);
          items.clear();
          positions = 0;
        }
        items.push_back({row / height, first_rows_[row % height], &strip, positions});
        positions += strip.positions;
      }
    }
    add_items<rows, bytes>(task, items, positions, worker);
  }

  // The gradients of kResultRows rows of the weight, and of their biases.
  INPAINT_INLINE void finish(int64_t result) const {
    const int64_t begin = result * kResultRows, end = std::min(begin + kResultRows, rows_.size);
    for (int64_t channel = 0; channel < channels_.size; ++channel)
      for (int64_t row = begin; row < end; row += kChunk) finish_taps(channel, row);
    for (int64_t row = begin; row < end && job_.bias != nullptr; row += kChunk) {
      Chunk<T> sum = {};
      for (int64_t band = 0; band < bands_; ++band)
        sum += load_chunk<T>(bias_sums(band, row / rows_.width) + row % rows_.width);
      store_channels<T>(job_.bias + row, sum, end - row);
    }
  }

 private:
  struct Task {
    int64_t first_line, channel_block, row_block, band;
  };
  // A strip of the output row(s) from y on; its positions follow those of the items before it.
  struct Item {
    int64_t b, y;
    const Strip* strip;
    int64_t offset;
  };

  // Sums of a block: [line][product][tap][channel][row of the weight].
  int64_t block_size() const { return lines_ * products_ * taps_ * channels_.width * rows_.width; }
  T* block_sums(const Task& task, int64_t line) const {
    const int64_t block = (task.band * channels_.count + task.channel_block) * rows_.count + task.row_block;
    return sums_.get() + block * block_size() + line * (block_size() / lines_);
  }
  T* bias_sums(int64_t band, int64_t row_block) const {
    return bias_.get() + (band * rows_.count + row_block) * rows_.width;
  }
  static int64_t packed_size(const Blocks& blocks, int64_t pixels) { return (pixels + 1) * blocks.width; }

  void make_strips(const std::vector<int64_t>& outputs) {
    const int64_t total = static_cast<int64_t>(outputs.size()), count = ceil_div(total, positions_);
    for (int64_t i = 0; i < count; ++i) {
      Strip strip{};
      std::vector<int64_t> inputs, gradients;
      for (int64_t p = total * i / count; p < total * (i + 1) / count; ++p) {
        const Axis& x = job_.x;
        for (int64_t j = 0; j < (winograd_ ? 4 : x.kernel); ++j)
          inputs.push_back(x.source(x.position(outputs[p]) + j * x.dilation));
        gradients.push_back(outputs[p]);
        const int64_t second = outputs[p] + x.dilation;
        if (winograd_) gradients.push_back(second < x.outputs ? second : -1);
        ++strip.positions;
      }
      strip.inputs = packed_indices(inputs, strip.input_first, strip.input_count);
      strip.gradients = packed_indices(gradients, strip.gradient_first, strip.gradient_count);
      most_inputs_ = std::max(most_inputs_, strip.input_count);
      most_gradients_ = std::max(most_gradients_, strip.gradient_count);
      strips_.push_back(std::move(strip));
    }
  }

  template <int rows, int bytes>
  INPAINT_INLINE void add_items(const Task& task, const std::vector<Item>& items, int64_t positions,
                                Worker& worker) const {
    const int64_t width = round_up(rows_.valid(task.row_block), kChunk);
    const int64_t channels = channels_.valid(task.channel_block);
    for (int64_t line = task.first_line; line < task.first_line + lines_together_; ++line) {
      for (const Item& item : items) {
        fill_inputs(task, item, line, channels, worker);
        if (winograd_ || line == task.first_line) fill_gradients(task, item, line, width, worker);
      }
      T* sums = block_sums(task, line);
      for (int64_t product = 0; product < products_; ++product) {
        const T* b = worker.b.get() + product * positions_ * b_stride_;
        const Product<T> operands{worker.a.get() + product * positions_ * a_stride_, b, a_stride_, b_stride_,
                                  positions};
        add_product<T, rows, bytes>(operands, taps_ * channels, width, sums, rows_.width);
        sums += taps_ * channels_.width * rows_.width;
      }
      // The second product of a tile in both directions has the sum of its four gradients.
      if (task.channel_block == 0 && line == (winograd_ ? 1 : 0))
        add_columns(worker.b.get() + (winograd_ ? positions_ * b_stride_ : 0), b_stride_, positions, width,
                    bias_sums(task.band, task.row_block));
    }
  }

  INPAINT_INLINE void fill_inputs(const Task& task, const Item& item, int64_t line, int64_t channels,
                                  Worker& worker) const {
    const Strip& strip = *item.strip;
    const int64_t pixel = round_up(channels, kChunk);
    T* rows[2] = {worker.inputs.get(), worker.inputs.get() + packed_size(channels_, most_inputs_)};
    const auto pack = [&](int64_t tap, T* to) INPAINT_INLINE_LAMBDA {
      const Axis& y = job_.y;
      const int64_t row = y.source(y.position(item.y) + tap * y.dilation);
      pack_pixels<T>(job_.input,
                     {item.b, row, strip.input_first, strip.input_count, channels_.begin(task.channel_block), channels},
                     to, pixel);
    };
    const Operand<T> to{worker.a.get() + item.offset * a_stride_, positions_ * a_stride_, a_stride_};
    if (winograd_) {
      constexpr int64_t first[4] = {0, 1, 2, 1}, second[4] = {2, 2, 1, 3};
      pack(first[line], rows[0]);
      pack(second[line], rows[1]);
      transform_inputs<T>({rows[0], rows[1], line == 1 ? T(1) : T(-1)}, pixel, strip.inputs.data(), strip.positions,
                          to);
    } else {
      pack(line, rows[0]);
      gather_pixels<T>(rows[0], pixel, strip.inputs.data(), strip.positions, taps_, channels, to);
    }
  }

  INPAINT_INLINE void fill_gradients(const Task& task, const Item& item, int64_t line, int64_t width,
                                     Worker& worker) const {
    const Strip& strip = *item.strip;
    T* rows[2] = {worker.gradients.get(), worker.gradients.get() + packed_size(rows_, most_gradients_)};
    const auto pack = [&](int64_t row, T* to) INPAINT_INLINE_LAMBDA {
      pack_pixels<T>(job_.gradient,
                     {item.b, row, strip.gradient_first, strip.gradient_count, rows_.begin(task.row_block),
                      rows_.valid(task.row_block)},
                     to, width);
    };
    const Operand<T> to{worker.b.get() + item.offset * b_stride_, positions_ * b_stride_, b_stride_};
    if (winograd_) {
      const int64_t second = item.y + job_.y.dilation;
      pack(line == 3 ? -1 : item.y, rows[0]);
      pack(line == 0 || second >= job_.y.outputs ? -1 : second, rows[1]);
      transform_gradients<T>({rows[0], rows[1], line == 1 ? T(1) : T(-1)}, width, strip.gradients.data(),
                             strip.positions, to);
    } else {
      pack(item.y, rows[0]);
      gather_pixels<T>(rows[0], width, strip.gradients.data(), strip.positions, 1, width, to);
    }
  }

  // One channel of the weight, in up to kChunk rows.
  INPAINT_INLINE void finish_taps(int64_t channel, int64_t row) const {
    const Task task{0, channel / channels_.width, row / rows_.width, 0};
    const int64_t within = channel % channels_.width, column = row % rows_.width;
    const int64_t kernel = job_.y.kernel * job_.x.kernel, valid = std::min<int64_t>(kChunk, rows_.size - row);
    T* to = job_.weight + (row * channels_.size + channel) * kernel;
    const auto put = [&](int64_t tap, Chunk<T> value) INPAINT_INLINE_LAMBDA {
      for (int64_t i = 0; i < valid; ++i) to[i * channels_.size * kernel + tap] = value[i];
    };
    if (!winograd_) {
      const int64_t width = channels_.valid(task.channel_block);
      for (int64_t i = 0; i < job_.y.kernel; ++i)
        for (int64_t j = 0; j < job_.x.kernel; ++j)
          put(i * job_.x.kernel + j, band_sum(task, i, j * width + within, column));
      return;
    }
    Chunk<T> down[4][3];  // [column][row]
    for (int j = 0; j < 4; ++j) {
      Chunk<T> products[4];
      for (int i = 0; i < 4; ++i) products[i] = band_sum(task, i, j * channels_.width + within, column);
      transform_product_line(products, down[j]);
    }
    for (int i = 0; i < 3; ++i) {
      Chunk<T> across[3];
      const Chunk<T> line[4] = {down[0][i], down[1][i], down[2][i], down[3][i]};
      transform_product_line(line, across);
      for (int j = 0; j < 3; ++j) put(3 * i + j, across[j]);
    }
  }

  INPAINT_INLINE Chunk<T> band_sum(Task task, int64_t line, int64_t row, int64_t column) const {
    Chunk<T> sum = {};
    for (task.band = 0; task.band < bands_; ++task.band) {
      const T* from = block_sums(task, line) + row * rows_.width + column;
      // Next channels are far apart: without this, most of the time goes by waiting for them.
      __builtin_prefetch(from + 3 * rows_.width);
      sum += load_chunk<T>(from);
    }
    return sum;
  }

  const WeightGradient<T>& job_;
  Blocks channels_, rows_;
  bool winograd_;
  // Lines of products, how many of which a task has; products of a line; taps that share a product.
  int64_t lines_, lines_together_, products_, taps_;
  int64_t a_stride_, b_stride_, positions_;  // of the operands; positions that are multiplied together
  std::vector<int64_t> first_rows_;
  std::vector<Strip> strips_;
  int64_t most_inputs_ = 0, most_gradients_ = 0, bands_;
  Buffer<T> sums_, bias_;
};

// ---- Instruction sets --------------------------------------------------------------------------------------------

// One version per register file: 8 x 3 vectors of 64 bytes in 32 registers, 4 x 3 of 32 or 16 bytes in 16.
#define INPAINT_WEIGHT_GRADIENT(T, attributes, rows, bytes)                     \
  attributes inline void run_task(const WeightGradientPlan<T>& plan, int64_t i, \
                                  WeightGradientPlan<T>::Worker& worker) {      \
    plan.run<rows, bytes>(i, worker);                                           \
  }                                                                             \
  attributes inline void finish_rows(const WeightGradientPlan<T>& plan, int64_t result) { plan.finish(result); }
#ifdef INPAINT_X86_VERSIONS
#define INPAINT_WEIGHT_GRADIENT_VERSIONS(T)                                    \
  INPAINT_WEIGHT_GRADIENT(T, __attribute__((target("arch=x86-64-v4"))), 8, 64) \
  INPAINT_WEIGHT_GRADIENT(T, __attribute__((target("arch=x86-64-v3"))), 4, 32) \
  INPAINT_WEIGHT_GRADIENT(T, __attribute__((target("default"))), 4, 16)
#else
#define INPAINT_WEIGHT_GRADIENT_VERSIONS(T) INPAINT_WEIGHT_GRADIENT(T, , 4, 16)
#endif
INPAINT_WEIGHT_GRADIENT_VERSIONS(float)
INPAINT_WEIGHT_GRADIENT_VERSIONS(double)

template <class T>
void compute(const WeightGradient<T>& job) {
  const WeightGradientPlan<T> plan(job);
  std::vector<std::unique_ptr<typename WeightGradientPlan<T>::Worker>> workers(worker_count());
  run_tasks(plan.tasks(), kParallelWork, [&](int64_t w, int64_t i) {
    if (workers[w] == nullptr) workers[w] = std::make_unique<typename WeightGradientPlan<T>::Worker>(plan);
    run_task(plan, i, *workers[w]);
  });
  run_tasks(plan.results(), kResultRows * job.input.channels * job.y.kernel * job.x.kernel,
            [&](int64_t, int64_t i) { finish_rows(plan, i); });
}

// grad [B, O, Ho, Wo], x [B, Cin, H, W], each in NCHW or channels_last -> grad_weight [O, Cin, kh, kw] and, if given,
// grad_bias [O]; nothing of them is empty.
void convolution_weight_gradient(const Tensor& grad, const Tensor& x, int64_t stride_y, int64_t stride_x,
                                 int64_t pad_top, int64_t pad_left, int64_t dilation_y, int64_t dilation_x,
                                 int64_t upsample, bool reflect, Tensor grad_weight,
                                 const std::optional<Tensor>& grad_bias) {
  check_dense(grad_weight, "grad_weight", 4);
  STD_TORCH_CHECK(grad.size(0) == x.size(0) && grad.size(1) == grad_weight.size(0) && x.size(1) == grad_weight.size(1),
                  "grad_weight: the sizes do not fit grad and x");
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(grad.scalar_type() == type && grad_weight.scalar_type() == type &&
                      (!grad_bias || grad_bias->scalar_type() == type),
                  "grad, grad_weight, grad_bias: expected the dtype of x");
  STD_TORCH_CHECK(grad.numel() > 0 && x.numel() > 0, "grad, x: expected elements");
  STD_TORCH_CHECK(!grad_bias || grad_bias->numel() == grad.size(1), "grad_bias: expected ", grad.size(1), " elements");
  dispatch_float_double(x.scalar_type(), "x", [&](auto zero) {
    using T = decltype(zero);
    WeightGradient<T> job{};
    job.batch = x.size(0);
    job.y = {x.size(2), grad.size(2), grad_weight.size(2), stride_y, pad_top, dilation_y, upsample, reflect};
    job.x = {x.size(3), grad.size(3), grad_weight.size(3), stride_x, pad_left, dilation_x, upsample, reflect};
    job.input = map_of<const T>(x, "x");
    job.gradient = map_of<const T>(grad, "grad");
    job.weight = elements<T>(grad_weight);
    job.bias = grad_bias ? elements<T>(*grad_bias) : nullptr;
    compute(job);
  });
}

}  // namespace
}  // namespace inpaint

STABLE_TORCH_LIBRARY_IMPL(inpaint_native, CPU, m) {
  m.impl("convolution_weight_gradient", TORCH_BOX(&inpaint::convolution_weight_gradient));
}
