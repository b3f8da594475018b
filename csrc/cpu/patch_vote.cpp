// patch_vote on the CPU: every target is the weighted mean of what the patches over it propose.
//
// Targets are independent of each other, so the result is the same for any number of threads.

#include "../common.h"
#include "simd.h"

#include <cstdint>
#include <limits>
#include <vector>

namespace inpaint {
namespace {

constexpr int64_t kMaxProposals = 31 * 31;
constexpr int64_t kGrain = 64;  // targets per task
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// One sample: all arrays dense, see ops/patch_vote.py for their meaning.
struct Votes {
  const float* key;
  int64_t channels, key_height, key_width;
  const int64_t* index;
  const float* score;
  const float* confidence;
  int64_t height, width;
  int64_t patch;
  float bandwidth;
  float* out;
};

// The proposals for one target: where each comes from, its patch's distance and confidence, later its weight.
struct Ballot {
  int64_t count;
  int64_t source[kMaxProposals];
  alignas(64) float distance[kMaxProposals + kLanes<float>];
  alignas(64) float weight[kMaxProposals + kLanes<float>];
};

INPAINT_INLINE void collect(const Votes& votes, int64_t target, Ballot& ballot) {
  const int64_t half = votes.patch / 2;
  const int64_t y = target / votes.width, x = target % votes.width;
  const int64_t top = y < half ? 0 : y - half, bottom = y + half < votes.height ? y + half : votes.height - 1;
  const int64_t left = x < half ? 0 : x - half, right = x + half < votes.width ? x + half : votes.width - 1;
  ballot.count = 0;
  for (int64_t row = top; row <= bottom; ++row)
    for (int64_t column = left; column <= right; ++column) {
      const int64_t centre = row * votes.width + column;
      const int64_t match = votes.index[centre];
      if (match < 0) continue;
      const int64_t source_row = match / votes.key_width + y - row;
      const int64_t source_column = match % votes.key_width + x - column;
      if (source_row < 0 || source_row >= votes.key_height || source_column < 0 || source_column >= votes.key_width)
        continue;
      ballot.source[ballot.count] = source_row * votes.key_width + source_column;
      ballot.distance[ballot.count] = -votes.score[centre];
      ballot.weight[ballot.count] = votes.confidence[centre];
      ++ballot.count;
    }
}

// Turns confidences into weights that sum to 1: softmax of confidence - distance / (2 * bandwidth * mean distance).
INPAINT_INLINE void weigh(Ballot& ballot, float bandwidth) {
  const int64_t count = ballot.count;
  float mean = 0.0f;
  for (int64_t i = 0; i < count; ++i) mean += ballot.distance[i];
  const float spread = 2.0f * bandwidth * (mean / static_cast<float>(count));
  const float rate = 1.0f / (spread > 1e-8f ? spread : 1e-8f);
  float largest = -kInfinity;
  for (int64_t i = 0; i < count; ++i) {
    ballot.weight[i] -= ballot.distance[i] * rate;
    if (ballot.weight[i] > largest) largest = ballot.weight[i];
  }
  for (int64_t i = count; i < count + kLanes<float>; ++i) ballot.weight[i] = -kInfinity;
  Vector<float> sum = {};
  for (int64_t i = 0; i < count; i += kLanes<float>) {
    const Vector<float> weight = exp_nonpositive<float>(load<Vector<float>>(ballot.weight + i) - largest);
    store(ballot.weight + i, weight);
    sum += weight;
  }
  const float scale = 1.0f / sum_of_lanes<float>(sum);
  for (int64_t i = 0; i < count; ++i) ballot.weight[i] *= scale;
}

INPAINT_CLONES void count_votes(const Votes& votes, const int64_t* targets, int64_t begin, int64_t end) {
  Ballot ballot;
  const int64_t key_size = votes.key_height * votes.key_width, size = votes.height * votes.width;
  for (int64_t t = begin; t < end; ++t) {
    collect(votes, targets[t], ballot);
    if (ballot.count == 0) continue;
    weigh(ballot, votes.bandwidth);
    for (int64_t c = 0; c < votes.channels; ++c) {
      const float* plane = votes.key + c * key_size;
      float mean = 0.0f;
      for (int64_t i = 0; i < ballot.count; ++i) mean += ballot.weight[i] * plane[ballot.source[i]];
      votes.out[c * size + targets[t]] = mean;
    }
  }
}

// key [B, C, hk, wk], index [B, hq, wq] int64, score [B, hq, wq], confidence [hq, wq], targets [hq, wq] bool,
// contiguous. Returns [B, C, hq, wq], 0 where there is no target or no proposal.
Tensor patch_vote(Tensor key, Tensor index, Tensor score, Tensor confidence, Tensor targets, int64_t patch,
                  double bandwidth) {
  check_dense(key, "key", 4);
  check_dense(index, "index", 3);
  check_dense(score, "score", 3);
  check_dense(confidence, "confidence", 2);
  check_dense(targets, "targets", 2);
  STD_TORCH_CHECK(patch * patch <= kMaxProposals, "patch_vote: patch must be at most 31, got ", patch);
  const int64_t batch = key.size(0), channels = key.size(1), height = index.size(1), width = index.size(2);
  Tensor out = torch::stable::new_zeros(key, {batch, channels, height, width});

  const bool* wanted = targets.const_data_ptr<bool>();
  std::vector<int64_t> places;
  for (int64_t i = 0; i < height * width; ++i)
    if (wanted[i]) places.push_back(i);
  for (int64_t b = 0; b < batch; ++b) {
    const Votes votes{key.const_data_ptr<float>() + b * channels * key.size(2) * key.size(3),
                      channels,
                      key.size(2),
                      key.size(3),
                      index.const_data_ptr<int64_t>() + b * height * width,
                      score.const_data_ptr<float>() + b * height * width,
                      confidence.const_data_ptr<float>(),
                      height,
                      width,
                      patch,
                      static_cast<float>(bandwidth),
                      out.mutable_data_ptr<float>() + b * channels * height * width};
    torch::stable::parallel_for(0, static_cast<int64_t>(places.size()), kGrain,
                                [&](int64_t begin, int64_t end) { count_votes(votes, places.data(), begin, end); });
  }
  return out;
}

}  // namespace
}  // namespace inpaint

STABLE_TORCH_LIBRARY_IMPL(inpaint_native, CPU, m) { m.impl("patch_vote", TORCH_BOX(&inpaint::patch_vote)); }
