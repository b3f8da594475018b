// Weights of the CPU convolution as its products read them, packed by their own op: a caller keeps them as long as the
// weight does not change.
#pragma once

#include <iterator>

#include "convolution.h"
#include "convolution_kernels.h"
#include "memory.h"
#include "tasks.h"

namespace inpaint {

constexpr int64_t kPackedChannels = 32;  // whose weights one task packs
// Fewer channels than this and Winograd's transforms cost more than they save: beside products one by one, and beside
// pairs of bfloat16.
constexpr int64_t kWinogradChannels = 16, kWinogradChannelsForPairs = 32;
// 16 bits have few digits to lose.
template <class Element>
constexpr int kWinogradOutputs = sizeof(Element) == 2 ? 4 : 2;

// Whether this CPU has vectors of 64 bytes.
inline bool has_wide_vectors() {
#ifdef INPAINT_X86_VERSIONS
  return __builtin_cpu_supports("x86-64-v4");
#else
  return false;
#endif
}

// Whether this CPU has AVX512_BF16.
inline bool has_pair_products() {
#ifdef INPAINT_X86_VERSIONS
  return __builtin_cpu_supports("avx512bf16") && has_wide_vectors();
#else
  return false;
#endif
}

template <class Element>
bool uses_pairs() {
  return std::is_same_v<Element, BFloatBits> && has_pair_products();
}

template <class Element>
bool uses_winograd(const Weight<Element>& weight) {
  return weight.kernel_y == 3 && weight.kernel_x == 3 && weight.unit_stride && !weight.few_outputs &&
         std::min(weight.channels, weight.rows) >=
             (uses_pairs<Element>() ? kWinogradChannelsForPairs : kWinogradChannels);
}

// Channels of a packed pixel, unless Winograd's.
template <class Products, class Element>
int64_t packed_channels(const Weight<Element>& weight) {
  return round_up(weight.channels, Products::kDepth);
}

// How the rows of the weight become panels of columns.
class Panels {
 public:
  template <class Element>
  explicit Panels(const Weight<Element>& weight) : gated_(weight.gated), gate_first_(weight.gate_first) {
    outputs_ = gated_ ? weight.rows / 2 : weight.rows;
    struct Kind {
      int64_t columns;
      double cost;  // of one column: a narrow panel has fewer products per load
    };
    // 24 columns are three vectors of 32 bytes, 32 are twice two.
    constexpr Kind wide[] = {{48, 1.0}, {32, 1.05}, {16, 1.25}, {8, 1.3}};
    constexpr Kind narrow[] = {{24, 1.0}, {48, 1.0}, {32, 1.08}, {16, 1.08}, {8, 1.3}};
    const bool is_wide = has_wide_vectors();
    const Kind* kinds = is_wide ? wide : narrow;
    double least = 0;
    for (size_t i = 0; i < (is_wide ? std::size(wide) : std::size(narrow)); ++i) {
      const Kind& kind = kinds[i];
      const int64_t width = gated_ ? kind.columns / 2 : kind.columns;
      if (width % kChunk != 0) continue;
      const double cost = ceil_div(outputs_, width) * kind.columns * kind.cost;
      if (width_ != 0 && cost >= least) continue;
      least = cost;
      columns_ = kind.columns;
      width_ = width;
    }
    block_ = !is_wide && columns_ == 48 ? 24 : columns_;
  }

  int64_t count() const { return ceil_div(outputs_, width_); }
  int64_t columns() const { return columns_; }
  int64_t block() const { return block_; }

  // For so many inner indices.
  PanelLayout layout(int64_t inner) const { return {columns_, block_, inner * block_}; }

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
  int64_t outputs_, columns_ = 0, width_ = 0, block_;
};

// What a convolution reads of its packed weights: weights [panel][block][inner / kDepth][column of block][kDepth],
// inner index product * stride + channel; bias [panel][column]; start [panel][column], what the sums begin with: the
// bias, or 0 where it is added after they are scaled.
template <class Products>
struct PanelWeights {
  template <class Element>
  PanelWeights(const Convolution<typename Products::Sum, Element>& convolution, const Panels& panels, int64_t inner)
      : weights(static_cast<const typename Products::Packed*>(convolution.weight.packed)),
        bias(panels.count() * panels.columns()),
        start(panels.count() * panels.columns()),
        panel_size(inner * panels.columns()),
        layout(panels.layout(inner)) {
    typedef typename Products::Sum T;
    const bool scaled = convolution.epilogue.scale.data != nullptr;
    for (int64_t i = 0; i < panels.count() * panels.columns(); ++i) {
      const int64_t row = panels.row(i / panels.columns(), i % panels.columns());
      bias[i] = row >= 0 && convolution.bias != nullptr ? load_one<T>(convolution.bias + row) : T(0);
      start[i] = scaled ? T(0) : bias[i];
    }
  }

  const typename Products::Packed* weights;
  Buffer<typename Products::Sum> bias, start;
  int64_t panel_size;
  PanelLayout layout;
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

// How the inner index is made: `stride` packed channels for each of so many products.
struct PackedShape {
  int64_t products, stride;
};

template <class Products, class Element>
PackedShape packed_shape(const Weight<Element>& weight) {
  constexpr int64_t inputs = kWinogradOutputs<Element> + 2;
  if (uses_winograd(weight)) return {inputs * inputs, round_up(weight.channels, kChunk)};
  return {weight.taps(), packed_channels<Products>(weight)};
}

template <class Products, class Element>
int64_t bytes_of_panels(const Weight<Element>& weight) {
  const Panels panels(weight);
  const PackedShape shape = packed_shape<Products>(weight);
  return panels.count() * shape.products * shape.stride * panels.columns() * int64_t{sizeof(typename Products::Packed)};
}

// `transform(kernel [taps], to [products])` turns the taps of a channel into what is multiplied, for kChunk columns at
// once.
template <class Products, class Element, class Transform>
void pack_panels(const Weight<Element>& weight, const Transform& transform, typename Products::Packed* packed) {
  typedef typename Products::Sum T;
  typedef typename Products::Packed Packed;
  constexpr int64_t depth = Products::kDepth;
  const Panels panels(weight);
  const PackedShape shape = packed_shape<Products>(weight);
  const int64_t products = shape.products, stride = shape.stride;
  const int64_t channels = weight.channels, columns = panels.columns(), taps = weight.taps();
  const int64_t size = products * stride * columns, blocks = ceil_div(channels, kPackedChannels);
  const PanelLayout layout = panels.layout(products * stride);
  if (stride != channels) std::fill_n(packed, panels.count() * size, Packed{});
  run_tasks(panels.count() * blocks, products * kPackedChannels * columns, [&](int64_t, int64_t task) {
    const int64_t panel = task / blocks, first = task % blocks * kPackedChannels;
    Packed* to = packed + panel * size;
    const Buffer<T> lines(taps * kChunk * kChunk), values(products * kChunk);
    for (int64_t begin = first; begin < std::min(channels, first + kPackedChannels); begin += kChunk) {
      for (int64_t column = 0; column < columns; column += kChunk) {
        const Element* rows[kChunk];
        for (int64_t lane = 0; lane < kChunk; ++lane) {
          const int64_t row = panels.row(panel, column + lane);
          rows[lane] = row < 0 ? nullptr : weight.data + row * channels * taps;
        }
        load_kernels<T>(rows, begin, channels, taps, lines.get());
        for (int64_t c = begin; c < std::min(channels, begin + kChunk); ++c) {
          transform(lines.get() + (c - begin) * taps * kChunk, values.get());
          for (int64_t i = 0; i < products; ++i) {
            const int64_t inner = i * stride + c;
            Packed* target =
                to + layout.template offset<Products>(column) + inner / depth * layout.block * depth + inner % depth;
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
}

template <class Products, class Element>
void pack_products(const Weight<Element>& weight, void* packed) {
  typedef typename Products::Sum T;
  const int64_t size = weight.taps() * kChunk;
  const auto copy = [size](const T* kernel, T* to) { std::copy_n(kernel, size, to); };
  pack_panels<Products>(weight, copy, static_cast<typename Products::Packed*>(packed));
}

// The bytes that pack_weight() writes.
template <class T, class Element>
int64_t packed_bytes(const Weight<Element>& weight) {
  if (uses_pairs<Element>() && !uses_winograd(weight)) return bytes_of_panels<PairProducts>(weight);
  return bytes_of_panels<SingleProducts<T>>(weight);
}

// Packs a weight for every convolution of which the same is known.
template <class T, class Element>
void pack_weight(const Weight<Element>& weight, void* packed) {
  if (uses_winograd(weight))
    return pack_panels<SingleProducts<T>>(weight, transform_kernels<T, kWinogradOutputs<Element>>,
                                          static_cast<T*>(packed));
  if constexpr (std::is_same_v<Element, BFloatBits>)
    if (uses_pairs<Element>()) return pack_products<PairProducts>(weight, packed);
  pack_products<SingleProducts<T>>(weight, packed);
}

}  // namespace inpaint
