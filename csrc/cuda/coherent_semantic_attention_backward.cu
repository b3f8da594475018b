// coherent_semantic_attention, backward, on CUDA.
//
//   coefficients  index, alpha and beta of the masked positions, in the order of the queries
//   scan          from the last query to the first: the derivative lambda of every step, by chunks as in the forward
//   terms         what each query adds to the gradients of its key and of itself
//   gradient      these sums, and the gradient of the output, into the map
//
// Gradient "exact" takes all of them; "straight" has no lambda, its scan carries the gradient through alpha alone;
// "official" has no scan: every matched key follows its column of the attention matrix. Keys are found by a stable sort
// of the queries by key, so each sum has a fixed order.
#include "../kernel_resources.h"
#include "coherent_semantic_attention_scan.cuh"

namespace inpaint {
namespace {

// ---- Coefficients ------------------------------------------------------------------------------------------------

// match, alphas, betas [samples, most_masked]; a sample with fewer queries has kNoKey in the rest.
template <class T>
__global__ void coherent_semantic_attention_coefficients_kernel(CoherentLayout layout, CoherentPlan plan,
                                                                const int32_t* __restrict__ row_of,
                                                                const int64_t* __restrict__ index,
                                                                const T* __restrict__ alpha, const T* __restrict__ beta,
                                                                int32_t* __restrict__ match, T* __restrict__ alphas,
                                                                T* __restrict__ betas) {
  const int64_t sample = blockIdx.z;
  const CoherentSample of(layout, plan, sample);
  for (int64_t i = global_thread(); i < layout.most_masked; i += grid_stride()) {
    const int64_t at = sample * layout.most_masked + i;
    const bool exists = i < of.masked;
    const int64_t p = exists ? sample * layout.positions + of.position_of_query(i) : 0;
    match[at] = exists ? row_of[layout.plan_stride * sample + index[p]] : kNoKey;
    alphas[at] = exists ? alpha[p] : T(0);
    betas[at] = exists ? beta[p] : T(0);
  }
}

// ---- Scan --------------------------------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ T term(T coefficient, T value) {
  return coefficient == T(0) ? T(0) : coefficient * value;
}

// A step of the chunk. reciprocal: of the total; 0: the step's division or its factors need care.
template <class T>
struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) BackwardStep {
  T alpha, beta, total, reciprocal;

  __device__ BackwardStep(T alpha, T beta, T total) : alpha(alpha), beta(beta), total(total), reciprocal(0) {
    if (divides_plainly(total) && divides_plainly(beta) && alpha != T(0)) reciprocal = refined_reciprocal(total);
  }
  BackwardStep() = default;
};

// Products that step l reads in shared memory, with the rows of the lane and with the row before.
template <class T>
struct BackwardProducts {
  T slopes[2], gradients[2], next_slope, next_gradient;

  __device__ __forceinline__ BackwardProducts(const T* slope_products, const T* gradient_products, int l) {
    const int lane = threadIdx.x % kWarp, next = max(l - 1, 0);
    slope_products += l * kChunk;
    gradient_products += next * kChunk;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      slopes[part] = slope_products[lane + part * kWarp];
      gradients[part] = gradient_products[lane + part * kWarp];
    }
    next_slope = slope_products[next];
    next_gradient = gradient_products[next];
  }
};

// lambda_l = d_l . Y_l / s_l of a chunk's steps, from the last to the first, as one warp computes them; Y_l: the whole
// gradient of the vector that step l generates. h_of: d_t . Y of the last step. From one step to the next lead a
// quotient and three multiplications; all else is read ahead of it. Products with rows that are done are of no use.
template <class T>
__device__ void scan_steps_back(int count, const T* slope_products, const T* gradient_products, const T* h_of,
                                const BackwardStep<T>* steps, T* lambdas) {
  const int lane = threadIdx.x % kWarp;
  T h[2] = {h_of[lane], h_of[lane + kWarp]};
  const auto of_row = [&](int r) { return __shfl_sync(0xffffffffu, r < kWarp ? h[0] : h[1], r % kWarp); };
  T own = of_row(count - 1);
  BackwardStep<T> step_ahead = steps[count - 1];
  BackwardProducts<T> products_ahead(slope_products, gradient_products, count - 1);
  T lambda_of_lane[2] = {};
  for (int l = count - 1; l >= 0; --l) {
    const int next = max(l - 1, 0);
    const BackwardStep<T> step = step_ahead;
    BackwardProducts<T> products = products_ahead;
    step_ahead = steps[next];
    products_ahead = BackwardProducts<T>(slope_products, gradient_products, next);
    T next_own = of_row(next);
    T lambda = quotient(own, step.total, step.reciprocal), coefficient = step.beta * lambda;
    if (!((step.reciprocal != T(0)) & divides_plainly(own))) {
      lambda = step.total == INFINITY ? T(0) : own / step.total;
      coefficient = step.beta * lambda;
      // No infinity of what has no part in the sum.
      if (coefficient == T(0)) products.slopes[0] = products.slopes[1] = products.next_slope = 0;
      if (step.alpha == T(0)) h[0] = h[1] = next_own = 0;
    }
    const auto changed = [&](T value, T slope, T gradient) {
      return fma(step.alpha, value, fma(coefficient, slope, gradient));
    };
    own = changed(next_own, products.next_slope, products.next_gradient);
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      h[part] = changed(h[part], products.slopes[part], products.gradients[part]);
      if (l == lane + part * kWarp) lambda_of_lane[part] = lambda;
    }
  }
#pragma unroll
  for (int part = 0; part < 2; ++part)
    if (lane + part * kWarp < count) lambdas[lane + part * kWarp] = lambda_of_lane[part];
}

// Rows of which a thread reads its channel before it uses the first one.
template <class T>
constexpr int kStepsAhead = 32 / sizeof(T);

// lambda [samples, most_masked]; unread and unwritten if not kExact, as are the products. Chunk n of the scan is the
// n-th from the end.
template <class V, bool kExact>
__global__ void __launch_bounds__(kScanThreads, 1)
    coherent_semantic_attention_scan_backward_kernel(CoherentScan<V> scan, ScanCarries<ScoreType<V>> carries,
                                                     const ScoreType<V>* __restrict__ slope_products,
                                                     const ScoreType<V>* __restrict__ gradient_products,
                                                     ScoreType<V>* __restrict__ lambda) {
  using T = ScoreType<V>;
  __shared__ T h[kChunk], lambdas[kChunk], scales[kChunk], other_scales[kChunk];
  alignas(16) __shared__ BackwardStep<T> steps[kChunk];
  T* shared_slopes = dynamic_shared<T>();
  T* shared_gradients = shared_slopes + kChunk * kChunk;
  const int64_t sample = blockIdx.z;
  const SampleScan<V> of(scan, sample);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  scan_chunks<kScanThreads>(carries, sample, of.chunks(), [&](int64_t n, const T* before, T* out) {
    const int64_t chunk = of.chunks() - 1 - n, first = chunk * kChunk;
    const int count = of.rows_of_chunk(chunk);
    const T* in = carries.vector(carries.pass, sample, n);
    const auto entering = [&](int64_t c) { return n == 0 || carries.is_guess() ? T(0) : in[c]; };
    ChunkProducts<T> slopes_of_chunk, gradients_of_chunk;
    if (kExact) {
      slopes_of_chunk.load(slope_products, scan.layout, sample, chunk);
      gradients_of_chunk.load(gradient_products, scan.layout, sample, chunk);
    }
    if (threadIdx.x < count) {
      const int64_t i = first + threadIdx.x, p = of.position_of_query(i);
      steps[threadIdx.x] = BackwardStep<T>(of.alpha[p], of.beta[p], of.total[p]);
      lambdas[threadIdx.x] = 0;
      if (kExact) {
        const RowPair<V> slope = of.slope(i);
        scales[threadIdx.x] = slope.scale;
        other_scales[threadIdx.x] = slope.other_scale;
      }
    }
    if (kExact) {
      slopes_of_chunk.store(shared_slopes);
      gradients_of_chunk.store(shared_gradients);
      const V* last_gradient = of.gradient + (first + count - 1) * of.channels;
      T sums[kRowsOfWarp] = {};
      RowPair<V> differences[kRowsOfWarp];
#pragma unroll
      for (int r = 0; r < kRowsOfWarp; ++r)
        differences[r] = of.difference(min(first + warp * kRowsOfWarp + r, of.masked - 1));
#pragma unroll 16 / sizeof(T)
      for (int64_t c = lane; c < of.channels; c += kWarp) {
        const T whole = entering(c) + static_cast<T>(last_gradient[c]);
#pragma unroll
        for (int r = 0; r < kRowsOfWarp; ++r) sums[r] = fma(differences[r][c], whole, sums[r]);
      }
#pragma unroll
      for (int r = 0; r < kRowsOfWarp; ++r) {
        const T sum = warp_sum(sums[r]);
        if (lane == 0) h[warp * kRowsOfWarp + r] = sum;
      }
    }
    __syncthreads();
    if (kExact && warp == 0) scan_steps_back(count, shared_slopes, shared_gradients, h, steps, lambdas);
    __syncthreads();
    if (kExact && threadIdx.x < count)
      lambda[sample * scan.layout.most_masked + first + threadIdx.x] = lambdas[threadIdx.x];
    bool differs = false;
    for (int64_t c = threadIdx.x; c < of.channels; c += kScanThreads) {
      T z = entering(c);
      for (int last = count - 1; last >= 0; last -= kStepsAhead<T>) {
        // All of them on their way before the first one is used, whatever its factor is.
        T gradients[kStepsAhead<T>], queries[kStepsAhead<T>], generated[kStepsAhead<T>];
#pragma unroll
        for (int s = 0; s < kStepsAhead<T>; ++s) {
          const int64_t i = first + max(last - s, 0);
          gradients[s] = static_cast<T>(of.gradient[i * of.channels + c]);
          if (kExact) queries[s] = static_cast<T>(of.query(i)[c]);
          if (kExact) generated[s] = of.is_paper && i > 0 ? static_cast<T>(of.generated[(i - 1) * of.channels + c]) : 0;
        }
#pragma unroll
        for (int s = 0; s < kStepsAhead<T>; ++s) {
          const int l = last - s;
          if (l < 0) continue;
          T added = 0;
          if (kExact) {
            const T coefficient = steps[l].beta * lambdas[l], along = scales[l] * queries[s];
            const T slope = other_scales[l] == T(0) ? along : fma(other_scales[l], generated[s], along);
            added = term(coefficient, slope);
          }
          z = blend(steps[l].alpha, gradients[s] + z, added);
        }
      }
      if (before != nullptr) differs |= !same_bits(z, carries.is_guess() ? T(0) : before[c]);
      out[c] = z;
    }
    return any_of_block<kScanThreads>(differs);
  });
}

// ---- Terms -------------------------------------------------------------------------------------------------------

constexpr int kTermThreads = kChunk;

// key_terms, query_terms [samples, most_masked, channels]: what a query adds to the gradients of its key and of itself;
// the latter only if kExact. A block takes a chunk, a thread one channel.
template <class V, bool kExact>
__global__ void __launch_bounds__(kTermThreads, 1)
    coherent_semantic_attention_terms_kernel(CoherentScan<V> scan, const ScoreType<V>* __restrict__ vectors,
                                             int64_t passes, const ScoreType<V>* __restrict__ lambda,
                                             ScoreType<V>* __restrict__ key_terms,
                                             ScoreType<V>* __restrict__ query_terms) {
  using T = ScoreType<V>;
  // Per step: what the scan multiplies, and the factors of the terms: `cross` of q in the key's and of k in the
  // query's.
  __shared__ T alphas[kChunk], betas[kChunk], coefficients[kChunk], scales[kChunk], other_scales[kChunk];
  __shared__ T cross[kChunk], of_key[kChunk], of_query[kChunk], of_generated[kChunk];
  __shared__ int32_t keys[kChunk];
  const int64_t sample = blockIdx.z;
  const SampleScan<V> of(scan, sample);
  const int64_t n = of.chunks() - 1 - int64_t{blockIdx.x}, first = int64_t{blockIdx.x} * kChunk;
  const int count = n >= 0 ? of.rows_of_chunk(blockIdx.x) : 0;
  const int thread = threadIdx.x;
  const int64_t channel = int64_t{blockIdx.y} * kTermThreads + thread;
  if (thread < count) {
    const int64_t i = first + thread, p = of.position_of_query(i);
    alphas[thread] = of.alpha[p];
    betas[thread] = of.beta[p];
    keys[thread] = of.match[i];
    const T of_step = kExact ? lambda[sample * scan.layout.most_masked + i] : T(0);
    coefficients[thread] = betas[thread] * of_step;  // the gradient of a_i
    if (kExact) {
      const T a_gradient = coefficients[thread], v_gradient = -alphas[thread] * of_step;
      const RowPair<V> slope = of.slope(i);
      scales[thread] = slope.scale;
      other_scales[thread] = slope.other_scale;
      const T key_length = of.key_length(i), query_length = of.query_length(i);
      const T key_inverse = inverse_length(key_length), query_inverse = inverse_length(query_length);
      const bool has_step = of_step != T(0);
      const T a = has_step ? alphas[thread] * of.total[p] : T(0), v = has_step ? betas[thread] * of.total[p] : T(0);
      cross[thread] = v_gradient * key_inverse * (of.is_paper ? query_inverse : T(1));
      of_key[thread] = key_length > T(0) ? -v_gradient * v * key_inverse / key_length : T(0);
      const T along = a_gradient * a + (of.is_paper ? v_gradient * v : T(0));
      of_query[thread] = query_length > T(0) ? -along * query_inverse / query_length : T(0);
      of_generated[thread] =
          a_gradient * query_inverse * (of.is_paper && i > 0 ? inverse_length(of.generated_norm[i - 1]) : T(1));
    }
  }
  __syncthreads();
  if (channel < of.channels && count > 0) {
    const ScanCarries<T> carries{
        const_cast<T*>(vectors), nullptr, scan.layout.samples, scan.layout.chunks(), of.channels, 0, 0};
    T z = n == 0 ? T(0) : carries.vector(static_cast<int>(passes), sample, n)[channel];
#pragma unroll 4
    for (int l = count - 1; l >= 0; --l) {
      const int64_t i = first + l, at = (sample * scan.layout.most_masked + i) * of.channels + channel;
      const T whole = static_cast<T>(of.gradient[i * of.channels + channel]) + z;
      T key_term = betas[l] * whole, added = 0;
      if (kExact) {
        const T q = static_cast<T>(of.query(i)[channel]), k = static_cast<T>(of.rows[keys[l] * of.channels + channel]);
        const T y = i > 0 ? static_cast<T>(of.generated[(i - 1) * of.channels + channel]) : T(0);
        key_term += term(cross[l], q) + term(of_key[l], k);
        query_terms[at] = term(cross[l], k) + term(of_generated[l], y) + term(of_query[l], q);
        added = term(coefficients[l], scales[l] * q + term(other_scales[l], y));
      }
      key_terms[at] = key_term;
      z = blend(alphas[l], whole, added);
    }
  }
}

// ---- Gradient ----------------------------------------------------------------------------------------------------

constexpr int kGradientPositions = 32;
constexpr int kGradientChannels = 2 * kWarp;
constexpr int kGradientThreads = 256;
constexpr int kGradientWarps = kGradientThreads / kWarp;
constexpr int kPositionsOfWarp = kGradientPositions / kGradientWarps;

enum class CoherentGradient { kOfficial, kStraight, kExact };

__device__ __forceinline__ float product_then_sum(float a, float b, float c) { return __fadd_rn(__fmul_rn(a, b), c); }
__device__ __forceinline__ double product_then_sum(double a, double b, double c) {
  return __dadd_rn(__dmul_rn(a, b), c);
}

// Queries by their key, those of one key in raster order.
struct SortedQueries {
  const int32_t* keys;   // [samples, most_masked], ascending
  const int64_t* order;  // [samples, most_masked]: the query

  // First entry of `key` or of a larger one.
  __device__ int64_t begin_of(int64_t key, int64_t count) const {
    int64_t first = 0, last = count;
    while (first < last) {
      const int64_t middle = (first + last) / 2;
      if (keys[middle] < key)
        first = middle + 1;
      else
        last = middle;
    }
    return first;
  }
};

// The sum of weight * gradient over the rows of the attention matrix, whose weights are those of the column of one key,
// truncated towards zero; in lanes of a warp, two channels each. `weight` follows t <- fl(fl(t alpha) + beta).
template <class V, class T>
__device__ void add_official_column(const SortedQueries& queries, int64_t begin, int64_t end, int64_t masked,
                                    const T* alphas, const T* betas, const V* gradient, int64_t channels,
                                    int64_t channel, T* sums) {
  T t = 0;
  for (int64_t next = begin, i = queries.order[begin]; i < masked;) {
    const bool is_own = next < end && queries.order[next] == i;
    next += is_own;
    t = product_then_sum(t, alphas[i], is_own ? betas[i] : T(0));
    const T weight = trunc(t);
    if (weight != T(0)) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const int64_t c = channel + part * kWarp;
        if (c < channels) sums[part] = fma(weight, static_cast<T>(gradient[i * channels + c]), sums[part]);
      }
    }
    ++i;
    if (t == T(0)) i = next < end ? queries.order[next] : masked;  // nothing until the key is matched again
  }
}

// Into the map: for known positions their part of the gradient of the output and the sum of what queries add; for
// masked ones the gradient of the output itself or, if exact, what the query adds to itself. A sample without a hole is
// the identity. A block takes kGradientPositions positions and kGradientChannels channels.
template <class V, CoherentGradient kGradient>
__global__ void __launch_bounds__(kGradientThreads, 1)
    coherent_semantic_attention_gradient_kernel(CoherentLayout layout, CoherentPlan plan,
                                                const int32_t* __restrict__ row_of, SortedQueries queries,
                                                const ScoreType<V>* __restrict__ alphas,
                                                const ScoreType<V>* __restrict__ betas, const V* __restrict__ gradient,
                                                const ScoreType<V>* __restrict__ key_terms,
                                                const ScoreType<V>* __restrict__ query_terms, ScoreType<V> weight,
                                                const V* __restrict__ output_gradient, V* __restrict__ map_gradient) {
  using T = ScoreType<V>;
  constexpr bool kExact = kGradient == CoherentGradient::kExact;
  __shared__ T tile[kGradientChannels][kGradientPositions + 1];
  const int64_t sample = blockIdx.z, first = int64_t{blockIdx.x} * kGradientPositions;
  const int64_t first_channel = int64_t{blockIdx.y} * kGradientChannels;
  const CoherentSample of(layout, plan, sample);
  const int64_t of_queries = sample * layout.most_masked;
  queries.keys += of_queries;
  queries.order += of_queries;
  alphas += of_queries;
  betas += of_queries;
  gradient += of_queries * of.channels;
  key_terms += of_queries * of.channels;
  query_terms += of_queries * of.channels;
  row_of += layout.plan_stride * sample;
  output_gradient += sample * layout.sample_size();
  map_gradient += sample * layout.sample_size();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const auto row_at = [&](int at) { return first + at < layout.positions ? int64_t{row_of[first + at]} : -1; };
  // Both ends of the queries of every key of the warp, by a lane each: a search is a chain of loads.
  int64_t end_of_lane = 0;
  if (lane < 2 * kPositionsOfWarp) {
    const int64_t row = row_at(warp + lane / 2 * kGradientWarps);
    if (row >= 0 && row < of.known) end_of_lane = queries.begin_of(row + lane % 2, of.masked);
  }
  for (int n = 0; n < kPositionsOfWarp; ++n) {
    const int at = warp + n * kGradientWarps;
    const int64_t row = row_at(at);
    const int64_t begin = __shfl_sync(0xffffffffu, end_of_lane, 2 * n);
    const int64_t end = __shfl_sync(0xffffffffu, end_of_lane, 2 * n + 1);
    const int64_t channel = first_channel + lane;
    T sums[2] = {};
    if (row >= of.known && kExact) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const int64_t c = channel + part * kWarp;
        if (c < of.channels) sums[part] = query_terms[(row - of.known) * of.channels + c];
      }
    }
    if (row >= 0 && row < of.known) {
      if (begin < end && kGradient == CoherentGradient::kOfficial)
        add_official_column(queries, begin, end, of.masked, alphas, betas, gradient, of.channels, channel, sums);
      for (int64_t s = begin; s < end && kGradient != CoherentGradient::kOfficial; ++s) {
        const T* added = key_terms + queries.order[s] * of.channels;
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          const int64_t c = channel + part * kWarp;
          if (c < of.channels) sums[part] += added[c];
        }
      }
    }
#pragma unroll
    for (int part = 0; part < 2; ++part) tile[lane + part * kWarp][at] = sums[part];
  }
  __syncthreads();
  const bool along_positions = layout.position_stride == 1;
  for (int e = threadIdx.x; e < kGradientPositions * kGradientChannels; e += kGradientThreads) {
    const int at = along_positions ? e % kGradientPositions : e / kGradientChannels;
    const int c = along_positions ? e / kGradientPositions : e % kGradientChannels;
    const int64_t p = first + at, channel = first_channel + c;
    if (p >= layout.positions || channel >= of.channels) continue;
    const int64_t place = channel * layout.channel_stride + p * layout.position_stride;
    const T own = static_cast<T>(output_gradient[place]), added = tile[c][at];
    const bool is_known = row_of[p] < of.known;
    T result = added;
    if (kExact && is_known) result += own;
    if (!kExact) result = is_known && of.masked > 0 ? own + weight * (own + added) : own;
    map_gradient[place] = static_cast<V>(result);
  }
}

// ---- Launchers ---------------------------------------------------------------------------------------------------

constexpr size_t kMostBackwardScanBytes = 2 * kChunk * kChunk * sizeof(double);
INPAINT_DYNAMIC_SHARED(coherent_semantic_attention_scan_backward_kernel, kMostBackwardScanBytes);

template <class T>
void launch_coherent_coefficients(const CoherentLayout& layout, const int32_t* positions, const int32_t* known,
                                  const int32_t* row_of, const int64_t* index, const T* alpha, const T* beta,
                                  int32_t* match, T* alphas, T* betas, cudaStream_t stream) {
  launch_kernel(
      coherent_semantic_attention_coefficients_kernel<T>,
      dim3(static_cast<unsigned>(ceil_div(layout.most_masked, kThreadsPerBlock)), 1, coherent_grid_z(layout.samples)),
      dim3(kThreadsPerBlock), 0, stream, layout, CoherentPlan{positions, known}, row_of, index, alpha, beta, match,
      alphas, betas);
}

// The scan of gradient "exact" or, without rows of the maps, of "straight", and what it adds to gradients. products [2,
// samples, chunks, kChunk, kChunk], vectors, changed and lambda are scratch; generated_norm: of variant "paper".
template <class V>
void launch_coherent_backward_scan(const CoherentLayout& layout, const int32_t* positions, const int32_t* known,
                                   const V* rows, const ScoreType<V>* norm, const V* generated,
                                   const ScoreType<V>* generated_norm, const V* gradient, const int32_t* match,
                                   const ScoreType<V>* alpha, const ScoreType<V>* beta, const ScoreType<V>* total,
                                   bool is_paper, bool is_exact, int64_t passes, ScoreType<V>* products,
                                   ScoreType<V>* vectors, int32_t* changed, ScoreType<V>* lambda,
                                   ScoreType<V>* key_terms, ScoreType<V>* query_terms, cudaStream_t stream) {
  using T = ScoreType<V>;
  const CoherentScan<V> scan{layout,    {positions, known}, rows,     norm,  match, is_paper,
                             generated, generated_norm,     gradient, alpha, beta,  total};
  T* gradient_products = products + layout.samples * layout.chunks() * kChunk * kChunk;
  if (is_exact) {
    launch_coherent_products<ChunkProduct::kSlopes>(scan, products, stream);
    launch_coherent_products<ChunkProduct::kGradients>(scan, gradient_products, stream);
  }
  const size_t shared_bytes = is_exact ? 2 * kChunk * kChunk * sizeof(T) : 0;
  for_each_pass(layout, passes, vectors, changed, [&](const ScanCarries<T>& carries, dim3 blocks) {
    const auto kernel = is_exact ? coherent_semantic_attention_scan_backward_kernel<V, true>
                                 : coherent_semantic_attention_scan_backward_kernel<V, false>;
    launch_kernel(kernel, blocks, dim3(kScanThreads), shared_bytes, stream, scan, carries, products, gradient_products,
                  lambda);
  });
  const auto kernel =
      is_exact ? coherent_semantic_attention_terms_kernel<V, true> : coherent_semantic_attention_terms_kernel<V, false>;
  launch_kernel(kernel,
                dim3(static_cast<unsigned>(layout.chunks()), grid_y(ceil_div(layout.channels, kTermThreads)),
                     coherent_grid_z(layout.samples)),
                dim3(kTermThreads), 0, stream, scan, vectors, passes, lambda, key_terms, query_terms);
}

// gradient: packed rows of the masked positions. key_terms: of "straight" and "exact"; query_terms: of "exact".
template <class V>
void launch_coherent_gradient(const CoherentLayout& layout, const int32_t* positions, const int32_t* known,
                              const int32_t* row_of, const int32_t* sorted_keys, const int64_t* order,
                              const ScoreType<V>* alphas, const ScoreType<V>* betas, const V* gradient,
                              const ScoreType<V>* key_terms, const ScoreType<V>* query_terms, CoherentGradient mode,
                              ScoreType<V> weight, const V* output_gradient, V* map_gradient, cudaStream_t stream) {
  const auto launch = [&](auto kernel) {
    launch_kernel(kernel,
                  dim3(static_cast<unsigned>(ceil_div(layout.positions, kGradientPositions)),
                       grid_y(ceil_div(layout.channels, kGradientChannels)), coherent_grid_z(layout.samples)),
                  dim3(kGradientThreads), 0, stream, layout, CoherentPlan{positions, known}, row_of,
                  SortedQueries{sorted_keys, order}, alphas, betas, gradient, key_terms, query_terms, weight,
                  output_gradient, map_gradient);
  };
  if (mode == CoherentGradient::kOfficial)
    launch(coherent_semantic_attention_gradient_kernel<V, CoherentGradient::kOfficial>);
  else if (mode == CoherentGradient::kStraight)
    launch(coherent_semantic_attention_gradient_kernel<V, CoherentGradient::kStraight>);
  else
    launch(coherent_semantic_attention_gradient_kernel<V, CoherentGradient::kExact>);
}

}  // namespace
}  // namespace inpaint

#ifndef INPAINT_EMULATION

#include "coherent_semantic_attention_arguments.cuh"

namespace inpaint {
namespace {

// ---- torch -------------------------------------------------------------------------------------------------------

CoherentGradient parse_coherent_gradient(const std::string& name) {
  if (name == "official") return CoherentGradient::kOfficial;
  if (name == "straight") return CoherentGradient::kStraight;
  if (name == "exact") return CoherentGradient::kExact;
  STD_TORCH_CHECK(false, "gradient: expected 'official', 'straight' or 'exact', got '", name, "'");
}

void coherent_semantic_attention_coefficients(const Tensor& fields, const Tensor& positions, const Tensor& known,
                                              const Tensor& row_of, const Tensor& index, const Tensor& alpha,
                                              const Tensor& beta, Tensor match, Tensor alphas, Tensor betas) {
  const CoherentLayout layout = layout_of(fields);
  for (const Tensor* map : {&index, &alpha, &beta})
    check_elements(*map, "index, alpha, beta", layout.samples * layout.positions);
  for (const Tensor* queries : {&match, &alphas, &betas})
    check_elements(*queries, "match, alphas, betas", layout.samples * layout.most_masked);
  const CudaLaunch launch(alpha);
  dispatch_float_double(alpha.scalar_type(), "alpha", [&](auto zero) {
    using T = decltype(zero);
    launch_coherent_coefficients<T>(layout, plan_data(layout, positions, layout.positions), plan_data(layout, known, 1),
                                    plan_data(layout, row_of, layout.positions), index.const_data_ptr<int64_t>(),
                                    alpha.const_data_ptr<T>(), beta.const_data_ptr<T>(),
                                    match.mutable_data_ptr<int32_t>(), alphas.mutable_data_ptr<T>(),
                                    betas.mutable_data_ptr<T>(), launch.stream);
  });
}

void coherent_semantic_attention_backward_scan(
    const Tensor& fields, const Tensor& positions, const Tensor& known, const std::optional<Tensor>& rows,
    const std::optional<Tensor>& norm, const std::optional<Tensor>& generated,
    const std::optional<Tensor>& generated_norm, const Tensor& gradient, const Tensor& match, const Tensor& alpha,
    const Tensor& beta, const Tensor& total, bool is_paper, int64_t passes, std::optional<Tensor> products,
    Tensor vectors, Tensor changed, std::optional<Tensor> lambda, Tensor key_terms, std::optional<Tensor> query_terms) {
  const CoherentLayout layout = layout_of(fields);
  const int64_t queries = layout.samples * layout.most_masked, chunks = layout.samples * layout.chunks();
  const bool is_exact = rows.has_value();
  STD_TORCH_CHECK(norm.has_value() == is_exact && generated.has_value() == is_exact &&
                      generated_norm.has_value() == is_exact && products.has_value() == is_exact &&
                      lambda.has_value() == is_exact && query_terms.has_value() == is_exact,
                  "rows, norm, generated, generated_norm, products, lambda and query_terms: expected all or none");
  check_elements(gradient, "gradient", queries * layout.channels);
  check_elements(match, "match", queries);
  for (const Tensor* coefficients : {&alpha, &beta, &total})
    check_elements(*coefficients, "coefficients", layout.samples * layout.positions);
  check_elements(vectors, "vectors", 2 * (chunks + layout.samples) * layout.channels);
  check_elements(changed, "changed", passes * (chunks + layout.samples));
  check_elements(key_terms, "key_terms", queries * layout.channels);
  if (is_exact) {
    check_rows(layout, *rows, *norm);
    check_elements(*generated, "generated", queries * layout.channels);
    check_elements(*generated_norm, "generated_norm", queries);
    check_elements(*products, "products", 2 * chunks * kChunk * kChunk);
    check_elements(*lambda, "lambda", queries);
    check_elements(*query_terms, "query_terms", queries * layout.channels);
  }
  const CudaLaunch launch(gradient);
  dispatch_floating(gradient.scalar_type(), "gradient", [&](auto zero) {
    using V = decltype(zero);
    using T = ScoreType<V>;
    launch_coherent_backward_scan<V>(
        layout, plan_data(layout, positions, layout.positions), plan_data(layout, known, 1),
        is_exact ? static_cast<const V*>(rows->data_ptr()) : nullptr, data_or_null<T>(norm),
        is_exact ? static_cast<const V*>(generated->data_ptr()) : nullptr, data_or_null<T>(generated_norm),
        static_cast<const V*>(gradient.data_ptr()), match.const_data_ptr<int32_t>(), alpha.const_data_ptr<T>(),
        beta.const_data_ptr<T>(), total.const_data_ptr<T>(), is_paper, is_exact, passes, written_or_null<T>(products),
        vectors.mutable_data_ptr<T>(), changed.mutable_data_ptr<int32_t>(), written_or_null<T>(lambda),
        key_terms.mutable_data_ptr<T>(), written_or_null<T>(query_terms), launch.stream);
  });
}

void coherent_semantic_attention_gradient(const Tensor& fields, const Tensor& positions, const Tensor& known,
                                          const Tensor& row_of, const Tensor& sorted_keys, const Tensor& order,
                                          const Tensor& alphas, const Tensor& betas, const Tensor& gradient,
                                          const std::optional<Tensor>& key_terms,
                                          const std::optional<Tensor>& query_terms, const std::string& mode_name,
                                          double weight, const Tensor& output_gradient, Tensor map_gradient) {
  const CoherentLayout layout = layout_of(fields);
  const CoherentGradient mode = parse_coherent_gradient(mode_name);
  const int64_t queries = layout.samples * layout.most_masked;
  for (const Tensor* of_queries : {&sorted_keys, &order, &alphas, &betas})
    check_elements(*of_queries, "sorted_keys, order, alphas, betas", queries);
  check_elements(gradient, "gradient", queries * layout.channels);
  STD_TORCH_CHECK(key_terms.has_value() == (mode != CoherentGradient::kOfficial) &&
                      query_terms.has_value() == (mode == CoherentGradient::kExact),
                  "key_terms, query_terms: expected those of gradient '", mode_name, "'");
  if (key_terms) check_elements(*key_terms, "key_terms", queries * layout.channels);
  if (query_terms) check_elements(*query_terms, "query_terms", queries * layout.channels);
  check_map(layout, output_gradient, "output_gradient");
  check_map(layout, map_gradient, "map_gradient");
  const CudaLaunch launch(gradient);
  dispatch_floating(gradient.scalar_type(), "gradient", [&](auto zero) {
    using V = decltype(zero);
    using T = ScoreType<V>;
    launch_coherent_gradient<V>(layout, plan_data(layout, positions, layout.positions), plan_data(layout, known, 1),
                                plan_data(layout, row_of, layout.positions), sorted_keys.const_data_ptr<int32_t>(),
                                order.const_data_ptr<int64_t>(), alphas.const_data_ptr<T>(), betas.const_data_ptr<T>(),
                                static_cast<const V*>(gradient.data_ptr()), data_or_null<T>(key_terms),
                                data_or_null<T>(query_terms), mode, static_cast<T>(weight),
                                static_cast<const V*>(output_gradient.data_ptr()),
                                static_cast<V*>(map_gradient.data_ptr()), launch.stream);
  });
}

}  // namespace
}  // namespace inpaint

STABLE_TORCH_LIBRARY_IMPL(inpaint_native, CUDA, m) {
  m.impl("coherent_semantic_attention_coefficients", TORCH_BOX(&inpaint::coherent_semantic_attention_coefficients));
  m.impl("coherent_semantic_attention_backward_scan", TORCH_BOX(&inpaint::coherent_semantic_attention_backward_scan));
  m.impl("coherent_semantic_attention_gradient", TORCH_BOX(&inpaint::coherent_semantic_attention_gradient));
}

#endif  // INPAINT_EMULATION
