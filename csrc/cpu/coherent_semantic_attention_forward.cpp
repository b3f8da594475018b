// The forward of coherent_semantic_attention on the CPU.
//
// For some samples at a time: the masked vectors become rows, blocks of known vectors are packed into panels by whoever
// searches them, the best known vectors become rows too and are replaced, from first to last, by what is generated.
// The score matrix is never stored; beyond the output it takes two rows per masked position, and half of one for the
// filter that many keys are searched with.
#include "coherent_semantic_attention.h"
#include "coherent_semantic_attention_filter.h"
#include "coherent_semantic_attention_search.h"

#include <algorithm>
#include <limits>
#include <tuple>

namespace inpaint {
namespace {

// Keys of one block, as they are read for every query: what one core keeps in its second-level cache.
constexpr int64_t kPanelBytes = 256 << 10;
constexpr int64_t kBlocksPerWorker = 3;  // fewer keys than that in a block while there are more blocks than workers
constexpr double kEps = 1e-8;

// ---- Packing keys ------------------------------------------------------------------------------------------------

// `count` vectors as panels [channels][columns], zeros up to a whole panel, and 1 / (|x| + eps) of each. The square of
// a norm is one chain over the channels, like a score.
template <class T, class Element>
INPAINT_INLINE void pack_panels_body(const VectorMap<const Element>& map, const int64_t* offsets, int64_t count,
                                     int64_t columns, T* panels, T* inverse_norm) {
  const int64_t padded = round_up(count, columns), channels = map.channels;
  std::fill_n(inverse_norm, padded, T(0));  // the squares, for now
  for (int64_t c = 0; c < channels; ++c) {  // along the positions of a plane, as in gather_rows()
    const Element* from = map.data + c * map.channel_stride;
    for (int64_t k = 0; k < padded; k += kChunk) {
      T* to = panels + k / columns * columns * channels + c * columns + k % columns;
      const int64_t some = std::clamp<int64_t>(count - k, 0, kChunk);
      const bool run = some == kChunk && is_run(map, offsets + k);
      prefetch_plane(map, c + kPlanesAhead, offsets + k, some, run);
      if (run) {
        store(to, load_chunk<T>(from + offsets[k]));
      } else {
        for (int64_t lane = 0; lane < kChunk; ++lane)
          to[lane] = lane < some ? load_one<T>(from + offsets[k + lane]) : T(0);
      }
      const Chunk<T> x = load<Chunk<T>>(to);
      store(inverse_norm + k, load<Chunk<T>>(inverse_norm + k) + x * x);
    }
  }
  for (int64_t k = 0; k < padded; ++k) inverse_norm[k] = T(1) / (std::sqrt(inverse_norm[k]) + T(kEps));
}

#define INPAINT_PACK_PANELS(T, Element)                                                                       \
  INPAINT_CLONES void pack_panels(const VectorMap<const Element>& map, const int64_t* offsets, int64_t count, \
                                  int64_t columns, T* panels, T* inverse_norm) {                              \
    pack_panels_body(map, offsets, count, columns, panels, inverse_norm);                                     \
  }
INPAINT_PACK_PANELS(float, float)
INPAINT_PACK_PANELS(double, double)
INPAINT_PACK_PANELS(float, HalfBits)
INPAINT_PACK_PANELS(float, BFloatBits)

// ---- Generating --------------------------------------------------------------------------------------------------

// <a, b> and <b, b>, in a fixed order: four sums, so that the processor can overlap them.
template <class T, bool squares>
INPAINT_INLINE std::pair<T, T> dot(const T* a, const T* b, int64_t length) {
  constexpr int lanes = kLanes<T>, sums = 4;
  Vector<T> product[sums] = {}, square[sums] = {};
  int64_t c = 0;
  for (; c + sums * lanes <= length; c += sums * lanes) {
    for (int j = 0; j < sums; ++j) {
      const Vector<T> value = load<Vector<T>>(b + c + j * lanes);
      product[j] += load<Vector<T>>(a + c + j * lanes) * value;
      if constexpr (squares) square[j] += value * value;
    }
  }
  T products = sum_of_lanes<T>((product[0] + product[1]) + (product[2] + product[3]));
  T all_squares = squares ? sum_of_lanes<T>((square[0] + square[1]) + (square[2] + square[3])) : T(0);
  for (; c < length; ++c) {
    products += a[c] * b[c];
    if constexpr (squares) all_squares += b[c] * b[c];
  }
  return {products, all_squares};
}

// What the rows of one sample are generated from and what comes of them.
template <class T>
struct Generation {
  const T* queries;
  T* rows;  // the best known vectors, then what is generated
  int64_t stride, count, channels;
  const T* score;
  T* alpha;
  T* beta;
  T* total;
};

template <class T, bool paper>
INPAINT_INLINE void generate_body(const Generation<T>& g) {
  for (int64_t i = 0; i < g.count; ++i) {
    const T* query = g.queries + i * g.stride;
    T* row = g.rows + i * g.stride;
    T s = 0, a = 0, v = g.score[i];
    if (i > 0) {
      const T norm = std::sqrt(dot<T, true>(query, query, g.channels).second) + T(kEps);
      const auto [product, square] = dot<T, paper>(query, row - g.stride, g.channels);
      a = product / norm;
      if constexpr (paper) {
        a /= std::sqrt(square) + T(kEps);
        v /= norm;
      }
      s = a + v;
    }
    if (s == 0 || !std::isfinite(s)) {  // the row starts, or starts again: y = k
      g.alpha[i] = 0;
      g.beta[i] = 1;
      g.total[i] = std::numeric_limits<T>::infinity();
      continue;
    }
    const T alpha = a / s, beta = v / s;
    const T* before = row - g.stride;
    for (int64_t c = 0; c < g.channels; ++c) row[c] = alpha * before[c] + beta * row[c];
    g.alpha[i] = alpha;
    g.beta[i] = beta;
    g.total[i] = s;
  }
}

#define INPAINT_GENERATE(T)                                          \
  INPAINT_CLONES void generate(const Generation<T>& g, bool paper) { \
    if (paper)                                                       \
      generate_body<T, true>(g);                                     \
    else                                                             \
      generate_body<T, false>(g);                                    \
  }
INPAINT_GENERATE(float)
INPAINT_GENERATE(double)

// ---- Samples together --------------------------------------------------------------------------------------------

template <class T, class Element>
struct Sample {
  VectorMap<const Element> x;
  VectorMap<Element> output;
  Positions positions;
  std::vector<int64_t> masked_offsets, known_offsets;
  int64_t first_row = 0;  // of its rows among those of the samples worked on together
  int64_t padded = 0;     // its masked positions, up to a whole group of queries
};

template <class T>
struct Results {
  int64_t* index;
  T* alpha;
  T* beta;
  T* total;
};

template <class T, class Element>
class Group {
 public:
  Group(std::vector<Sample<T, Element>> samples, std::vector<Results<T>> results, bool paper)
      : samples_(std::move(samples)), results_(std::move(results)), paper_(paper) {
    channels_ = samples_[0].x.channels;
    stride_ = row_stride<T>(channels_);
    filtered_ = kHasFilter && has_filter() && channels_ <= kMostFilteredChannels &&
                filter_pays(tile_, samples_[0].positions.known_count() / worker_count());
    for (Sample<T, Element>& sample : samples_) {
      sample.first_row = rows_;
      sample.padded = round_up(sample.positions.masked_count(), tile_.rows);
      rows_ += sample.padded;
    }
  }

  void run() {
    if (rows_ > 0) {
      queries_ = Buffer<T>(rows_ * stride_);
      if (filtered_) filter_ = FilterQueries(rows_, channels_);
      gather_queries();
      search();
      generated_ = Buffer<T>(rows_ * stride_);
      weights_ = Buffer<T>(3 * rows_);
      gather_best();
      generate_rows();
    }
    write();
  }

 private:
  static constexpr bool kHasFilter = std::is_same_v<T, float>;

  int64_t count() const { return static_cast<int64_t>(samples_.size()); }

  // Blocks of rows of all samples.
  Pieces row_blocks() const {
    Pieces pieces;
    for (const Sample<T, Element>& sample : samples_) pieces.add(ceil_div(sample.padded, kRowsPerTask));
    return pieces;
  }

  void gather_queries() {
    row_blocks().run(kRowsPerTask * channels_, [&](int64_t, int64_t b, int64_t block) {
      const Sample<T, Element>& sample = samples_[b];
      const int64_t first = block * kRowsPerTask, masked = sample.positions.masked_count();
      const int64_t last = std::min(sample.padded, first + kRowsPerTask), some = std::min(masked, last) - first;
      T* rows = queries_.get() + (sample.first_row + first) * stride_;
      if (some > 0) gather_rows(sample.x, sample.masked_offsets.data() + first, some, rows, stride_);
      for (int64_t i = std::max(first, masked); i < last; ++i) std::fill_n(rows + (i - first) * stride_, stride_, T(0));
      if constexpr (kHasFilter)
        for (int64_t i = first; filtered_ && i < last; ++i)
          filter_.set(sample.first_row + i, rows + (i - first) * stride_);
    });
  }

  // Every worker keeps the best that it has seen; whose blocks these were is forgotten by taking the best of all.
  void search() {
    int64_t keys = 0;
    for (const Sample<T, Element>& sample : samples_)
      if (sample.padded > 0) keys += sample.positions.known_count();
    const int64_t columns = tile_.columns;
    const int64_t element = filtered_ ? sizeof(int16_t) : sizeof(T);
    const int64_t fits = kPanelBytes / (channels_ * element), share = keys / (kBlocksPerWorker * worker_count());
    const int64_t block = std::max(columns, std::min(fits, share) / columns * columns);
    Pieces pieces;
    for (const Sample<T, Element>& sample : samples_)
      pieces.add(sample.padded > 0 ? ceil_div(sample.positions.known_count(), block) : 0);

    workers_ = std::min(worker_count(), std::max<int64_t>(1, pieces.count()));
    scores_ = Buffer<T>(workers_ * rows_);
    indices_ = Buffer<int32_t>(workers_ * rows_);
    std::fill_n(scores_.get(), workers_ * rows_, -std::numeric_limits<T>::infinity());
    std::fill_n(indices_.get(), workers_ * rows_, std::numeric_limits<int32_t>::max());
    const int64_t own = (channels_ + kChannelsAhead) * block + block;  // the last panels are read ahead of
    const Buffer<T> panels(workers_ * own);
    const int64_t own_words = filtered_ ? ceil_div(channels_, 2) * block : 0;
    const Buffer<int32_t> words(workers_ * own_words);
    std::vector<uint8_t> crowded(filtered_ ? workers_ * rows_ : 0);
    pieces.run(block * rows_, [&](int64_t worker, int64_t b, int64_t piece) {
      const Sample<T, Element>& sample = samples_[b];
      T* packed = panels.get() + worker * own;
      T* inverse_norm = packed + (channels_ + kChannelsAhead) * block;
      const int64_t first = piece * block, valid = std::min(block, sample.positions.known_count() - first);
      pack_panels(sample.x, sample.known_offsets.data() + first, valid, columns, packed, inverse_norm);
      const int64_t at = worker * rows_ + sample.first_row;
      const T* queries = queries_.get() + sample.first_row * stride_;
      const KeyBlock<T> keys{packed, inverse_norm, valid, first};
      const Best<T> best{scores_.get() + at, indices_.get() + at};
      if constexpr (kHasFilter) {
        if (filtered_) {
          int32_t* own_panels = words.get() + worker * own_words;
          const double error = pack_filter_panels(keys, channels_, columns, own_panels);
          return filter_block(queries, stride_, sample.padded, channels_, filter_, sample.first_row,
                              {keys, own_panels, error, crowded.data() + at}, best);
        }
      }
      search_block(queries, stride_, sample.padded, channels_, keys, best);
    });
  }

  // The best of all workers for one row, left at the first of them.
  int64_t merge(int64_t row) {
    T& score = scores_[row];
    int32_t& index = indices_[row];
    for (int64_t worker = 1; worker < workers_; ++worker) {
      const T other = scores_[worker * rows_ + row];
      const int32_t found = indices_[worker * rows_ + row];
      const bool equal = other == score || (other != other && score != score);
      if (equal ? found >= index : !is_better(other, score)) continue;
      score = other;
      index = found;
    }
    return index == std::numeric_limits<int32_t>::max() ? 0 : index;  // every score is -inf
  }

  void gather_best() {
    row_blocks().run(kRowsPerTask * channels_, [&](int64_t, int64_t b, int64_t block) {
      const Sample<T, Element>& sample = samples_[b];
      const int64_t first = block * kRowsPerTask;
      const int64_t last = std::min(sample.positions.masked_count(), first + kRowsPerTask);
      int64_t offsets[kRowsPerTask];
      for (int64_t i = first; i < last; ++i) {
        const int64_t key = merge(sample.first_row + i);
        offsets[i - first] = sample.known_offsets[key];
        results_[b].index[sample.positions.masked[i]] = sample.positions.known[key];
      }
      if (first < last)
        gather_rows(sample.x, offsets, last - first, generated_.get() + (sample.first_row + first) * stride_, stride_);
    });
  }

  void generate_rows() {
    run_tasks(count(), rows_ / count() * channels_, [&](int64_t, int64_t b) {
      const Sample<T, Element>& sample = samples_[b];
      T* weights = weights_.get() + 3 * sample.first_row;
      const Generation<T> g{queries_.get() + sample.first_row * stride_,
                            generated_.get() + sample.first_row * stride_,
                            stride_,
                            sample.positions.masked_count(),
                            channels_,
                            scores_.get() + sample.first_row,
                            weights,
                            weights + sample.padded,
                            weights + 2 * sample.padded};
      generate(g, paper_);
      for (int64_t i = 0; i < g.count; ++i) {
        const int64_t p = sample.positions.masked[i];
        results_[b].alpha[p] = g.alpha[i];
        results_[b].beta[p] = g.beta[i];
        results_[b].total[p] = g.total[i];
      }
    });
  }

  void write() {
    Pieces pieces;
    std::vector<std::vector<MapPart>> parts;
    for (const Sample<T, Element>& sample : samples_) {
      parts.push_back(parts_of(sample.output));
      pieces.add(static_cast<int64_t>(parts.back().size()));
    }
    pieces.run(samples_[0].x.positions(), [&](int64_t, int64_t b, int64_t piece) {
      copy_vectors(samples_[b].x, samples_[b].output, static_cast<const T*>(nullptr), parts[b][piece]);
    });
    if (rows_ == 0) return;
    row_blocks().run(kRowsPerTask * channels_, [&](int64_t, int64_t b, int64_t block) {
      const Sample<T, Element>& sample = samples_[b];
      const int64_t first = block * kRowsPerTask;
      const int64_t last = std::min(sample.positions.masked_count(), first + kRowsPerTask);
      int64_t offsets[kRowsPerTask];
      for (int64_t i = first; i < last; ++i) offsets[i - first] = sample.output.offset(sample.positions.masked[i]);
      if (first < last)
        scatter_rows(generated_.get() + (sample.first_row + first) * stride_, stride_, offsets, last - first,
                     sample.output);
    });
  }

  std::vector<Sample<T, Element>> samples_;
  std::vector<Results<T>> results_;
  bool paper_;
  SearchTile tile_ = search_tile(T{});
  int64_t channels_ = 0, stride_ = 0, rows_ = 0, workers_ = 1;
  Buffer<T> queries_, generated_, scores_, weights_;
  bool filtered_ = false;
  FilterQueries filter_;
  Buffer<int32_t> indices_;
};

// x, output [B, C, H, W], flags [B or 1, H, W]; index, alpha, beta and total [B, H, W], dense.
template <class T, class Element>
void forward(const Tensor& x, const Tensor& flags, bool paper, const Tensor& output, const Tensor& index,
             const Tensor& alpha, const Tensor& beta, const Tensor& total) {
  const int64_t batch = x.size(0), count = x.size(2) * x.size(3);
  int64_t* indices = index.mutable_data_ptr<int64_t>();
  std::fill_n(indices, batch * count, int64_t{-1});
  for (const Tensor* weight : {&alpha, &beta, &total}) std::fill_n(weight->mutable_data_ptr<T>(), batch * count, T(0));
  for (int64_t b = 0; b < batch;) {
    std::vector<Sample<T, Element>> samples;
    std::vector<Results<T>> results;
    for (int64_t bytes = 0; b < batch && (samples.empty() || bytes < kRowBytesTogether); ++b) {
      const bool* own = flags.const_data_ptr<bool>() + (flags.size(0) > 1 ? b * count : 0);
      Sample<T, Element> sample{
          vectors_of<const Element>(x, b), vectors_of<Element>(output, b), Positions(own, count), {}, {}};
      STD_TORCH_CHECK(sample.positions.known_count() > 0, "flags: expected a known position in every sample");
      sample.masked_offsets = offsets_of(sample.x, sample.positions.masked);
      sample.known_offsets = offsets_of(sample.x, sample.positions.known);
      bytes += 2 * sample.positions.masked_count() * x.size(1) * static_cast<int64_t>(sizeof(T));
      samples.push_back(std::move(sample));
      results.push_back({indices + b * count, alpha.mutable_data_ptr<T>() + b * count,
                         beta.mutable_data_ptr<T>() + b * count, total.mutable_data_ptr<T>() + b * count});
    }
    Group<T, Element>(std::move(samples), std::move(results), paper).run();
  }
}

}  // namespace

void coherent_semantic_attention_forward(const Tensor& x, const Tensor& flags, const std::string& variant,
                                         const Tensor& output, const Tensor& index, const Tensor& alpha,
                                         const Tensor& beta, const Tensor& total) {
  check_rank(x, "x", 4);
  check_rank(output, "output", 4);
  check_dense(flags, "flags", 3);
  check_dense(index, "index", 3);
  for (const Tensor* weight : {&alpha, &beta, &total}) check_dense(*weight, "alpha, beta, total", 3);
  STD_TORCH_CHECK(x.size(2) * x.size(3) <= std::numeric_limits<int32_t>::max(),
                  "x: expected fewer than 2^31 positions");
  dispatch_element(x.scalar_type(), "x", [&](auto zero, auto element) {
    forward<decltype(zero), decltype(element)>(x, flags, variant == "paper", output, index, alpha, beta, total);
  });
}

}  // namespace inpaint

STABLE_TORCH_LIBRARY_IMPL(inpaint_native, CPU, m) {
  m.impl("coherent_semantic_attention_forward", TORCH_BOX(&inpaint::coherent_semantic_attention_forward));
}
