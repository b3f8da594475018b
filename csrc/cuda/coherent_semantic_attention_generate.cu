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

// alpha, beta and total of a chunk's steps, as warp 0 computes them: lane l has steps l and l + 32.
template <class T, bool kPaper>
__device__ void scan_steps(int count, bool starts, const T* products, const T* key_products, const T* h_of,
                           const T* g_of, T squared_length, const T* values, T* alphas, T* betas, T* totals) {
  const int lane = threadIdx.x % kWarp;
  T h[2] = {h_of[lane], h_of[lane + kWarp]};  // u_t . y of the present vector y
  T g[2] = {};                                // k_t . y
  if (kPaper) g[0] = g_of[lane], g[1] = g_of[lane + kWarp];
  const auto of_row = [&](const T* values, int r) {
    return __shfl_sync(0xffffffffu, r < kWarp ? values[0] : values[1], r % kWarp);
  };
  T u_y = of_row(h, 0), k_y = kPaper ? of_row(g, 0) : T(0);
  for (int r = 0; r < count; ++r) {
    const T* line = products + r * kChunk;
    const T* key_line = key_products + r * kChunk;
    // The next row's products with the vector before this step: fetched now, while the divisions take their time.
    const int next = min(r + 1, kChunk - 1);
    const T next_u_y = of_row(h, next), next_k_y = kPaper ? of_row(g, next) : T(0);
    const T a = kPaper ? u_y * inverse_length(sqrt(squared_length)) : u_y;
    const T v = values[r], s = a + v;
    const bool restarts = (starts && r == 0) || s == T(0) || !isfinite(s);
    const T alpha = restarts ? T(0) : a / s, beta = restarts ? T(1) : v / s;
    if (kPaper) {
      const T key_squared = beta * beta * key_line[r];
      if (alpha == T(0)) {
        squared_length = key_squared;
      } else {
        const T sum = alpha * alpha * squared_length + 2 * alpha * beta * k_y + key_squared;
        squared_length = sum < T(0) ? T(0) : sum;
      }
    }
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const int t = lane + part * kWarp;
      if (t > r) h[part] = blend(alpha, h[part], beta * line[t]);
      if (kPaper && t > r) g[part] = blend(alpha, g[part], beta * key_line[t]);
      if (t == r) alphas[r] = alpha, betas[r] = beta, totals[r] = restarts ? static_cast<T>(INFINITY) : s;
    }
    u_y = blend(alpha, next_u_y, beta * line[next]);
    if (kPaper) k_y = blend(alpha, next_k_y, beta * key_line[next]);
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
  __shared__ T h[kChunk], g[kChunk], values[kChunk], alphas[kChunk], betas[kChunk], totals[kChunk], squared_length;
  __shared__ int32_t keys[kChunk];
  T* shared_products = dynamic_shared<T>();
  T* shared_key_products = shared_products + kChunk * kChunk;  // of variant "paper"
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
    load_products(products, scan.layout, sample, n, shared_products);
    if (kPaper) load_products(key_products, scan.layout, sample, n, shared_key_products);
    if (threadIdx.x < count) {
      values[threadIdx.x] = value[sample * scan.layout.most_masked + first + threadIdx.x];
      keys[threadIdx.x] = of.match[first + threadIdx.x];
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
#pragma unroll 8
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
#pragma unroll
    for (int r = 0; r < kRowsOfWarp; ++r) {
      const int t = warp * kRowsOfWarp + r;
      const T sum = warp_sum(sums[r]), key_sum = kPaper ? warp_sum(key_sums[r]) : T(0);
      if (lane == 0) {
        h[t] = sum * inverse_length(of.query_length(min(first + t, of.masked - 1)));
        g[t] = key_sum;
      }
    }
    if (kPaper) squares = warp_sum(squares);
    if (threadIdx.x == 0) squared_length = squares;
    __syncthreads();
    // What the end of the chunk needs of the matched vectors: on its way while warp 0 computes, where there are
    // registers for it.
    constexpr bool kAhead = sizeof(T) == 4 && !kPaper;
    V ahead[kAhead ? kChunk : 1];
    if (kAhead) {
#pragma unroll
      for (int r = 0; r < kChunk; ++r)
        if (r < count && threadIdx.x < of.channels) ahead[r] = of.rows[keys[r] * of.channels + threadIdx.x];
    }
    if (warp == 0)
      scan_steps<T, kPaper>(count, n == 0, shared_products, shared_key_products, h, g, squared_length, values, alphas,
                            betas, totals);
    __syncthreads();
    if (threadIdx.x < count) {
      const int64_t p = sample * scan.layout.positions + of.position_of_query(first + threadIdx.x);
      alpha[p] = alphas[threadIdx.x];
      beta[p] = betas[threadIdx.x];
      total[p] = totals[threadIdx.x];
    }
    bool differs = false;
    const auto leave = [&](int64_t c, T y) {
      if (before != nullptr)
        differs |= !same_bits(y, carries.is_guess() ? static_cast<T>(of.key(first + count - 1)[c]) : before[c]);
      out[c] = y;
    };
    if (kAhead && threadIdx.x < of.channels) {
      T y = entering(threadIdx.x);
#pragma unroll
      for (int r = 0; r < kChunk; ++r)
        if (r < count) y = blend(alphas[r], y, betas[r] * static_cast<T>(ahead[kAhead ? r : 0]));
      leave(threadIdx.x, y);
    }
    for (int64_t c = threadIdx.x + (kAhead ? kScanThreads : 0); c < of.channels; c += kScanThreads) {
      T y = entering(c);
#pragma unroll 8
      for (int r = 0; r < count; ++r)
        y = blend(alphas[r], y, betas[r] * static_cast<T>(of.rows[keys[r] * of.channels + c]));
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
  __shared__ T alphas[kChunk], betas[kChunk];
  __shared__ int32_t keys[kChunk], positions[kChunk];
  const int64_t sample = blockIdx.z, n = blockIdx.x, first = n * kChunk;
  const SampleScan<V> of(scan, sample);
  const int count = first < of.masked ? of.rows_of_chunk(n) : 0;
  const int thread = threadIdx.x;
  const int64_t first_channel = int64_t{blockIdx.y} * kGenerateChannels, channel = first_channel + thread;
  if (thread < count) {
    positions[thread] = static_cast<int32_t>(of.position_of_query(first + thread));
    alphas[thread] = of.alpha[positions[thread]];
    betas[thread] = of.beta[positions[thread]];
    keys[thread] = of.match[first + thread];
  }
  __syncthreads();
  if (channel < of.channels && count > 0) {
    const ScanCarries<T> carries{
        const_cast<T*>(vectors), nullptr, scan.layout.samples, scan.layout.chunks(), of.channels, 0, 0};
    T y = n == 0 ? T(0) : carries.vector(static_cast<int>(passes), sample, n)[channel];
#pragma unroll 16
    for (int r = 0; r < count; ++r) {
      y = blend(alphas[r], y, betas[r] * static_cast<T>(of.rows[keys[r] * of.channels + channel]));
      tile[r][thread] = static_cast<V>(y);
    }
  }
  __syncthreads();
  output += sample * scan.layout.sample_size();
  if (scan.layout.position_stride == 1) {
    for (int c = 0; c < kGenerateChannels && first_channel + c < of.channels; ++c)
      if (thread < count)
        output[(first_channel + c) * scan.layout.channel_stride + positions[thread]] = tile[thread][c];
  } else if (channel < of.channels) {
    for (int r = 0; r < count; ++r)
      output[channel * scan.layout.channel_stride + positions[r] * scan.layout.position_stride] = tile[r][thread];
  }
}

// ---- Launchers ---------------------------------------------------------------------------------------------------

constexpr size_t kMostScanBytes = 2 * kChunk * kChunk * sizeof(double);
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
  const size_t shared_bytes = (is_paper ? 2 : 1) * kChunk * kChunk * sizeof(T);
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
