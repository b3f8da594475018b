// What the CUDA kernels of coherent_semantic_attention share: where rows lie, and the arithmetic of one step.
//
// Feature vectors are packed once per call: rows [samples, positions, channels] hold the known positions of a sample in
// raster order, then its masked ones. So the order of rows is that of positions on either side, key k is row k, query i
// is row known + i, and equal scores are decided by the lower row.
//
// A chunk is kChunk queries in a row. Inside it the scan needs no vector: a generated vector is a combination of the
// vector that enters the chunk and of matched ones, and of these only the products with the chunk's queries count.
#pragma once

#include <cmath>
#include <cstring>

#include "device.cuh"
#include "ptx.cuh"

namespace inpaint {
namespace {

constexpr int kChunk = 64;
constexpr double kNormEps = 1e-8;

// A call as the host hands it over: int64 values in this order.
struct CoherentLayout {
  int64_t samples, channels, positions;
  int64_t most_known, most_masked;          // of any sample
  int64_t plan_stride;                      // from one sample's positions to the next one's: 0 if they share a mask
  int64_t channel_stride, position_stride;  // of maps; samples lie channels * positions apart

  INPAINT_HOST_DEVICE int64_t sample_size() const { return channels * positions; }
  INPAINT_HOST_DEVICE int64_t chunks() const { return ceil_div(most_masked, kChunk); }
  INPAINT_HOST_DEVICE int64_t plan_of(int64_t sample) const { return plan_stride == 0 ? 0 : sample; }
};

// Blocks in z: one per sample.
inline unsigned coherent_grid_z(int64_t samples) {
  STD_TORCH_CHECK(samples <= 65535, "a launch has at most 65535 samples, got ", samples);
  return static_cast<unsigned>(samples);
}

// Known positions by raster order, then masked ones; and how many are known.
struct CoherentPlan {
  const int32_t* positions;  // [plans, positions]
  const int32_t* known;      // [plans]
};

// The arrays of one sample.
struct CoherentSample {
  int64_t channels, known, masked;
  const int32_t* positions;

  __device__ CoherentSample(const CoherentLayout& layout, const CoherentPlan& plan, int64_t sample)
      : channels(layout.channels),
        known(plan.known[layout.plan_of(sample)]),
        masked(layout.positions - known),
        positions(plan.positions + layout.plan_stride * sample) {}

  __device__ int64_t position_of_query(int64_t i) const { return positions[known + i]; }
};

template <class T>
__device__ __forceinline__ T inverse_length(T length) {
  return T(1) / (length + static_cast<T>(kNormEps));
}

// Whether one (score, key) wins over another: the larger score, then the lower key; a NaN is larger than any number.
template <class T>
__device__ __forceinline__ bool wins(T score, int32_t key, T other, int32_t other_key) {
  const bool is_nan = score != score, other_is_nan = other != other;
  if (is_nan != other_is_nan) return is_nan;
  if (!is_nan && score != other) return score > other;
  return key < other_key;
}

// Who loses to every key.
constexpr int32_t kNoKey = 0x7fffffff;

template <class T>
struct Match {
  T score;
  int32_t key;

  __device__ static Match none() { return {static_cast<T>(-INFINITY), kNoKey}; }
  __device__ void update(T other, int32_t other_key) {
    if (wins(other, other_key, score, key)) score = other, key = other_key;
  }
};

// The best match of `lanes` neighbouring lanes, in each of them.
template <class T>
__device__ Match<T> best_of_lanes(Match<T> best, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) {
    const T score = __shfl_xor_sync(0xffffffffu, best.score, step);
    best.update(score, __shfl_xor_sync(0xffffffffu, best.key, step));
  }
  return best;
}

// Division for chains of dependent steps: between magnitudes in these bounds no intermediate result leaves the normal
// numbers, and a reciprocal that is made before gives the very quotient that operator / does, without its branch. No
// double is divided so.
constexpr float kLeastDivided = 0x1p-40f, kMostDivided = 0x1p40f;

__device__ __forceinline__ bool divides_plainly(float x) {
  return (fabs(x) >= kLeastDivided) & (fabs(x) <= kMostDivided);
}
__device__ __forceinline__ bool divides_plainly(double) { return false; }

// 1 / divisor as quotient() wants it.
__device__ __forceinline__ float refined_reciprocal(float divisor) {
  const float guess = approximate_reciprocal(divisor);
  return fma(guess, fma(-divisor, guess, 1.0f), guess);
}
__device__ __forceinline__ double refined_reciprocal(double) { return 0; }

// dividend / divisor, correctly rounded.
template <class T>
__device__ __forceinline__ T quotient(T dividend, T divisor, T reciprocal) {
  const T guess = dividend * reciprocal;
  return fma(reciprocal, fma(-divisor, guess, dividend), guess);
}

// alpha * y + beta * k without 0 * infinity: what a restart leaves behind does not matter any more.
template <class T>
__device__ __forceinline__ T blend(T alpha, T y, T beta_k) {
  return alpha == T(0) ? beta_k : fma(alpha, y, beta_k);
}

// ---- The scan over chunks ----------------------------------------------------------------------------------------
// Every pass runs all chunks at once, each from the vector that the pass before made for it; the first one guesses. A
// chunk whose vector has not changed by a bit since is not run again. A last launch, one block per sample, walks over
// the chunks in turn and runs those that are still due: after it, every chunk has seen the very vector that a
// sequential run would have given it, however many passes there were. With none it is the sequential run.

template <class T>
struct ScanCarries {
  T* vectors;        // [2, samples, chunks + 1, channels]: what enters a chunk, in the order of the scan
  int32_t* changed;  // [passes, samples, chunks + 1]: whether a pass replaced it by another one
  int64_t samples, chunks, channels;
  int pass, passes;  // this launch; passes: the last one

  __device__ bool is_last() const { return pass == passes; }
  __device__ bool is_guess() const { return pass == 0 && passes > 0; }
  __device__ T* vector(int which, int64_t sample, int64_t n) const {
    return vectors + (((which & 1) * samples + sample) * (chunks + 1) + n) * channels;
  }
  __device__ int32_t* changed_at(int of_pass, int64_t sample, int64_t n) const {
    return changed + (of_pass * samples + sample) * (chunks + 1) + n;
  }
};

template <class T>
__device__ __forceinline__ bool same_bits(T a, T b) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  Bits bits_a, bits_b;
  memcpy(&bits_a, &a, sizeof(T));
  memcpy(&bits_b, &b, sizeof(T));
  return bits_a == bits_b;
}

// Whether a predicate holds in any thread of the block.
template <int kThreads>
__device__ bool any_of_block(bool predicate) {
  __shared__ int warps[kThreads / kWarp];
  const int any = __any_sync(0xffffffffu, predicate);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = any;
  __syncthreads();
  bool result = false;
  for (int i = 0; i < kThreads / kWarp; ++i) result |= warps[i] != 0;
  __syncthreads();
  return result;
}

// One launch of the scan for one sample. run(n, before, out) computes chunk n, writes the vector that leaves it to
// `out`, and returns whether a bit of it differs from `before` (null: there is no next chunk, or no guess of its
// vector, which in a sequential run nobody makes).
template <int kThreads, class T, class Run>
__device__ void scan_chunks(const ScanCarries<T>& carries, int64_t sample, int64_t chunks, const Run& run) {
  bool has_changed = false, is_settled = false;
  if (carries.is_last() && carries.pass > 0) {
    bool is_any_due = false;
    for (int64_t n = threadIdx.x; n < chunks; n += kThreads)
      is_any_due |= *carries.changed_at(carries.pass - 1, sample, n) != 0;
    is_settled = !any_of_block<kThreads>(is_any_due);
  }
  const int64_t first = carries.is_last() ? 0 : blockIdx.x, step = carries.is_last() ? 1 : gridDim.x;
  for (int64_t n = first; n < chunks && !is_settled; n += step) {
    const bool is_due = carries.pass == 0 || has_changed || *carries.changed_at(carries.pass - 1, sample, n) != 0;
    const T* before = carries.vector(carries.pass, sample, n + 1);
    T* out = carries.vector(carries.is_last() ? carries.pass : carries.pass + 1, sample, n + 1);
    has_changed = false;
    if (is_due) {
      has_changed = run(n, n + 1 < chunks && carries.passes > 0 ? before : nullptr, out);
    } else if (!carries.is_last()) {
      for (int64_t c = threadIdx.x; c < carries.channels; c += kThreads) out[c] = before[c];
    }
    if (threadIdx.x == 0 && !carries.is_last()) {
      *carries.changed_at(carries.pass, sample, n + 1) = has_changed;
      if (n == 0) *carries.changed_at(carries.pass, sample, 0) = 0;
    }
    __syncthreads();
  }
}

}  // namespace
}  // namespace inpaint
