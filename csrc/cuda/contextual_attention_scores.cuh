// Scores of contextual_attention on CUDA: pixel correlations -> logits and, per query and warp of keys, the maximum and
// the sum of exponentials.
//
// A thread walks along diagonals of the correlations: its queries and its keys go one to the right with every step, so
// that of the sums a score consists of only one column is new. Where every term exists it takes kScoreLines lines of
// queries at once, each against the key line as far below, which share most of their terms (InnerScores); at the
// borders of the maps, where the fuse wraps around, and what remains of a tile's lines, one line (DiagonalScores).
#pragma once

#include "contextual_attention_tiles.cuh"

namespace inpaint {
namespace {

constexpr int kScoreLines = 4;
constexpr int kScoreWalk = 36;  // queries of a walk at most; before the first of them it takes four steps for nothing

// Blocks of scores that shall share a multiprocessor: as many as registers for the sums allow, of which sm_90 takes
// fewer.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kFloatScoreBlocks = 3;
#else
constexpr int kFloatScoreBlocks = 4;
#endif
template <class T>
constexpr int kScoreBlocks = sizeof(T) == 4 ? kFloatScoreBlocks : 2;

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

// patch_score of patches whose size is known: all rows are looked up, then all terms are asked for. One after the other
// they would be 2 kPatch^2 waits for memory, for which a whole launch waits where a few warps are at the borders.
template <class T, int kPatch>
__device__ T whole_patch_score(const AttentionTile& tile, const GridPosition& p, const GridPosition& q,
                               const Pairs<T>& correlations) {
  constexpr int kBefore = (kPatch - 1) / 2;
  int rows[kPatch][kPatch];
#pragma unroll
  for (int a = 0; a < kPatch; ++a) {
    const int p_y = p.y + a - kBefore, q_y = q.y + a - kBefore;
    const bool has_line = p_y >= 0 && p_y < tile.query_height && q_y >= 0 && q_y < tile.key_height;
#pragma unroll
    for (int b = 0; b < kPatch; ++b) {
      const int p_x = p.x + b - kBefore, q_x = q.x + b - kBefore;
      const bool exists = has_line && p_x >= 0 && p_x < tile.query_width && q_x >= 0 && q_x < tile.key_width;
      rows[a][b] = exists ? correlations.row_of[p_y * tile.query_width + p_x] : -1;
    }
  }
  T sum = 0;
#pragma unroll
  for (int a = 0; a < kPatch; ++a) {
#pragma unroll
    for (int b = 0; b < kPatch; ++b) {
      const int64_t at = rows[a][b] * correlations.columns + (q.y + a - kBefore) * tile.key_width + q.x + b - kBefore;
      sum += rows[a][b] >= 0 ? correlations.values[at] : T(0);
    }
  }
  return sum;
}

// What S(p, q) sums beyond the plain steps, term by term: everything for a general patch and fuse, a third or less at
// the borders, where steps wrap around.
template <class T, int kPatch>
__device__ T wrapping_score(const AttentionTile& tile, const Pairs<T>& correlations, const T* inverse_norm,
                            const GridPosition& p, const GridPosition& q, const PlainSteps& plain) {
  T sum = 0;
  for_each_fused_pair(tile, p, q, [&](const GridPosition& p_term, const GridPosition& q_term, int e, int d) {
    if (plain.has_down(e) && plain.has_right(d)) return;
    const T norm = inverse_norm[q_term.y * tile.key_width + q_term.x];
    if constexpr (kPatch > 0)
      sum += norm * whole_patch_score<T, kPatch>(tile, p_term, q_term, correlations);
    else
      sum += norm * patch_score<T>(tile, p_term, q_term, -tile.before(), tile.after(), correlations);
  });
  return sum;
}

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

// The scores of a walk of kScoreLines lines, where no map ends within reach, but for the columns of the queries. The
// state is that of DiagonalScores for all lines together. What enters takes the place of what leaves, so nothing is
// moved: `phase`, the number of a column modulo kPatch, is known when the code is compiled.
//
// 53 instructions per score, and 12 for its statistics, where one line at once takes 195. On an H200 62,500 keys take
// 46 ms instead of 55: what bounds the kernel now is how long a term that was asked for one step ahead is on its way,
// from rows that lie 250 KB apart.
template <class T, int kPatch, int kHalf>
class InnerScores {
 public:
  static constexpr int kBefore = (kPatch - 1) / 2, kAfter = kPatch - 1 - kBefore, kSteps = 2 * kHalf + 1;
  static constexpr int kSums = kScoreLines + 2 * kHalf, kTerms = kSums + kPatch - 1;  // lines of patches, of terms
  static constexpr int kLow = kBefore + kHalf, kHigh = kAfter + kHalf;
  static_assert(kPatch % kSteps == 0, "a phase says where the fused columns are, too");

  // Whether it can score these lines of queries against keys `first` to `last`.
  __device__ static bool reaches(const AttentionTile& tile, int y, int first, int last) {
    const int lines = kScoreLines - 1 + kHigh, width = static_cast<int>(tile.key_width);
    return y >= kLow && y + lines < tile.query_height && first - kLow - kLow * width >= 0 &&
           last + 1 + kHigh + lines * width < tile.keys();  // + 1: terms are asked for a step ahead
  }

  // A walk from query (y, x_begin) and key `key` on, up to x_end.
  __device__ InnerScores(const AttentionTile& tile, const Pairs<T>& correlations, const T* inverse_norm, int y,
                         int x_begin, int x_end, int key)
      : step_(correlations.columns + 1),
        key_width_(static_cast<int>(tile.key_width)),
        columns_end_(static_cast<unsigned>(min(static_cast<int>(tile.query_width), x_end + kHigh))),
        column_(x_begin - kLow),
        norm_(kept(inverse_norm + key - kHalf - kHalf * key_width_)) {
    const int first_column = max(column_, 0);
#pragma unroll
    for (int a = 0; a < kTerms; ++a) {
      const int row = correlations.row_of[(y + a - kLow) * static_cast<int>(tile.query_width) + first_column];
      from_[a] = static_cast<unsigned>(row) * static_cast<unsigned>(correlations.columns) + a * key_width_;
    }
    // Neighbours in a line of the map are neighbours in the matrix.
    at_ = kept(correlations.values + (column_ - first_column) * correlations.columns + key - kLow - kLow * key_width_);
    load_terms();
#pragma unroll
    for (int column = 0; column < kPatch - 1; ++column) enter(column);
    load_norms();
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
#pragma unroll
    for (int e = 0; e < kSums; ++e) norms[e] = norms_[e];
    load_norms();
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
  __device__ __forceinline__ void scores(int phase, T (&scores)[kScoreLines]) const {
    T lines[kSums];
#pragma unroll
    for (int e = 0; e < kSums; ++e) {
      lines[e] = fused_[e][(phase + 2) % kSteps];
#pragma unroll
      for (int d = 1; d < kSteps; ++d) lines[e] += fused_[e][(phase + 2 + d) % kSteps];
    }
#pragma unroll
    for (int i = 0; i < kScoreLines; ++i) {
      scores[i] = lines[i];
#pragma unroll
      for (int e = 1; e < kSteps; ++e) scores[i] += lines[i + e];
    }
  }

 private:
  // What the next step needs is asked for one step ahead: a walk would else wait for memory in each of its steps.
  __device__ __forceinline__ void load_terms() {
    const bool has_column = static_cast<unsigned>(column_) < columns_end_;
#pragma unroll
    for (int a = 0; a < kTerms; ++a) terms_[a] = has_column ? at_[from_[a]] : T(0);
    at_ += step_;
    ++column_;
  }
  __device__ __forceinline__ void load_norms() {
#pragma unroll
    for (int e = 0; e < kSums; ++e) norms_[e] = norm_[e * key_width_];
    ++norm_;
  }

  // The next column of terms.
  __device__ __forceinline__ void enter(int phase) {
    T terms[kTerms];
#pragma unroll
    for (int a = 0; a < kTerms; ++a) terms[a] = terms_[a];
    load_terms();
#pragma unroll
    for (int e = 0; e < kSums; ++e) columns_[e][phase] = column_sum<kPatch>(terms + e);
  }

  int64_t step_;
  int key_width_;
  unsigned columns_end_;   // the tile has rows for the columns before it
  int column_;             // of the terms that are asked for next
  const T* at_;            // with from_: of these terms
  unsigned from_[kTerms];  // the host has made sure that a matrix has less than 2^32
  const T* norm_;
  T terms_[kTerms], norms_[kSums];
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

  // The statistics of the first `rows` rows of warp_logits: kLines lines of queries from (y, x) on, column by column. A
  // lane goes along a row, with a fifth of the instructions that it takes a warp to agree on each query.
  template <int kLines>
  __device__ __forceinline__ void store_statistics(int rows, int y, int x) const {
    __syncwarp();
    const int lane = threadIdx.x % kWarp;
    if (lane < rows) {
      const T(&row)[kWarp + 1] = warp_logits[lane];
      T most = -INFINITY;
#pragma unroll 16
      for (int k = 0; k < kWarp; ++k) most = fmax(most, row[k]);
      const T zero = most == -INFINITY ? T(0) : most;
      T total = 0;  // a NaN shall reach every probability of its query
#pragma unroll(sizeof(T) == 4 ? 16 : 1)
      for (int k = 0; k < kWarp; ++k) total += exp_of_difference(row[k], zero);
      T* own = maxima + int64_t{query(y + lane % kLines, x + lane / kLines)} * partials;
      own[0] = most;
      own[to_sums] = total;
    }
    __syncwarp();
  }
};

// Lines y to y + kScoreLines - 1 of queries x to x_end, the first one against `key`.
template <class T, int kPatch, int kHalf>
__device__ __forceinline__ void walk_inside(const Scoring<T>& scoring, int y, int x, int x_end, int key) {
  using Scores = InnerScores<T, kPatch, kHalf>;
  constexpr int kRound = kWarp / kScoreLines / kPatch * kPatch;
  const AttentionTile& tile = scoring.tile;
  const int lane = threadIdx.x % kWarp, key_line = static_cast<int>(tile.key_cell_width);
  const int line = static_cast<int>(tile.logit_columns()),
            to_next_line = static_cast<int>(tile.width) * line + key_line;
  Scores scores(tile, scoring.correlations, scoring.inverse_norm, y, x, x_end, key);
  KeyCursor cursor(tile, key);
  T* logits = kept(scoring.logits + int64_t{scoring.query(y, x)} * line);
#pragma unroll 1
  while (x < x_end) {
    const int steps = min(kRound, x_end - x);
#pragma unroll 1
    for (int first = 0; first < steps; first += kPatch) {
#pragma unroll
      for (int k = 0; k < kPatch; ++k) {
        if (first + k >= steps) break;
        const int phase = (Scores::kFirstPhase + k) % kPatch, at = cursor.v * key_line + cursor.u;
        T scale[kScoreLines], bias[kScoreLines], sums[kScoreLines];
#pragma unroll
        for (int i = 0; i < kScoreLines; ++i) {
          scale[i] = scoring.factor[at + i * key_line];
          bias[i] = scoring.offset[at + i * key_line];
        }
        scores.step(phase, cursor.u);
        scores.scores(phase, sums);
#pragma unroll
        for (int i = 0; i < kScoreLines; ++i) {
          const T logit = sums[i] * scale[i] + bias[i];
          logits[at + i * to_next_line] = logit;
          scoring.warp_logits[(first + k) * kScoreLines + i][lane] = logit;
        }
        logits += line;
        cursor.advance(tile);
      }
    }
    scoring.template store_statistics<kScoreLines>(steps * kScoreLines, y, x);
    x += steps;
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
          score += wrapping_score<T, kPatch>(tile, scoring.correlations, scoring.inverse_norm, p, q, plain);
        logit = score * scoring.factor[at] + scoring.offset[at];
        logits[at] = logit;
      }
      scoring.warp_logits[step][lane] = logit;
      logits += tile.logit_columns();
      cursor.advance(tile);
    }
    scoring.template store_statistics<1>(steps, y, x);
    x += steps;
  }
}

// Threads that score one line, or kScoreLines, against all keys: the first of them meets key 0 with its last query.
INPAINT_HOST_DEVICE inline int64_t score_threads(const AttentionTile& tile) {
  return tile.keys() + kScoreWalk - 1 + (kScoreLines - 1) * tile.key_width;
}

// logits [samples, queries, logit columns]; partial [samples][2][queries][partials]: one maximum and one sum of
// exponentials per query and warp. Block (i, j): walk i modulo the walks, of keys i divided by them. kPatch 0: any
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
  // Of the first and the last column the fuse wraps around.
  int x_inner = x_begin, x_inner_end = x_begin;
  if constexpr (kPatch > 0) {
    const int first = key - static_cast<int>(threadIdx.x % kWarp);
    if (row + kScoreLines <= height &&
        InnerScores<T, kPatch, kHalf>::reaches(tile, y, first, first + kWarp - 1 + length - 1)) {
      x_inner = min(max(x_begin, kHalf), x_end);
      x_inner_end = max(min(x_end, static_cast<int>(tile.query_width) - kHalf), x_inner);
      if (x_inner < x_inner_end)
        walk_inside<T, kPatch, kHalf>(scoring, y, x_inner, x_inner_end, key + x_inner - x_begin);
    }
  }
  const int lines = min(kScoreLines, height - row);
#pragma unroll 1
  for (int part = 0; part < 2; ++part) {
    const int begin = part == 0 ? x_begin : x_inner_end, end = part == 0 ? x_inner : x_end;
#pragma unroll 1
    for (int i = 0; i < lines && begin < end; ++i)
      walk_at_a_border<T, kPatch, kHalf>(scoring, y + i, begin, end, key + begin - x_begin + i * key_width);
  }
}

}  // namespace
}  // namespace inpaint
