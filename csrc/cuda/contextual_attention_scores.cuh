// Scores of contextual_attention on CUDA: pixel correlations -> logits and, per query and warp of keys, the maximum and
// the sum of exponentials.
//
// A thread walks along diagonals of the correlations: its queries and its keys go one to the right with every step, so
// that of the sums a score consists of only one column is new. It takes kScoreLines lines of queries at once, each
// against the key line as far below, which share most of their terms (InnerScores); but one line in the first and last
// line and column of the queries and the first and last line of the keys, where the fuse wraps around (DiagonalScores).
#pragma once

#include "contextual_attention_tiles.cuh"

namespace inpaint {
namespace {

constexpr int kScoreLines = 4;
constexpr int kCarefulLines = 2;  // where a map ends within reach, for which four would leave too few registers
constexpr int kScoreWalk = 36;    // queries of a walk at most; before the first of them it takes four steps for nothing

// Blocks of scores that shall share a multiprocessor: as many as registers for the sums allow.
template <class T>
constexpr int kScoreBlocks = sizeof(T) == 4 ? 3 : 2;

// The sum of the terms of a patch's column.
template <int kPatch, class T>
__device__ __forceinline__ T column_sum(const T* terms) {
  T sum = terms[0];
#pragma unroll
  for (int dy = 1; dy < kPatch; ++dy) sum += terms[dy];
  return sum;
}

// ---- Borders: one line -------------------------------------------------------------------------------------------

// Steps of the fuse that stay in the query map and, downwards, in the key map.
struct PlainSteps {
  int first_e = 1, last_e = 0, first_d = 1, last_d = 0;

  PlainSteps() = default;  // none
  __device__ PlainSteps(const AttentionTile& tile, const GridPosition& p, const GridPosition& q, int half) {
    first_e = max(-half, -min(p.y, q.y));
    last_e = min(half, static_cast<int>(min(tile.query_height - p.y, tile.key_height - q.y)) - 1);
    first_d = max(-half, -p.x);
    last_d = min(half, static_cast<int>(tile.query_width) - 1 - p.x);
  }
  __device__ bool has_down(int e) const { return e >= first_e && e <= last_e; }
  __device__ bool has_right(int d) const { return d >= first_d && d <= last_d; }
  __device__ bool are_all(int half) const {
    return first_e == -half && last_e == half && first_d == -half && last_d == half;
  }
};

// patch_score of patches whose size is known, where p has a row: all rows are looked up, then all terms are asked for.
// One after the other they would be 2 kPatch^2 waits for memory, for which a whole launch waits where a few warps are
// at the borders.
template <class T, int kPatch>
__device__ T whole_patch_score(const AttentionTile& tile, const GridPosition& p, const GridPosition& q,
                               const Pairs<T>& correlations) {
  constexpr int kBefore = (kPatch - 1) / 2;
  const int query_width = static_cast<int>(tile.query_width), key_width = static_cast<int>(tile.key_width);
  int rows[kPatch];
#pragma unroll
  for (int a = 0; a < kPatch; ++a) {
    const int p_y = p.y + a - kBefore, q_y = q.y + a - kBefore;
    const bool has_line = p_y >= 0 && p_y < tile.query_height && q_y >= 0 && q_y < tile.key_height;
    rows[a] = has_line ? correlations.row_of[p_y * query_width + p.x] : -1;
  }
  T sum = 0;
#pragma unroll
  for (int a = 0; a < kPatch; ++a) {
    const int64_t at = rows[a] * correlations.columns + (q.y + a - kBefore) * key_width + q.x;
#pragma unroll
    for (int b = -kBefore; b < kPatch - kBefore; ++b) {
      const bool exists = rows[a] >= 0 && static_cast<unsigned>(p.x + b) < static_cast<unsigned>(query_width) &&
                          static_cast<unsigned>(q.x + b) < static_cast<unsigned>(key_width);
      // Neighbours in a line of the map are neighbours in the matrix.
      sum += exists ? correlations.values[at + b * (correlations.columns + 1)] : T(0);
    }
  }
  return sum;
}

// What S(p, q) sums beyond the plain steps, for a walk: where steps along columns wrap around, all but one of the terms
// along rows are those of the query before.
template <class T, int kPatch, int kHalf>
class WrappingScore {
 public:
  // `continues`: p and q are one to the right of those before, in the same lines.
  __device__ T operator()(const AttentionTile& tile, const Pairs<T>& correlations, const T* inverse_norm,
                          const GridPosition& p, const GridPosition& q, const PlainSteps& plain, bool continues) {
    T sum = 0;
#pragma unroll 1
    for (int e = -kHalf; e <= kHalf; ++e) {
      GridPosition p_column = p, q_column = q;
      const bool p_exists = p_column.step_down(e, tile.query_height, tile.query_width);
      const bool exists = q_column.step_down(e, tile.key_height, tile.key_width) && p_exists;
      const bool wraps = exists && !plain.has_down(e);
      T terms[kSteps];
#pragma unroll
      for (int d = 0; d < kSteps; ++d) terms[d] = terms_[0][d];
#pragma unroll 1
      for (int d = wraps && continues && (known_ & 1u) != 0 ? kHalf : -kHalf; exists && d <= kHalf; ++d) {
        if (!wraps && plain.has_right(d)) continue;
        GridPosition p_row = p_column, q_row = q_column;
        const bool row_exists = p_row.step_right(d, tile.query_height, tile.query_width);
        T term = 0;
        if (q_row.step_right(d, tile.key_height, tile.key_width) && row_exists)
          term = inverse_norm[q_row.y * tile.key_width + q_row.x] *
                 whole_patch_score<T, kPatch>(tile, p_row, q_row, correlations);
        if (wraps) {
#pragma unroll
          for (int k = 0; k + 1 < kSteps; ++k) terms[k] = terms[k + 1];
          terms[kSteps - 1] = term;
        } else {
          sum += term;
        }
      }
#pragma unroll
      for (int d = 0; d < kSteps; ++d) sum += wraps ? terms[d] : T(0);
      // Those of the next step move to the front, so that none is looked up by a number.
      known_ = known_ >> 1 | (wraps ? 1u << (kSteps - 1) : 0u);
#pragma unroll
      for (int d = 0; d < kSteps; ++d) {
#pragma unroll
        for (int k = 0; k + 1 < kSteps; ++k) terms_[k][d] = terms_[k + 1][d];
        terms_[kSteps - 1][d] = terms[d];
      }
    }
    return sum;
  }

 private:
  static constexpr int kSteps = 2 * kHalf + 1;
  unsigned known_ = 0;  // bit e: the terms of step e - kHalf are those of the query before
  T terms_[kSteps][kSteps] = {};
};

// In place of it for a general patch and fuse: no step is plain.
template <class T, int kHalf>
class WrappingScore<T, 0, kHalf> {
 public:
  __device__ T operator()(const AttentionTile& tile, const Pairs<T>& correlations, const T* inverse_norm,
                          const GridPosition& p, const GridPosition& q, const PlainSteps&, bool) const {
    T sum = 0;
    for_each_fused_pair(tile, p, q, [&](const GridPosition& p_term, const GridPosition& q_term) {
      sum += inverse_norm[q_term.y * tile.key_width + q_term.x] *
             patch_score<T>(tile, p_term, q_term, -tile.before(), tile.after(), correlations);
    });
    return sum;
  }
};

// The scores of a walk of one line. Of the sums that S consists of, only one column of each is new in a step; what
// stays is kept in registers:
//
//   columns  G summed down a column of a patch, for every step of the fuse along columns and every column of the patch
//   fused    patch scores over their norm, for every plain step of the fuse
//
// A term's address grows by a constant, and whether it exists is one comparison.
template <class T, int kPatch, int kHalf>
class DiagonalScores {
 public:
  static constexpr int kBefore = (kPatch - 1) / 2, kSteps = 2 * kHalf + 1;
  static constexpr int kLow = kBefore + kHalf, kRows = kPatch + 2 * kHalf, kHigh = kRows - 1 - kLow;

  // A walk from query (y, x_begin), in a tile, and key `key` on, up to x_end.
  __device__ DiagonalScores(const AttentionTile& tile, const Pairs<T>& correlations, const T* inverse_norm, int y,
                            int x_begin, int x_end, int key)
      : correlations_(correlations.values),
        inverse_norm_(inverse_norm),
        stride_(static_cast<unsigned>(correlations.columns) + 1),
        keys_(static_cast<unsigned>(tile.keys())),
        key_width_(static_cast<int>(tile.key_width)),
        columns_end_(static_cast<unsigned>(min(static_cast<int>(tile.query_width), x_end + kHigh))),
        column_(x_begin - kLow) {
    const int height = static_cast<int>(tile.query_height), width = static_cast<int>(tile.query_width);
    const int first_column = max(column_, 0);
#pragma unroll
    for (int a = 0; a < kRows; ++a) {
      const int row_y = y + a - kLow;
      const bool has_row = row_y >= 0 && row_y < height;
      key_[a] = has_row ? key - kLow + (a - kLow) * key_width_ : kNoKey;
      // Neighbours in a line of the map are neighbours in the matrix.
      const int row = has_row ? correlations.row_of[row_y * width + first_column] : 0;
      at_[a] = static_cast<unsigned>(row + column_ - first_column) * (stride_ - 1) + static_cast<unsigned>(key_[a]);
    }
    load_terms();
#pragma unroll 1
    for (int lead = 0; lead < kPatch - 1; ++lead) enter();
    KeyCursor before(tile, key - 2 * kHalf);
    load_norms(before.f);
#pragma unroll 1
    for (int lead = 0; lead < 2 * kHalf; ++lead, before.advance(tile)) step(before);
  }

  // The next query, and its key.
  __device__ __forceinline__ void step(const KeyCursor& key) {
    T norm[kSteps];
#pragma unroll
    for (int e = 0; e < kSteps; ++e) norm[e] = norms_[e];
    load_norms(key.f + 1);
    enter();
    int column = key.u + kHalf;  // of the fused neighbour that enters, which may lie in the next line
    if (column >= key_width_) column -= key_width_;
#pragma unroll
    for (int e = 0; e < kSteps; ++e) {
      T patch = columns_[e][kBefore];
#pragma unroll
      for (int dx = 0; dx < kPatch; ++dx) {
        if (dx == kBefore) continue;
        const bool inside = static_cast<unsigned>(column + dx - kBefore) < static_cast<unsigned>(key_width_);
        patch += inside ? columns_[e][dx] : T(0);
      }
#pragma unroll
      for (int d = 0; d + 1 < kSteps; ++d) fused_[e][d] = fused_[e][d + 1];
      fused_[e][kSteps - 1] = patch * norm[e];
    }
  }

  // The part of S that plain steps contribute: along lines first, as InnerScores adds them.
  __device__ T score(const PlainSteps& plain) const {
    T sum = 0;
#pragma unroll
    for (int e = 0; e < kSteps; ++e) {
      T line = 0;
#pragma unroll
      for (int d = 0; d < kSteps; ++d)
        if (plain.has_right(d - kHalf) && plain.has_down(e - kHalf)) line += fused_[e][d];
      sum += line;
    }
    return sum;
  }

 private:
  static constexpr int kNoKey = -(1 << 30);  // stays negative

  // What the next step needs is asked for one step ahead: a walk would else wait for memory in each of its steps.
  __device__ __forceinline__ void load_terms() {
    const bool has_column = static_cast<unsigned>(column_) < columns_end_;
#pragma unroll
    for (int a = 0; a < kRows; ++a) {
      terms_[a] = has_column && static_cast<unsigned>(key_[a]) < keys_ ? correlations_[at_[a]] : T(0);
      at_[a] += stride_;
      ++key_[a];
    }
    ++column_;
  }
  __device__ __forceinline__ void load_norms(int key) {
#pragma unroll
    for (int e = 0; e < kSteps; ++e) {
      const int q = key + kHalf + (e - kHalf) * key_width_;
      norms_[e] = static_cast<unsigned>(q) < keys_ ? inverse_norm_[q] : T(0);
    }
  }

  // The next column of terms.
  __device__ __forceinline__ void enter() {
    T terms[kRows];
#pragma unroll
    for (int a = 0; a < kRows; ++a) terms[a] = terms_[a];
    load_terms();
#pragma unroll
    for (int e = 0; e < kSteps; ++e) {
#pragma unroll
      for (int dx = 0; dx + 1 < kPatch; ++dx) columns_[e][dx] = columns_[e][dx + 1];
      columns_[e][kPatch - 1] = column_sum<kPatch>(terms + e);
    }
  }

  const T* __restrict__ correlations_;
  const T* __restrict__ inverse_norm_;
  unsigned stride_;
  unsigned at_[kRows];  // of the next term of each row; the host has made sure that a matrix has less than 2^32
  int key_[kRows];      // and its key
  unsigned keys_;
  int key_width_;
  unsigned columns_end_;  // the tile has rows for the columns before it
  int column_;            // of the terms that are asked for next
  T terms_[kRows], norms_[kSteps];
  T columns_[kSteps][kPatch] = {};
  T fused_[kSteps][kSteps] = {};
};

// In place of it for a general patch and fuse: no step is plain.
template <class T, int kHalf>
class DiagonalScores<T, 0, kHalf> {
 public:
  __device__ DiagonalScores(const AttentionTile&, const Pairs<T>&, const T*, int, int, int, int) {}
  __device__ void step(const KeyCursor&) {}
  __device__ T score(const PlainSteps&) const { return 0; }
};

// ---- Inside: several lines ---------------------------------------------------------------------------------------

// The scores of a walk of kLines lines, from where the fuse stays in the maps. The state is that of DiagonalScores
// for all lines together. What enters takes the place of what leaves, so nothing is moved: `phase`, the number of a
// column modulo kPatch, is known when the code is compiled. kCareful: where a map ends within reach, terms are 0.
//
// 42 instructions per score, and 12 for its statistics, where one line at once takes 195. On an H200 scores of 62,500
// keys take 30 ms; 46 ms where lines near the maps' ends go one by one.
template <class T, int kPatch, int kHalf, int kLines, bool kCareful>
class InnerScores {
 public:
  static constexpr int kBefore = (kPatch - 1) / 2, kAfter = kPatch - 1 - kBefore, kSteps = 2 * kHalf + 1;
  static constexpr int kSums = kLines + 2 * kHalf, kTerms = kSums + kPatch - 1;  // lines of patches, of terms
  static constexpr int kLow = kBefore + kHalf, kHigh = kAfter + kHalf;
  static_assert(kPatch % kSteps == 0, "a phase says where the fused columns are, too");

  // Steps by which terms are asked for ahead: a walk would else wait for memory in each of its steps. The few careful
  // ones have no registers for that.
  static constexpr int kAhead = kCareful ? 0 : kPatch;

  // Whether all terms exist, but for columns of queries, of these lines of queries and keys `first` to `last`.
  __device__ static bool reaches(const AttentionTile& tile, int y, int first, int last) {
    const int lines = kLines - 1 + kHigh, width = static_cast<int>(tile.key_width);
    return y >= kLow && y + lines < tile.query_height && first - kLow - kLow * width >= 0 &&
           last + kAhead + kHigh + lines * width < tile.keys();
  }

  // A walk from query (y, x_begin) and key `key` on, up to x_end. Of lines that are not from first_line to last_line on
  // the scores mean nothing.
  __device__ InnerScores(const AttentionTile& tile, const Pairs<T>& correlations, const T* inverse_norm, int y,
                         int first_line, int last_line, int x_begin, int x_end, int key)
      : step_(correlations.columns + 1),
        key_width_(static_cast<int>(tile.key_width)),
        columns_end_(static_cast<unsigned>(min(static_cast<int>(tile.query_width), x_end + kHigh))),
        column_(x_begin - kLow),
        norm_(kept(inverse_norm + key - kHalf - kHalf * key_width_)),
        keys_(static_cast<unsigned>(tile.keys())),
        key_(key - kLow - kLow * key_width_) {
    const int first_column = max(column_, 0);
#pragma unroll
    for (int a = 0; a < kTerms; ++a) {
      const int row_y = y + a - kLow;
      const bool exists = !kCareful || (a >= first_line && a < last_line + kLow + kHigh && row_y >= 0 &&
                                        row_y < static_cast<int>(tile.query_height));
      const int row = exists ? correlations.row_of[row_y * static_cast<int>(tile.query_width) + first_column] : 0;
      rows_ |= (exists ? 1u : 0u) << a;
      from_[a] = static_cast<unsigned>(row) * static_cast<unsigned>(correlations.columns) + a * key_width_;
    }
    // Neighbours in a line of the map are neighbours in the matrix.
    at_ = kept(correlations.values + (column_ - first_column) * correlations.columns + key - kLow - kLow * key_width_);
#pragma unroll
    for (int column = 0; column < kAhead; ++column) load_terms(column);
#pragma unroll
    for (int column = 0; column < kPatch - 1; ++column) enter(column);
    KeyCursor before(tile, key - 2 * kHalf);
#pragma unroll
    for (int column = kPatch - 1; column < kLow + kHigh; ++column, before.advance(tile))
      step(column % kPatch, before.u);
  }

  // The phase of the first query.
  static constexpr int kFirstPhase = (kLow + kHigh) % kPatch;

  // The next queries, and their keys in column u.
  __device__ __forceinline__ void step(int phase, int u) {
    T norms[kSums];
    load_norms(norms);  // these are in the first cache
    enter(phase);
    int column = u + kHalf;  // of the fused neighbour that enters, which may lie in the next line
    if (column >= key_width_) column -= key_width_;
    bool inside[kPatch];
#pragma unroll
    for (int dx = 0; dx < kPatch; ++dx)
      inside[dx] = static_cast<unsigned>(column + dx - kBefore) < static_cast<unsigned>(key_width_);
#pragma unroll
    for (int e = 0; e < kSums; ++e) {
      T patch = columns_[e][(phase + 1 + kBefore) % kPatch];
#pragma unroll
      for (int dx = 0; dx < kPatch; ++dx)
        if (dx != kBefore && inside[dx]) patch += columns_[e][(phase + 1 + dx) % kPatch];
      fused_[e][(phase + 1) % kSteps] = patch * norms[e];
    }
  }

  // S of every line.
  __device__ __forceinline__ void scores(int phase, T (&scores)[kLines]) const {
    T lines[kSums];
#pragma unroll
    for (int e = 0; e < kSums; ++e) {
      lines[e] = fused_[e][(phase + 2) % kSteps];
#pragma unroll
      for (int d = 1; d < kSteps; ++d) lines[e] += fused_[e][(phase + 2 + d) % kSteps];
    }
#pragma unroll
    for (int i = 0; i < kLines; ++i) {
      scores[i] = lines[i];
#pragma unroll
      for (int e = 1; e < kSteps; ++e) scores[i] += lines[i + e];
    }
  }

 private:
  __device__ __forceinline__ void load_terms(int phase) {
    const bool has_column = static_cast<unsigned>(column_) < columns_end_;
#pragma unroll
    for (int a = 0; a < kTerms; ++a) {
      const bool exists = !kCareful || ((rows_ >> a & 1u) != 0 && has_key(key_ + a * key_width_));
      terms_[phase][a] = has_column && exists ? at_[from_[a]] : T(0);
    }
    at_ += step_;
    ++column_;
    ++key_;
  }
  __device__ __forceinline__ void load_norms(T (&norms)[kSums]) {
    const int first = key_ + kLow - kHalf - (kPatch - 1) + (kLow - kHalf) * key_width_;
#pragma unroll
    for (int e = 0; e < kSums; ++e)
      norms[e] = !kCareful || has_key(first + e * key_width_) ? norm_[e * key_width_] : T(0);
    ++norm_;
  }
  __device__ __forceinline__ bool has_key(int key) const { return static_cast<unsigned>(key) < keys_; }

  // The next column of terms.
  __device__ __forceinline__ void enter(int phase) {
    if (kAhead == 0) load_terms(phase);
#pragma unroll
    for (int e = 0; e < kSums; ++e) columns_[e][phase] = column_sum<kPatch>(terms_[phase] + e);
    if (kAhead > 0) load_terms(phase);
  }

  int64_t step_;
  int key_width_;
  unsigned columns_end_;   // the tile has rows for the columns before it
  int column_;             // of the terms that are asked for next
  const T* at_;            // with from_: of these terms
  unsigned from_[kTerms];  // the host has made sure that a matrix has less than 2^32
  const T* norm_;
  unsigned keys_, rows_ = 0;  // what careful ones ask for; bit a: the terms' row a exists
  int key_;                   // of the first of the terms that are asked for next
  T terms_[kPatch][kTerms];
  T columns_[kSums][kPatch];
  T fused_[kSums][kSteps];
};

// ---- Walks -------------------------------------------------------------------------------------------------------

// Logits of a warp, a row for each of its queries, a column for each lane.
template <class T>
using WarpLogits = T[kWarp][kWarp + 1];  // one more: lanes that go along rows meet no bank together

// What the walks of a sample read and write.
template <class T>
struct Scoring {
  const AttentionTile& tile;
  Pairs<T> correlations;
  const T* __restrict__ inverse_norm;
  const T* __restrict__ factor;
  const T* __restrict__ offset;
  T* __restrict__ logits;  // [queries, logit columns]
  T* __restrict__ maxima;  // [queries, partials], of one warp; sums of exponentials lie `to_sums` further on
  int partials;
  int64_t to_sums;
  WarpLogits<T>& warp_logits;

  __device__ int query(int y, int x) const {
    return (y - static_cast<int>(tile.top)) * static_cast<int>(tile.width) + x - static_cast<int>(tile.left);
  }

  __device__ T* partial_of(int y, int x) const { return maxima + int64_t{query(y, x)} * partials; }

  // The statistics of a row of warp_logits, of each lane that has one. A lane goes along a row, with a fifth of the
  // instructions that it takes a warp to agree on each query.
  __device__ __forceinline__ void store_statistics(bool has_row, T* own) const {
    __syncwarp();
    if (has_row) {
      const T(&row)[kWarp + 1] = warp_logits[threadIdx.x % kWarp];
      T most = -INFINITY;
#pragma unroll 16
      for (int k = 0; k < kWarp; ++k) most = fmax(most, row[k]);
      const T zero = most == -INFINITY ? T(0) : most;
      T total = 0;  // a NaN shall reach every probability of its query
#pragma unroll(sizeof(T) == 4 ? 16 : 1)
      for (int k = 0; k < kWarp; ++k) total += exp_of_difference(row[k], zero);
      own[0] = most;
      own[to_sums] = total;
    }
    __syncwarp();
  }

  // Of queries x to x_end of a line, for a warp that has no keys there.
  __device__ void store_no_statistics(int y, int x, int x_end) const {
    for (x += threadIdx.x % kWarp; x < x_end; x += kWarp) {
      T* own = partial_of(y, x);
      own[0] = -INFINITY;
      own[to_sums] = 0;
    }
  }
};

// Lines y + first to y + last of queries x to x_end; line y would meet `key`.
template <int kLines, bool kCareful, class T, int kPatch, int kHalf>
__device__ __forceinline__ void walk_inside(const Scoring<T>& scoring, int y, int first_line, int last_line, int x,
                                            int x_end, int key) {
  using Scores = InnerScores<T, kPatch, kHalf, kLines, kCareful>;
  const auto is_wanted = [=](int line) { return !kCareful || (line >= first_line && line < last_line); };
  constexpr int kRound = kWarp / kLines / kPatch * kPatch;
  const AttentionTile& tile = scoring.tile;
  const int lane = threadIdx.x % kWarp, key_line = static_cast<int>(tile.key_cell_width);
  const int line = static_cast<int>(tile.logit_columns()),
            to_next_line = static_cast<int>(tile.width) * line + key_line;
  Scores scores(tile, scoring.correlations, scoring.inverse_norm, y, first_line, last_line, x, x_end, key);
  const KeyCursor start(tile, key);
  const int key_width = static_cast<int>(tile.key_width);
  int u = start.u, at = start.v * key_line + u;
  T* logits = kept(scoring.logits + int64_t{scoring.query(y, x)} * line);
  T* own = scoring.partial_of(y + lane % kLines, x + lane / kLines);
#pragma unroll 1
  for (int left = x_end - x; left > 0; left -= kRound) {
    const int steps = min(kRound, left);
#pragma unroll 1
    for (int first = 0; first < steps; first += kPatch) {
#pragma unroll
      for (int k = 0; k < kPatch; ++k) {
        if (first + k >= steps) break;
        const int phase = (Scores::kFirstPhase + k) % kPatch;
        T scale[kLines], bias[kLines], sums[kLines];
        const auto load_scale_and_bias = [&] {
#pragma unroll
          for (int i = 0; i < kLines; ++i) {
            scale[i] = is_wanted(i) ? scoring.factor[at + i * key_line] : T(0);
            bias[i] = is_wanted(i) ? scoring.offset[at + i * key_line] : T(0);
          }
        };
        if (Scores::kAhead > 0) load_scale_and_bias();
        scores.step(phase, u);
        scores.scores(phase, sums);
        if (Scores::kAhead == 0) load_scale_and_bias();
#pragma unroll
        for (int i = 0; i < kLines; ++i) {
          const T logit = sums[i] * scale[i] + bias[i];
          if (is_wanted(i)) logits[at + i * to_next_line] = logit;
          scoring.warp_logits[(first + k) * kLines + i][lane] = logit;
        }
        logits += line;
        ++at;
        if (++u == key_width) u = 0, at += key_line - key_width;
      }
    }
    scoring.store_statistics(lane < steps * kLines && is_wanted(lane % kLines), own);
    own += steps * scoring.partials;
  }
}

// Line y of queries x to x_end, the first one against `key`; where there is no such key, the logit counts as -inf.
template <class T, int kPatch, int kHalf>
__device__ __forceinline__ void walk_at_a_border(const Scoring<T>& scoring, int y, int x, int x_end, int key) {
  const AttentionTile& tile = scoring.tile;
  const int lane = threadIdx.x % kWarp, key_line = static_cast<int>(tile.key_cell_width);
  const int keys = static_cast<int>(tile.keys());
  DiagonalScores<T, kPatch, kHalf> scores(tile, scoring.correlations, scoring.inverse_norm, y, x, x_end, key);
  KeyCursor cursor(tile, key);
  T* logits = kept(scoring.logits + scoring.query(y, x) * tile.logit_columns());
  T* own = scoring.partial_of(y, x + lane);
  WrappingScore<T, kPatch, kHalf> wrapping;
  bool continues = false;
#pragma unroll 1
  while (x < x_end) {
    const int steps = min(kWarp, x_end - x);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      scores.step(cursor);
      T logit = -INFINITY;
      if (static_cast<unsigned>(cursor.f) < static_cast<unsigned>(keys)) {
        const int at = cursor.v * key_line + cursor.u;
        const GridPosition p{y, x + step}, q{cursor.v, cursor.u};
        const PlainSteps plain = kPatch > 0 ? PlainSteps(tile, p, q, kHalf) : PlainSteps();
        T score = scores.score(plain);
        if (!plain.are_all(kHalf))
          score += wrapping(tile, scoring.correlations, scoring.inverse_norm, p, q, plain, continues && q.x > 0);
        logit = score * scoring.factor[at] + scoring.offset[at];
        logits[at] = logit;
      }
      scoring.warp_logits[step][lane] = logit;
      logits += tile.logit_columns();
      cursor.advance(tile);
      continues = true;
    }
    scoring.store_statistics(lane < steps, own);
    own += steps * scoring.partials;
    x += steps;
  }
}

// The queries that a warp scores: `lines` lines from (y, x) on, the first one against the lanes' `key`, each next one
// against the key line as far below. Inside are those from which the fuse stays in the maps, whatever the lane's key.
struct ScorePlace {
  int y, lines, x, x_end, key;
  int first_line = 0, last_line = 0, x_inside = 0, x_inside_end = 0;

  // Keys of the warp are at least this, and less than past_keys.
  __device__ int first_key() const { return key - static_cast<int>(threadIdx.x % kWarp); }
  __device__ int past_keys() const { return first_key() + kWarp - 1 + x_end - x; }
  __device__ bool is_inside(int line) const { return line >= first_line && line < last_line; }

  __device__ void find_inside(const AttentionTile& tile, int half) {
    const int key_width = static_cast<int>(tile.key_width), key_border = half * key_width;
    const int keys_end = static_cast<int>(tile.keys()) - key_border;
    const int lines_end = static_cast<int>(tile.query_height) - half;
    x_inside = min(max(x, half), x_end);
    x_inside_end = max(min(x_end, static_cast<int>(tile.query_width) - half), x_inside);
    if (x_inside == x_inside_end) return;
    last_line = lines;
    while (is_inside(first_line) && (y + first_line < half || first_key() + first_line * key_width < key_border))
      ++first_line;
    while (is_inside(last_line - 1) &&
           (y + last_line > lines_end || past_keys() + (last_line - 1) * key_width > keys_end))
      --last_line;
  }
};

template <class T, int kPatch, int kHalf>
__device__ void score_inside(const Scoring<T>& scoring, const ScorePlace& place) {
  using Scores = InnerScores<T, kPatch, kHalf, kScoreLines, false>;
  const int key = place.key + place.x_inside - place.x, key_width = static_cast<int>(scoring.tile.key_width);
  const bool whole = place.last_line - place.first_line == kScoreLines;
  if (whole && Scores::reaches(scoring.tile, place.y, place.first_key(), place.past_keys() - 1)) {
    walk_inside<kScoreLines, false, T, kPatch, kHalf>(scoring, place.y, 0, kScoreLines, place.x_inside,
                                                      place.x_inside_end, key);
  } else {
#pragma unroll 1
    for (int i = place.first_line / kCarefulLines * kCarefulLines; i < place.last_line; i += kCarefulLines)
      walk_inside<kCarefulLines, true, T, kPatch, kHalf>(scoring, place.y + i, place.first_line - i,
                                                         place.last_line - i, place.x_inside, place.x_inside_end,
                                                         key + i * key_width);
  }
}

// What is left of a place.
template <class T, int kPatch, int kHalf>
__device__ void score_borders(const Scoring<T>& scoring, const ScorePlace& place) {
  const int key_width = static_cast<int>(scoring.tile.key_width), keys = static_cast<int>(scoring.tile.keys());
#pragma unroll 1
  for (int i = 0; i < place.lines; ++i) {
    const int to_line = i * key_width;
    const bool has_keys = place.past_keys() + to_line > 0 && place.first_key() + to_line < keys;
#pragma unroll 1
    for (int part = 0; part < 2; ++part) {
      const int begin = part == 0 ? place.x : place.is_inside(i) ? place.x_inside_end : place.x_end;
      const int end = part == 0 && place.is_inside(i) ? place.x_inside : place.x_end;
      if (begin < end && has_keys)
        walk_at_a_border<T, kPatch, kHalf>(scoring, place.y + i, begin, end, place.key + begin - place.x + to_line);
      else
        scoring.store_no_statistics(place.y + i, begin, end);
    }
  }
}

// Threads that score one line, or kScoreLines, against all keys: the first of them meets key 0 with its last query.
INPAINT_HOST_DEVICE inline int64_t score_threads(const AttentionTile& tile) {
  return tile.keys() + kScoreWalk - 1 + (kScoreLines - 1) * tile.key_width;
}

// Blocks of one place: those that walk at the borders, where scores wrap around, and those that walk inside. Borders
// take so much longer that they go first, and each has its own registers. A general patch and fuse is all border.
template <int kPatch>
constexpr unsigned kScoreRoles = kPatch > 0 ? 2 : 1;

// logits [samples, queries, logit columns]; partial [samples][2][queries][partials]: one maximum and one sum of
// exponentials per query and warp. Block (i, role): walk i modulo the walks, of keys i divided by them. kPatch 0: any
// patch and fuse.
template <class T, int kPatch, int kHalf>
__global__ void __launch_bounds__(kWalkThreads, kScoreBlocks<T>)
    contextual_attention_scores_kernel(AttentionTile tile, Pairs<T> correlations, const T* __restrict__ inverse_norm,
                                       const T* __restrict__ factor, const T* __restrict__ offset,
                                       T* __restrict__ logits, T* __restrict__ partial, int partials) {
  __shared__ WarpLogits<T> block_logits[kWalkThreads / kWarp];
  const int64_t sample = blockIdx.z;
  const int top = static_cast<int>(tile.top), left = static_cast<int>(tile.left);
  const int height = static_cast<int>(tile.height), width = static_cast<int>(tile.width);
  const int walks = (width + kScoreWalk - 1) / kScoreWalk, length = (width + walks - 1) / walks;
  const int groups = (height + kScoreLines - 1) / kScoreLines;
  const int key_block = static_cast<int>(blockIdx.x) / (groups * walks);
  const int walk = static_cast<int>(blockIdx.x) - key_block * groups * walks, group = walk / walks;
  const int row = group * kScoreLines, y = top + row, x_begin = left + (walk - group * walks) * length;
  const int x_end = min(x_begin + length, left + width);
  const int thread = key_block * kWalkThreads + static_cast<int>(threadIdx.x),
            key_width = static_cast<int>(tile.key_width);
  const int key = thread - (kScoreWalk - 1) - (kScoreLines - 1) * key_width;
  correlations.values += sample * tile.pixels * tile.key_columns;
  const Scoring<T> scoring{tile,
                           correlations,
                           kept(inverse_norm + sample * tile.keys()),
                           kept(factor + sample * tile.logit_columns()),
                           kept(offset + sample * tile.logit_columns()),
                           logits + sample * tile.queries() * tile.logit_columns(),
                           partial + sample * 2 * tile.queries() * partials + thread / kWarp,
                           partials,
                           tile.queries() * partials,
                           block_logits[threadIdx.x / kWarp]};
  ScorePlace place{y, min(kScoreLines, height - row), x_begin, x_end, key};
  if constexpr (kPatch == 0) {
    score_borders<T, kPatch, kHalf>(scoring, place);
  } else {
    place.find_inside(tile, kHalf);
    if (blockIdx.y == 0)
      score_borders<T, kPatch, kHalf>(scoring, place);
    else
      score_inside<T, kPatch, kHalf>(scoring, place);
  }
}

}  // namespace
}  // namespace inpaint
