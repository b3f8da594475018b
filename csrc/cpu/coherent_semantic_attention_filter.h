// A filter in front of the search of coherent_semantic_attention: products of vectors in 16 bits, summed in integers,
// which a processor computes almost twice as fast as float ones, and a bound of how far they are off. Only where a
// product of integers may belong to a better score the scores themselves are computed, so the result has the same bits.
//
// A query q of length |q| stands as Q = round(a q) with a = kUnit / |q|, a key k as K = round(kUnit k / n(k)). With the
// errors e = Q - a q and f = K - kUnit k / n(k), known exactly, Q K differs from a kUnit score by at most
// |e| |K| + kUnit |f|. No product overflows: |Q| |K| is at most about kUnit^2 < 2^31.
#pragma once

#include <cmath>

#include "coherent_semantic_attention_search.h"

namespace inpaint {

constexpr float kUnit = 32000;
// Lengths are sums in float: with that many channels they are off by less than the slack.
constexpr int64_t kMostFilteredChannels = 8192;
constexpr double kLengthSlack = 1.001;
// Shorter queries may have scores that are not normal numbers, whose error is not relative.
constexpr float kShortestSquared = 1e-30f;

// By how much a score, a chain of float operations over the channels, may be off, relative to the vectors' lengths.
inline double error_of_scores(int64_t channels) {
  return 2 * static_cast<double>(channels + 4) * std::numeric_limits<float>::epsilon();
}

// A length computed in float of float errors, rounded up.
inline double rounded_up(float squared_length) { return 1.01 * std::sqrt(static_cast<double>(squared_length)) + 0.1; }

INPAINT_INLINE int32_t rounded(float x) { return static_cast<int32_t>(x + (x < 0 ? -0.5f : 0.5f)); }
INPAINT_INLINE int32_t pair_of(int32_t first, int32_t second) {
  return static_cast<int32_t>((static_cast<uint32_t>(first) & 0xffffu) | (static_cast<uint32_t>(second) << 16));
}

// ---- Queries -----------------------------------------------------------------------------------------------------

// Queries in 16 bits, two channels in a word: [count][stride], zeros behind the last channel.
class FilterQueries {
 public:
  FilterQueries() = default;
  FilterQueries(int64_t count, int64_t channels)
      : channels_(channels),
        stride_(row_stride<int32_t>(ceil_div(channels, 2))),
        words_(count * stride_),
        facts_(count) {}

  int64_t stride() const { return stride_; }
  const int32_t* row(int64_t i) const { return words_.get() + i * stride_; }

  void set(int64_t i, const float* query) {
    float square = 0, error = 0;
    for (int64_t c = 0; c < channels_; ++c) square += query[c] * query[c];
    const float scale = kUnit / std::sqrt(square);
    const bool usable = square > kShortestSquared && std::isfinite(square);
    int32_t* to = words_.get() + i * stride_;
    for (int64_t pair = 0; pair < stride_; ++pair) {
      int32_t parts[2] = {};
      for (int64_t c = 2 * pair; usable && c < std::min(channels_, 2 * pair + 2); ++c) {
        const float x = query[c] * scale;
        parts[c % 2] = rounded(x);
        error += (static_cast<float>(parts[c % 2]) - x) * (static_cast<float>(parts[c % 2]) - x);
      }
      to[pair] = pair_of(parts[0], parts[1]);
    }
    facts_[i] = {usable ? static_cast<double>(scale) * kUnit : 0, rounded_up(error)};
  }

  // The largest product in integers that belongs to no better score than `best`, for keys with errors up to
  // `key_error`.
  int32_t threshold(int64_t i, float best, double key_error) const {
    const Facts& facts = facts_[i];
    constexpr double unit = kLengthSlack * kUnit;
    const double off = facts.error * (unit + key_error) + unit * key_error + unit * unit * error_of_scores(channels_);
    const double value = facts.scale * static_cast<double>(best) - off - 2;  // 2: for rounding to an integer
    if (!(facts.scale > 0) || !(value > std::numeric_limits<int32_t>::min()))
      return std::numeric_limits<int32_t>::min();
    return static_cast<int32_t>(std::min<double>(value, std::numeric_limits<int32_t>::max()));
  }

 private:
  struct Facts {
    double scale, error;  // scale 0: not to be told apart
  };
  int64_t channels_ = 0, stride_ = 0;
  Buffer<int32_t> words_;
  Buffer<Facts> facts_;
};

// ---- Keys --------------------------------------------------------------------------------------------------------

// A block of keys in 16 bits, panels [pairs of channels][columns]; returns the largest error of one, infinity if the
// filter does not serve.
INPAINT_INLINE double pack_filter_panels_body(const KeyBlock<float>& keys, int64_t channels, int64_t columns,
                                              int32_t* to) {
  constexpr int64_t kMostColumns = 64;
  const int64_t pairs = ceil_div(channels, 2);
  float largest = 0;
  bool finite = true;
  for (int64_t panel = 0; panel < keys.valid; panel += columns, to += pairs * columns) {
    const float* from = keys.panels + panel * channels;
    float scale[kMostColumns], error[kMostColumns] = {};
    for (int64_t k = 0; k < columns; ++k) scale[k] = kUnit * keys.inverse_norm[panel + k];
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const float* first = from + 2 * pair * columns;
      const float* second = 2 * pair + 1 < channels ? first + columns : nullptr;
      for (int64_t k = 0; k < columns; ++k) {
        const float x = first[k] * scale[k], y = second ? second[k] * scale[k] : 0;
        const int32_t one = rounded(x), other = rounded(y);
        const float dx = static_cast<float>(one) - x, dy = static_cast<float>(other) - y;
        error[k] += dx * dx + dy * dy;
        to[pair * columns + k] = pair_of(one, other);
      }
    }
    for (int64_t k = 0; k < columns; ++k) {
      finite &= std::isfinite(error[k]) && scale[k] > 0;
      largest = std::max(largest, error[k]);
    }
  }
  return finite ? rounded_up(largest) : std::numeric_limits<double>::infinity();
}
INPAINT_CLONES inline double pack_filter_panels(const KeyBlock<float>& keys, int64_t channels, int64_t columns,
                                                int32_t* to) {
  return pack_filter_panels_body(keys, channels, columns, to);
}

// ---- The search --------------------------------------------------------------------------------------------------

// The same keys twice, and what the filter remembers of every group of queries.
struct FilteredKeys {
  KeyBlock<float> keys;
  const int32_t* panels;
  double error;
  uint8_t* crowded;  // whether most panels of the block before held candidates: then the filter is left out once
};

// Whether so many keys, searched by one worker, are enough: the first of them are mostly better than those before, and
// candidates are computed twice. The best of p panels changes about 1 + ln(p) times for each query of a tile.
inline bool filter_pays(const SearchTile& tile, int64_t keys) {
  const int64_t panels = keys / tile.columns;
  double changes = 1;
  for (int64_t rest = panels; rest > 1; rest /= 2) changes += 0.7;
  return 8 * static_cast<double>(tile.rows) * changes < static_cast<double>(panels);
}

#ifdef INPAINT_X86_VERSIONS
// a0 b0 + a1 b1 of the halves of each word.
template <class Words>
INPAINT_INLINE Words multiply_pairs(Words a, Words b) {
  Words sum;
  asm("vpmaddwd %2, %1, %0" : "=v"(sum) : "v"(a), "v"(b));  // there is no vector expression for it
  return sum;
}

// Whether a key of the panel may be better than the best one of any of `rows` queries.
template <int rows, int bytes>
INPAINT_INLINE bool holds_candidate(const int32_t* queries, int64_t stride, int64_t pairs, const int32_t* panel,
                                    const int32_t* thresholds) {
  typedef typename VectorOf<int32_t, bytes>::type Words;
  constexpr int lanes = bytes / sizeof(int32_t);
  Words sum[rows][2] = {};
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const int32_t* ahead = panel + (pair + kChannelsAhead) * 2 * lanes;
    for (int line = 0; line < 2 * bytes; line += 64) __builtin_prefetch(ahead + line / sizeof(int32_t));
    const Words keys[2] = {load<Words>(panel + pair * 2 * lanes), load<Words>(panel + pair * 2 * lanes + lanes)};
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const Words query = queries[r * stride + pair] - Words{};
      sum[r][0] += multiply_pairs(query, keys[0]);
      sum[r][1] += multiply_pairs(query, keys[1]);
    }
  }
  Words better = {};
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
    better |= sum[r][0] > thresholds[r];
    better |= sum[r][1] > thresholds[r];
  }
  return any_lane(better);
}

// search_block() with the filter in front.
template <int rows, int bytes>
INPAINT_INLINE void filter_block_body(const float* queries, int64_t stride, int64_t count, int64_t channels,
                                      const FilterQueries& filter, int64_t first_row, const FilteredKeys& block,
                                      const Best<float>& best) {
  constexpr int64_t columns = 2 * bytes / sizeof(float);
  const KeyBlock<float>& keys = block.keys;
  const int64_t panels = ceil_div(keys.valid, columns), pairs = ceil_div(channels, 2);
  for (int64_t i = 0; i < count; i += rows) {
    const int32_t* group = filter.row(first_row + i);
    const int64_t next = i + rows < count ? rows * filter.stride() : 0;
    uint8_t& crowded = block.crowded[i / rows];
    const bool filtered = std::isfinite(block.error) && !crowded;
    const Best<float> own{best.score + i, best.index + i};
    int32_t thresholds[rows] = {};
    const auto update = [&]() INPAINT_INLINE_LAMBDA {
      for (int r = 0; r < rows; ++r) thresholds[r] = filter.threshold(first_row + i + r, own.score[r], block.error);
    };
    if (filtered) update();
    int64_t candidates = 0;
    for (int64_t k = 0; k < panels; ++k) {
      prefetch_part(group + rows * filter.stride(), next, k, panels);
      if (filtered &&
          !holds_candidate<rows, bytes>(group, filter.stride(), pairs, block.panels + k * columns * pairs, thresholds))
        continue;
      search_panel<float, rows, bytes>(queries + i * stride, stride, channels, keys.panels + k * columns * channels,
                                       keys.inverse_norm + k * columns, keys.first + k * columns,
                                       keys.valid - k * columns, own);
      ++candidates;
      if (filtered) update();
    }
    crowded = filtered && 2 * candidates > panels;
  }
}

#define INPAINT_FILTER_BLOCK(attributes, tile_rows, bytes)                                                       \
  attributes inline void filter_block(const float* queries, int64_t stride, int64_t count, int64_t channels,     \
                                      const FilterQueries& filter, int64_t first_row, const FilteredKeys& block, \
                                      const Best<float>& best) {                                                 \
    filter_block_body<tile_rows, bytes>(queries, stride, count, channels, filter, first_row, block, best);       \
  }                                                                                                              \
  attributes inline bool has_filter() { return true; }
INPAINT_FILTER_BLOCK(__attribute__((target("arch=x86-64-v4"))), 12, 64)
INPAINT_FILTER_BLOCK(__attribute__((target("arch=x86-64-v3"))), 6, 32)
__attribute__((target("default"))) inline void filter_block(const float*, int64_t, int64_t, int64_t,
                                                            const FilterQueries&, int64_t, const FilteredKeys&,
                                                            const Best<float>&) {}
__attribute__((target("default"))) inline bool has_filter() { return false; }
#else
inline void filter_block(const float*, int64_t, int64_t, int64_t, const FilterQueries&, int64_t, const FilteredKeys&,
                         const Best<float>&) {}
inline bool has_filter() { return false; }
#endif

}  // namespace inpaint
