// coherent_semantic_attention on CUDA: the generated vectors, one after the other in raster order.
//
//   products   of a chunk's directions with its matched vectors
//   scan       the coefficients of every step, chunk by chunk, and the vector that enters the next chunk
//   generate   coefficients -> generated vectors, all chunks at once
//
// Inside a chunk a step changes the products of the later queries with the present vector by one FMA each; the vector
// itself is only made at the chunk's end. Chunks run at once from guesses until no bit of them changes (ScanCarries).
#include "../kernel_resources.h"
#include "coherent_semantic_attention_scan.cuh"

namespace inpaint {
namespace {

constexpr int kGenerateThreads = kChunk;
constexpr int kGenerateChannels = kGenerateThreads;
static_assert(kGenerateThreads == kChunk);

// Products of a step's matched vector in shared memory: with the rows of the lane, with the next row, with itself.
template <class T>
struct StepProducts {
  T own[2], next, self;

  __device__ __forceinline__ explicit StepProducts(const T* diagonal) : next(diagonal[1]), self(diagonal[0]) {}
  __device__ __forceinline__ StepProducts(const T* of_lane, const T* diagonal) : StepProducts(diagonal) {
    own[0] = of_lane[0];
    own[1] = of_lane[kWarp];
  }
};

// Walks over the lines of a chunk's products.
template <class T>
struct StepLines {
  const T *of_lane, *diagonal;

  __device__ __forceinline__ explicit StepLines(const T* products)
      : of_lane(products + threadIdx.x % kWarp), diagonal(products) {}
  __device__ __forceinline__ StepProducts<T> next() {
    const StepProducts<T> result(of_lane, diagonal);
    of_lane += kChunk;
    diagonal += kChunk + 1;
    return result;
  }
};

template <class T>
struct StepCoefficients {
  T alpha, beta, total;
};

// Whatever a and v are: a / s and v / s with s = a + v, or a restart.
template <class T>
__device__ __forceinline__ StepCoefficients<T> any_coefficients(T a, T v) {
  const T s = a + v;
  if (s == T(0) || !isfinite(s)) return {T(0), T(1), static_cast<T>(INFINITY)};
  return {a / s, v / s, s};
}

// What the steps of a chunk take and give, in shared memory.
template <class T>
struct ChunkSteps {
  T alphas[kChunk], betas[kChunk], totals[kChunk];
  T query_products[kChunk], key_products[kChunk], squared_length;  // q_t . y, k_t . y, y . y of the vector y before
  T inverses[kChunk], values[kChunk];                              // 1 / (|q_t| + eps), v_t
};

// alpha, beta and total of a chunk's steps, as one warp computes them: lane l has steps l and l + 32. From one step to
// the next lead a sum, its reciprocal, a quotient, and one FMA; all else is read or computed ahead of it. Products with
// rows that are done are of no use to anybody, so no step asks which rows are still to come.
template <class T, bool kPaper>
__device__ void scan_steps(int count, bool starts, const T* products, const T* key_products, ChunkSteps<T>& steps) {
  const int lane = threadIdx.x % kWarp;
  T h[2], g[2] = {}, v_of[2];  // u_t . y and k_t . y of the present vector y, v_t
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    const int t = lane + part * kWarp;
    h[part] = steps.query_products[t] * steps.inverses[t];
    if (kPaper) g[part] = steps.key_products[t];
    v_of[part] = steps.values[t];
  }
  T squared_length = steps.squared_length;
  const auto of_row = [&](const T* values, int part, int r) {
    return __shfl_sync(0xffffffffu, r < (part + 1) * kWarp ? values[part] : values[1], r % kWarp);
  };
  // The first row of all restarts, as does every row without a finite sum.
  T u_y = starts ? static_cast<T>(INFINITY) : of_row(h, 0, 0), k_y = kPaper ? of_row(g, 0, 0) : T(0);
  StepLines<T> lines(products), key_lines(key_products);
  StepProducts<T> line = lines.next(), key_line = kPaper ? key_lines.next() : line;
  T v = of_row(v_of, 0, 0);
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    StepCoefficients<T> of_lane{};
    for (int r = part * kWarp; r < min(count, (part + 1) * kWarp); ++r) {
      const StepProducts<T> next_line = lines.next(), next_key_line = kPaper ? key_lines.next() : next_line;
      const T next_v = of_row(v_of, part, r + 1);
      T next_u_y = of_row(h, part, r + 1), next_k_y = kPaper ? of_row(g, part, r + 1) : T(0);
      const T a = kPaper ? u_y * inverse_length(sqrt(squared_length)) : u_y;
      const T s = a + v, reciprocal = refined_reciprocal(s);
      StepCoefficients<T> step{quotient(a, s, reciprocal), quotient(v, s, reciprocal), s};
      if (!(divides_plainly(v) & divides_plainly(a) & divides_plainly(s))) {
        step = any_coefficients(a, v);
        // Nothing is left of y, not even of its infinities.
        if (step.alpha == T(0)) h[0] = h[1] = g[0] = g[1] = next_u_y = next_k_y = squared_length = 0;
      }
      const auto after_step = [&](T y, T product) { return fma(step.alpha, y, step.beta * product); };
      if (kPaper) {
        const T sum = step.alpha * step.alpha * squared_length + 2 * step.alpha * step.beta * k_y;
        const T squared = (step.alpha == T(0) ? T(0) : sum) + step.beta * step.beta * key_line.self;
        squared_length = squared < T(0) ? T(0) : squared;
        k_y = after_step(next_k_y, key_line.next);
      }
      u_y = after_step(next_u_y, line.next);
#pragma unroll
      for (int of = part; of < 2; ++of) {
        h[of] = after_step(h[of], line.own[of]);
        if (kPaper) g[of] = after_step(g[of], key_line.own[of]);
      }
      if (lane == r - part * kWarp) of_lane = step;
      line = next_line, key_line = next_key_line, v = next_v;
    }
    steps.alphas[lane + part * kWarp] = of_lane.alpha;
    steps.betas[lane + part * kWarp] = of_lane.beta;
    steps.totals[lane + part * kWarp] = of_lane.total;
  }
}

// value: v_i. products, and of variant "paper" key_products: see ChunkProduct.
template <class V, bool kPaper>
__global__ void __launch_bounds__(kScanThreads, 1)
    coherent_semantic_attention_scan_kernel(CoherentScan<V> scan, ScanCarries<ScoreType<V>> carries,
                                            const ScoreType<V>* __restrict__ value,
                                            const ScoreType<V>* __restrict__ products,
                                            const ScoreType<V>* __restrict__ key_products, ScoreType<V>* alpha,
                                            ScoreType<V>* beta, ScoreType<V>* total) {
  using T = ScoreType<V>;
  // Matched vectors are on their way during the steps, where there are registers for them; those of the warp that does
  // the steps come through shared memory.
  constexpr bool kAhead = sizeof(T) == 4 && !kPaper;
  alignas(16) __shared__ ChunkSteps<T> steps;
  alignas(16) __shared__ int32_t keys[kChunk];
  __shared__ V ahead_of_steps[kAhead ? kChunk : 1][kWarp];
  T* shared_products = dynamic_shared<T>();
  T* shared_key_products = shared_products + kSharedProducts;  // of variant "paper"
  const int64_t sample = blockIdx.z;
  const SampleScan<V> of(scan, sample);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  scan_chunks<kScanThreads>(carries, sample, of.chunks(), [&](int64_t n, const T* before, T* out) {
    const int64_t first = n * kChunk;
    const int count = of.rows_of_chunk(n);
    const T* in = carries.vector(carries.pass, sample, n);
    const auto entering = [&](int64_t c) {  // the vector before the chunk; a guess is what the query before it matched
      if (n == 0) return T(0);
      return carries.is_guess() ? static_cast<T>(of.key(first - 1)[c]) : in[c];
    };
    ChunkProducts<T> of_chunk;  // on their way as long as rows are read, where there are registers for both
    if (!kPaper) of_chunk.load(products, scan.layout, sample, n);
    // What the first threads read of a query each, for all: nobody waits for it before the rows are on their way.
    T length = 0, v = 0;
    int32_t key = 0, position = 0;
    if (threadIdx.x < count) {
      length = of.query_length(first + threadIdx.x);
      v = value[sample * scan.layout.most_masked + first + threadIdx.x];
      key = of.match[first + threadIdx.x];
      position = static_cast<int32_t>(of.position_of_query(first + threadIdx.x));
    }
    T sums[kRowsOfWarp] = {}, key_sums[kRowsOfWarp] = {}, squares = 0;
    const V* query_rows[kRowsOfWarp];
    const V* key_rows[kRowsOfWarp];
#pragma unroll
    for (int r = 0; r < kRowsOfWarp; ++r) {
      const int64_t i = min(first + warp * kRowsOfWarp + r, of.masked - 1);
      query_rows[r] = of.query(i);
      key_rows[r] = of.key(i);
    }
    if (n > 0) {
#pragma unroll !kPaper ? 8 : sizeof(T) == 8 ? 1 : 4
      for (int64_t c = lane; c < of.channels; c += kWarp) {
        const T y = entering(c);
        if (kPaper) squares = fma(y, y, squares);
#pragma unroll
        for (int r = 0; r < kRowsOfWarp; ++r) {
          sums[r] = fma(static_cast<T>(query_rows[r][c]), y, sums[r]);
          if (kPaper) key_sums[r] = fma(static_cast<T>(key_rows[r][c]), y, key_sums[r]);
        }
      }
    }
    if (kPaper) of_chunk.load(products, scan.layout, sample, n);
    of_chunk.store(shared_products);
    if (kPaper) {
      of_chunk.load(key_products, scan.layout, sample, n);
      of_chunk.store(shared_key_products);
    }
#pragma unroll
    for (int r = 0; r < kRowsOfWarp; ++r) {
      const T sum = warp_sum(sums[r]), key_sum = kPaper ? warp_sum(key_sums[r]) : T(0);
      if (lane == 0) {
        steps.query_products[warp * kRowsOfWarp + r] = sum;
        steps.key_products[warp * kRowsOfWarp + r] = key_sum;
      }
    }
    if (kPaper) squares = warp_sum(squares);
    if (threadIdx.x == 0) steps.squared_length = squares;
    if (threadIdx.x < kChunk) {
      steps.inverses[threadIdx.x] = inverse_length(length);
      steps.values[threadIdx.x] = v;
      keys[threadIdx.x] = key;
    }
    __syncthreads();
    V ahead[kAhead ? kChunk : 1];
    const T entered = kAhead && threadIdx.x < of.channels ? entering(threadIdx.x) : T(0);
    if (warp == 0) {
      scan_steps<T, kPaper>(count, n == 0, shared_products, shared_key_products, steps);
    } else if (kAhead) {
      // Nobody needs the vector behind a chunk that is not full, the last one: rows that do not exist are any.
      if (threadIdx.x < of.channels) {
#pragma unroll
        for (int r = 0; r < kChunk; ++r) ahead[r] = of.rows[keys[r] * of.channels + threadIdx.x];
      }
      for (int r = warp - 1; r < kChunk; r += kScanWarps - 1)
        if (lane < of.channels) ahead_of_steps[r][lane] = of.rows[keys[r] * of.channels + lane];
    }
    __syncthreads();
    if (threadIdx.x < count) {
      const int64_t p = sample * scan.layout.positions + position;
      alpha[p] = steps.alphas[threadIdx.x];
      beta[p] = steps.betas[threadIdx.x];
      total[p] = steps.totals[threadIdx.x];
    }
    bool differs = false;
    const auto leave = [&](int64_t c, T y) {
      if (before != nullptr)
        differs |= !same_bits(y, carries.is_guess() ? static_cast<T>(of.key(first + count - 1)[c]) : before[c]);
      out[c] = y;
    };
    const auto after_step = [&](int r, T y, V key) {
      return blend(steps.alphas[r], y, steps.betas[r] * static_cast<T>(key));
    };
    if (kAhead && threadIdx.x < of.channels) {
      T y = entered;
      if (warp == 0) {
#pragma unroll 8
        for (int r = 0; r < kChunk; ++r) y = after_step(r, y, ahead_of_steps[kAhead ? r : 0][lane]);
      } else {
#pragma unroll
        for (int r = 0; r < kChunk; ++r) y = after_step(r, y, ahead[kAhead ? r : 0]);
      }
      leave(threadIdx.x, y);
    }
    for (int64_t c = threadIdx.x + (kAhead ? kScanThreads : 0); c < of.channels; c += kScanThreads) {
      T y = entering(c);
#pragma unroll 8
      for (int r = 0; r < kChunk; ++r) y = after_step(r, y, of.rows[keys[r] * of.channels + c]);
      leave(c, y);
    }
    return any_of_block<kScanThreads>(differs);
  });
}

// Generated vectors, into the map. A block takes a chunk and kGenerateChannels channels, a thread one of these.
template <class V>
__global__ void __launch_bounds__(kGenerateThreads, 1)
    coherent_semantic_attention_generate_kernel(CoherentScan<V> scan, const ScoreType<V>* __restrict__ vectors,
                                                int64_t passes, V* __restrict__ output) {
  using T = ScoreType<V>;
  __shared__ V tile[kChunk][kGenerateChannels + 1];
  alignas(16) __shared__ T alphas[kChunk], betas[kChunk];
  alignas(16) __shared__ int32_t keys[kChunk];
  __shared__ int32_t positions[kChunk];
  const int64_t sample = blockIdx.z, n = blockIdx.x, first = n * kChunk;
  const SampleScan<V> of(scan, sample);
  const int count = first < of.masked ? of.rows_of_chunk(n) : 0;
  const int thread = threadIdx.x;
  const int64_t first_channel = int64_t{blockIdx.y} * kGenerateChannels, channel = first_channel + thread;
  // Rows that do not exist are computed as any other and not written.
  keys[thread] = thread < count ? of.match[first + thread] : 0;
  positions[thread] = thread < count ? static_cast<int32_t>(of.position_of_query(first + thread)) : 0;
  alphas[thread] = thread < count ? of.alpha[positions[thread]] : T(0);
  betas[thread] = thread < count ? of.beta[positions[thread]] : T(0);
  __syncthreads();
  if (channel < of.channels && count > 0) {
    const ScanCarries<T> carries{
        const_cast<T*>(vectors), nullptr, scan.layout.samples, scan.layout.chunks(), of.channels, 0, 0};
    T y = n == 0 ? T(0) : carries.vector(static_cast<int>(passes), sample, n)[channel];
    V matched[kChunk];  // all of them on their way at once
#pragma unroll
    for (int r = 0; r < kChunk; ++r) matched[r] = of.rows[keys[r] * of.channels + channel];
#pragma unroll
    for (int r = 0; r < kChunk; ++r) {
      y = blend(alphas[r], y, betas[r] * static_cast<T>(matched[r]));
      tile[r][thread] = static_cast<V>(y);
    }
  }
  __syncthreads();
  output += sample * scan.layout.sample_size();
  if (scan.layout.position_stride == 1) {
    V* to = output + first_channel * scan.layout.channel_stride + positions[thread];
    const int channels = static_cast<int>(min(of.channels - first_channel, int64_t{kGenerateChannels}));
#pragma unroll 8
    for (int c = 0; thread < count && c < channels; ++c) to[c * scan.layout.channel_stride] = tile[thread][c];
  } else if (channel < of.channels) {
#pragma unroll 8
    for (int r = 0; r < count; ++r)
      output[channel * scan.layout.channel_stride + positions[r] * scan.layout.position_stride] = tile[r][thread];
  }
}

// ---- Launchers ---------------------------------------------------------------------------------------------------

constexpr size_t kMostScanBytes = 2 * kSharedProducts * sizeof(double);
INPAINT_DYNAMIC_SHARED(coherent_semantic_attention_scan_kernel, kMostScanBytes);

// products [1 or, of variant "paper", 2, samples, chunks, kChunk, kChunk]; vectors [2, samples, chunks + 1, channels];
// changed [passes, samples, chunks + 1], all three scratch.
template <class V>
void launch_coherent_generate(const CoherentLayout& layout, const int32_t* positions, const int32_t* known,
                              const V* rows, const ScoreType<V>* norm, const ScoreType<V>* value, const int32_t* match,
                              bool is_paper, int64_t passes, ScoreType<V>* products, ScoreType<V>* vectors,
                              int32_t* changed, ScoreType<V>* alpha, ScoreType<V>* beta, ScoreType<V>* total, V* output,
                              cudaStream_t stream) {
  using T = ScoreType<V>;
  CoherentScan<V> scan{};
  scan.layout = layout;
  scan.plan = {positions, known};
  scan.rows = rows;
  scan.norm = norm;
  scan.match = match;
  scan.is_paper = is_paper;
  scan.alpha = alpha;
  scan.beta = beta;
  scan.total = total;
  T* key_products = products + layout.samples * layout.chunks() * kChunk * kChunk;
  launch_coherent_products<ChunkProduct::kDirections>(scan, products, stream);
  if (is_paper) launch_coherent_products<ChunkProduct::kMatches>(scan, key_products, stream);
  const size_t shared_bytes = (is_paper ? 2 : 1) * kSharedProducts * sizeof(T);
  for_each_pass(layout, passes, vectors, changed, [&](const ScanCarries<T>& carries, dim3 blocks) {
    const auto kernel =
        is_paper ? coherent_semantic_attention_scan_kernel<V, true> : coherent_semantic_attention_scan_kernel<V, false>;
    launch_kernel(kernel, blocks, dim3(kScanThreads), shared_bytes, stream, scan, carries, value, products,
                  key_products, alpha, beta, total);
  });
  launch_kernel(coherent_semantic_attention_generate_kernel<V>,
                dim3(static_cast<unsigned>(layout.chunks()), grid_y(ceil_div(layout.channels, kGenerateChannels)),
                     coherent_grid_z(layout.samples)),
                dim3(kGenerateThreads), 0, stream, scan, vectors, passes, output);
}

}  // namespace
}  // namespace inpaint

#ifndef INPAINT_EMULATION

#include "coherent_semantic_attention_arguments.cuh"

namespace inpaint {
namespace {

// ---- torch -------------------------------------------------------------------------------------------------------

void coherent_semantic_attention_generate(const Tensor& fields, const Tensor& positions, const Tensor& known,
                                          const Tensor& rows, const Tensor& norm, const Tensor& value,
                                          const Tensor& match, bool is_paper, int64_t passes, Tensor products,
                                          Tensor vectors, Tensor changed, Tensor alpha, Tensor beta, Tensor total,
                                          Tensor output) {
  const CoherentLayout layout = layout_of(fields);
  const int64_t queries = layout.samples * layout.most_masked, chunks = layout.samples * layout.chunks();
  check_rows(layout, rows, norm);
  check_elements(value, "value", queries);
  check_elements(match, "match", queries);
  check_elements(products, "products", (is_paper ? 2 : 1) * chunks * kChunk * kChunk);
  check_elements(vectors, "vectors", 2 * (chunks + layout.samples) * layout.channels);
  check_elements(changed, "changed", passes * (chunks + layout.samples));
  for (const Tensor* coefficients : {&alpha, &beta, &total})
    check_elements(*coefficients, "coefficients", layout.samples * layout.positions);
  check_map(layout, output, "output");
  const CudaLaunch launch(rows);
  dispatch_floating(rows.scalar_type(), "rows", [&](auto zero) {
    using V = decltype(zero);
    using T = ScoreType<V>;
    launch_coherent_generate<V>(
        layout, plan_data(layout, positions, layout.positions), plan_data(layout, known, 1),
        static_cast<const V*>(rows.data_ptr()), norm.const_data_ptr<T>(), value.const_data_ptr<T>(),
        match.const_data_ptr<int32_t>(), is_paper, passes, products.mutable_data_ptr<T>(),
        vectors.mutable_data_ptr<T>(), changed.mutable_data_ptr<int32_t>(), alpha.mutable_data_ptr<T>(),
        beta.mutable_data_ptr<T>(), total.mutable_data_ptr<T>(), static_cast<V*>(output.data_ptr()), launch.stream);
  });
}

}  // namespace
}  // namespace inpaint

STABLE_TORCH_LIBRARY_IMPL(inpaint_native, CUDA, m) {
  m.impl("coherent_semantic_attention_generate", TORCH_BOX(&inpaint::coherent_semantic_attention_generate));
}

#endif  // INPAINT_EMULATION
