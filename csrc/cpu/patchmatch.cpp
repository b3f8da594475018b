// patchmatch on the CPU: approximate nearest patches by propagation and random search.
//
// Every pass reads the previous field and writes a new one (Jacobi order), and every random draw is a hash of
// (seed, iteration, query, draw): the result does not depend on the number of threads. Both maps are packed
// channels-last first, so that one row of a patch is one contiguous run of patch * channels floats.

#include "../common.h"
#include "simd.h"

#include <cstdint>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

namespace inpaint {
namespace {

constexpr int64_t kRunLanes = kLanes<float>;
constexpr int64_t kMaxRun = 256;  // longest packed patch row in floats: patch * channels
constexpr int64_t kGrain = 256;   // queries per task
constexpr int kJumps[] = {8, 4, 2, 1};

using FloatLanes = Vector<float>;
using IntLanes = Vector<int32_t>;

struct Position {
  int32_t row;
  int32_t column;
  bool operator==(const Position& other) const { return row == other.row && column == other.column; }
};

// A map [C, H, W] packed as [H + 2 halo, W + 2 halo, C], zero in the halo, with slack for whole-vector loads at the
// end.
struct PackedMap {
  int64_t height, width, channels, halo, pitch;
  std::vector<float> values;

  PackedMap(const float* planes, int64_t channels_, int64_t height_, int64_t width_, int64_t halo_)
      : height(height_),
        width(width_),
        channels(channels_),
        halo(halo_),
        pitch((width_ + 2 * halo_) * channels_),
        values(static_cast<size_t>(pitch * (height_ + 2 * halo_) + kRunLanes)) {
    torch::stable::parallel_for(0, height, 16, [&](int64_t begin, int64_t end) {
      for (int64_t y = begin; y < end; ++y) {
        float* out = values.data() + (y + halo) * pitch + halo * channels;
        for (int64_t c = 0; c < channels; ++c) {
          const float* in = planes + (c * height + y) * width;
          for (int64_t x = 0; x < width; ++x) out[x * channels + c] = in[x];
        }
      }
    });
  }

  // First float of the patch row `dy` (0 .. patch-1) of the patch whose top left corner is (top, left).
  const float* run(int64_t top, int64_t left, int64_t dy) const {
    return values.data() + (top + halo + dy) * pitch + (left + halo) * channels;
  }
};

struct Problem {
  const PackedMap& query;
  const PackedMap& key;
  const bool* queries;   // [hq, wq]
  const bool* eligible;  // [hk, wk]
  int64_t patch, radius;
  uint32_t seed;
};

struct Field {
  std::vector<Position> match;  // one per query position
  std::vector<float> distance;
  explicit Field(size_t size) : match(size), distance(size) {}
};

inline uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352dU;
  x ^= x >> 15;
  x *= 0x846ca68bU;
  return x ^ (x >> 16);
}

// An integer in [-radius, radius] from 32 random bits.
inline int64_t spread(uint32_t bits, int64_t radius) {
  return static_cast<int64_t>((static_cast<uint64_t>(bits) * static_cast<uint64_t>(2 * radius + 1)) >> 32) - radius;
}

// The part of one query's patch that lies inside the query map, as a row range and a lane mask.
struct Window {
  int64_t top, left, first_row, end_row, vectors;
  IntLanes keep[kMaxRun / kRunLanes];
};

INPAINT_INLINE void set_window(Window& w, const Problem& p, int64_t y, int64_t x) {
  const int64_t half = p.patch / 2, channels = p.query.channels;
  w.top = y - half;
  w.left = x - half;
  w.first_row = w.top < 0 ? -w.top : 0;
  w.end_row = w.top + p.patch > p.query.height ? p.query.height - w.top : p.patch;
  const int64_t begin = (w.left < 0 ? -w.left : 0) * channels;
  const int64_t end = (w.left + p.patch > p.query.width ? p.query.width - w.left : p.patch) * channels;
  w.vectors = (p.patch * channels + kRunLanes - 1) / kRunLanes;
  for (int64_t v = 0; v < w.vectors; ++v)
    for (int64_t lane = 0; lane < kRunLanes; ++lane) {
      const int64_t i = v * kRunLanes + lane;
      w.keep[v][lane] = i >= begin && i < end ? -1 : 0;
    }
}

// Sum of squared differences of two patches; any value >= `bound` means "not better than bound".
INPAINT_INLINE float patch_distance(const Problem& p, const Window& w, Position match, float bound) {
  const int64_t half = p.patch / 2;
  FloatLanes sum = {};
  float total = 0.0f;
  for (int64_t dy = w.first_row; dy < w.end_row; ++dy) {
    const float* a = p.query.run(w.top, w.left, dy);
    const float* b = p.key.run(match.row - half, match.column - half, dy);
    for (int64_t v = 0; v < w.vectors; ++v) {
      FloatLanes difference = load<FloatLanes>(a + v * kRunLanes) - load<FloatLanes>(b + v * kRunLanes);
      // Lanes outside the patch are cleared bit by bit: whatever was read there, NaN included, counts nothing.
      const IntLanes kept = load<IntLanes>(&difference) & w.keep[v];
      difference = load<FloatLanes>(&kept);
      sum += difference * difference;
    }
    if ((dy & 1) || dy + 1 == w.end_row) {
      total = sum_of_lanes<float>(sum);
      if (total >= bound) return total;
    }
  }
  return total;
}

INPAINT_INLINE void consider(const Problem& p, const Window& w, Position candidate, Position& best,
                             float& best_distance) {
  if (candidate == best) return;
  if (candidate.row < 0 || candidate.row >= p.key.height || candidate.column < 0 || candidate.column >= p.key.width)
    return;
  if (!p.eligible[candidate.row * p.key.width + candidate.column]) return;
  const float distance = patch_distance(p, w, candidate, best_distance);
  if (distance < best_distance) {
    best_distance = distance;
    best = candidate;
  }
}

INPAINT_CLONES void score_start(const Problem& p, const int64_t* active, int64_t begin, int64_t end, Field& field) {
  Window window;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t q = active[i];
    set_window(window, p, q / p.query.width, q % p.query.width);
    const float distance = patch_distance(p, window, field.match[q], std::numeric_limits<float>::infinity());
    // A NaN would compare as nearer than everything.
    field.distance[q] = distance == distance ? distance : std::numeric_limits<float>::infinity();
  }
}

INPAINT_CLONES void propagate(const Problem& p, const int64_t* active, int64_t begin, int64_t end, int64_t jump,
                              const Field& from, Field& to) {
  Window window;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t q = active[i], y = q / p.query.width, x = q % p.query.width;
    Position best = from.match[q];
    float best_distance = from.distance[q];
    bool ready = false;
    const int64_t dys[] = {-jump, 0, 0, jump}, dxs[] = {0, -jump, jump, 0};
    for (int n = 0; n < 4; ++n) {
      const int64_t ny = y + dys[n], nx = x + dxs[n];
      if (ny < 0 || ny >= p.query.height || nx < 0 || nx >= p.query.width) continue;
      const int64_t neighbour = ny * p.query.width + nx;
      if (!p.queries[neighbour]) continue;
      const Position theirs = from.match[neighbour];
      const Position candidate{static_cast<int32_t>(theirs.row - dys[n]), static_cast<int32_t>(theirs.column - dxs[n])};
      if (candidate == best) continue;
      if (!ready) set_window(window, p, y, x);
      ready = true;
      consider(p, window, candidate, best, best_distance);
    }
    to.match[q] = best;
    to.distance[q] = best_distance;
  }
}

INPAINT_CLONES void search(const Problem& p, const int64_t* active, int64_t begin, int64_t end, uint32_t iteration,
                           const Field& from, Field& to) {
  Window window;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t q = active[i];
    set_window(window, p, q / p.query.width, q % p.query.width);
    Position best = from.match[q];
    float best_distance = from.distance[q];
    uint32_t state = mix(mix(p.seed + 0x9e3779b9U * (iteration + 1)) ^ static_cast<uint32_t>(q));
    for (int64_t radius = p.radius; radius >= 1; radius /= 2) {
      const uint32_t first = mix(state + 0x9e3779b9U), second = mix(state + 2 * 0x9e3779b9U);
      state += 2 * 0x9e3779b9U;
      const Position candidate{static_cast<int32_t>(best.row + spread(first, radius)),
                               static_cast<int32_t>(best.column + spread(second, radius))};
      consider(p, window, candidate, best, best_distance);
    }
    to.match[q] = best;
    to.distance[q] = best_distance;
  }
}

void match_one(const Problem& p, const std::vector<int64_t>& active, int64_t iterations, const int64_t* start,
               int64_t* index, float* score) {
  const size_t size = static_cast<size_t>(p.query.height * p.query.width);
  Field current(size), next(size);
  const int64_t count = static_cast<int64_t>(active.size());
  for (int64_t q : active)
    current.match[q] = {static_cast<int32_t>(start[q] / p.key.width), static_cast<int32_t>(start[q] % p.key.width)};
  torch::stable::parallel_for(0, count, kGrain,
                              [&](int64_t begin, int64_t end) { score_start(p, active.data(), begin, end, current); });
  for (int64_t iteration = 0; iteration < iterations; ++iteration) {
    for (int jump : kJumps) {
      torch::stable::parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
        propagate(p, active.data(), begin, end, jump, current, next);
      });
      std::swap(current, next);
    }
    torch::stable::parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
      search(p, active.data(), begin, end, static_cast<uint32_t>(iteration), current, next);
    });
    std::swap(current, next);
  }
  for (int64_t q : active) {
    index[q] = current.match[q].row * p.key.width + current.match[q].column;
    score[q] = -current.distance[q];
  }
}

// query [B, C, hq, wq] float32, key [B, C, hk, wk] float32, start [B, hq, wq] int64 (an eligible key; -1: left out),
// queries [hq, wq] bool, eligible [B, hk, wk] bool (whole patch inside the key map): all contiguous.
// Returns index [B, hq, wq] int64 (-1 where not a query) and score = -distance float32 (-inf there).
std::tuple<Tensor, Tensor> patchmatch(Tensor query, Tensor key, Tensor start, Tensor queries, Tensor eligible,
                                      int64_t patch, int64_t iterations, int64_t radius, int64_t seed) {
  const int64_t batch = query.size(0), channels = query.size(1), hq = query.size(2), wq = query.size(3);
  const int64_t hk = key.size(2), wk = key.size(3);
  STD_TORCH_CHECK(patch * channels <= kMaxRun, "patchmatch: patch * channels must be at most ", kMaxRun);
  check_dense(query, "query", 4);
  check_dense(key, "key", 4);
  check_dense(start, "start", 3);
  check_dense(queries, "queries", 2);
  check_dense(eligible, "eligible", 3);
  Tensor index = torch::stable::new_empty(start, {batch, hq, wq});
  Tensor score = torch::stable::new_empty(query, {batch, hq, wq});
  torch::stable::fill_(index, -1);
  torch::stable::fill_(score, -std::numeric_limits<double>::infinity());
  const bool* wanted = queries.const_data_ptr<bool>();
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t* begin = start.const_data_ptr<int64_t>() + b * hq * wq;
    std::vector<int64_t> active;
    for (int64_t q = 0; q < hq * wq; ++q)
      if (wanted[q] && begin[q] >= 0) active.push_back(q);
    const PackedMap packed_query(query.const_data_ptr<float>() + b * channels * hq * wq, channels, hq, wq, patch / 2);
    const PackedMap packed_key(key.const_data_ptr<float>() + b * channels * hk * wk, channels, hk, wk, 0);
    const Problem problem{packed_query,
                          packed_key,
                          wanted,
                          eligible.const_data_ptr<bool>() + b * hk * wk,
                          patch,
                          radius,
                          mix(static_cast<uint32_t>(seed) + static_cast<uint32_t>(b))};
    match_one(problem, active, iterations, begin, index.mutable_data_ptr<int64_t>() + b * hq * wq,
              score.mutable_data_ptr<float>() + b * hq * wq);
  }
  return {index, score};
}

}  // namespace
}  // namespace inpaint

STABLE_TORCH_LIBRARY_IMPL(inpaint_native, CPU, m) { m.impl("patchmatch", TORCH_BOX(&inpaint::patchmatch)); }
