// What the scans of coherent_semantic_attention share: the rows that steps combine, their products inside a chunk, and
// the geometry of a launch.
//
// Products come from tiles of 8 x 8 rows: a step needs those with later queries only, little more than half of a chunk.
#pragma once

#include "coherent_semantic_attention.cuh"

namespace inpaint {
namespace {

// Warp 0 does the steps of a chunk. To it every instruction is latency: it holds nothing else in registers meanwhile.
constexpr int kScanThreads = 512;
constexpr int kScanWarps = kScanThreads / kWarp;
constexpr int kRowsOfWarp = kChunk / kScanWarps;
constexpr int kProductSide = 8;
constexpr int kProductThreads = 128;
constexpr int kProductWarps = kProductThreads / kWarp;
constexpr int kProductTiles = kChunk / kProductSide;                   // along either side of a chunk
constexpr int kNeededTiles = kProductTiles * (kProductTiles + 1) / 2;  // those on one side of the diagonal, with it
static_assert(kChunk == 2 * kWarp, "a lane has two rows of a chunk");
// A chunk's products in shared memory: steps read what the one after them needs, even behind the last one.
constexpr int kSharedProducts = (kChunk + 2) * kChunk;

// scale * x + other_scale * y, x and y vectors of maps; y may be null.
template <class V>
struct RowPair {
  using T = ScoreType<V>;
  const V *x, *y;
  T scale, other_scale;

  __device__ __forceinline__ T operator[](int64_t c) const {
    const T value = scale * static_cast<T>(x[c]);
    return y == nullptr ? value : fma(other_scale, static_cast<T>(y[c]), value);
  }
  // The same of a pair that lies in shared memory, where the compiler does not know what pointers point to; 0 of none.
  // Without branches, so that the 64 loads of a thread are on their way at once: one after the other they took 14 us.
  template <bool kHasSecond>
  __device__ __forceinline__ T global_value(int64_t c, bool exists) const {
    const T value = scale * (exists && x != nullptr ? static_cast<T>(__ldg(x + c)) : T(0));
    if (!kHasSecond) return value;
    return fma(other_scale, exists && y != nullptr ? static_cast<T>(__ldg(y + c)) : T(0), value);
  }
};

// Everything that a step of a scan reads. Arrays of queries are [samples, most_masked], those of positions [samples,
// positions]; the last four pointers are the backward's.
template <class V>
struct CoherentScan {
  using T = ScoreType<V>;
  CoherentLayout layout;
  CoherentPlan plan;
  const V* rows;         // [samples, positions, channels]
  const T* norm;         // [samples, positions]: of the rows
  const int32_t* match;  // the key of a query
  bool is_paper;
  const V* generated;             // [samples, most_masked, channels]
  const T* generated_norm;        // their lengths
  const V* gradient;              // [samples, most_masked, channels]: of the output
  const T *alpha, *beta, *total;  // of positions
};

// The same for one sample.
template <class V>
struct SampleScan : CoherentSample {
  using T = ScoreType<V>;
  const V *rows, *generated, *gradient;
  const T *norm, *generated_norm, *alpha, *beta, *total;
  const int32_t* match;
  bool is_paper;

  __device__ SampleScan(const CoherentScan<V>& scan, int64_t sample)
      : CoherentSample(scan.layout, scan.plan, sample),
        rows(scan.rows + sample * scan.layout.sample_size()),
        generated(scan.generated + sample * scan.layout.most_masked * channels),
        gradient(scan.gradient + sample * scan.layout.most_masked * channels),
        norm(scan.norm + sample * scan.layout.positions),
        generated_norm(scan.generated_norm + sample * scan.layout.most_masked),
        alpha(scan.alpha + sample * scan.layout.positions),
        beta(scan.beta + sample * scan.layout.positions),
        total(scan.total + sample * scan.layout.positions),
        match(scan.match + sample * scan.layout.most_masked),
        is_paper(scan.is_paper) {}

  __device__ int64_t chunks() const { return ceil_div(masked, kChunk); }
  __device__ int rows_of_chunk(int64_t chunk) const {
    const int64_t left = masked - chunk * kChunk;
    return static_cast<int>(left < kChunk ? left : kChunk);
  }
  __device__ const V* query(int64_t i) const { return rows + (known + i) * channels; }
  __device__ const V* key(int64_t i) const { return rows + match[i] * channels; }
  __device__ T query_length(int64_t i) const { return norm[known + i]; }
  __device__ T key_length(int64_t i) const { return norm[match[i]]; }

  // u_i = q_i / (|q_i| + eps).
  __device__ RowPair<V> direction(int64_t i) const {
    return {query(i), nullptr, inverse_length(query_length(i)), T(0)};
  }
  __device__ RowPair<V> matched(int64_t i) const { return {key(i), nullptr, T(1), T(0)}; }
  // d_i = y_{i-1} - k_i, which nobody needs of the first query.
  __device__ RowPair<V> difference(int64_t i) const {
    return {i == 0 ? key(0) : generated + (i - 1) * channels, key(i), T(1), T(-1)};
  }
  // The derivative of a_i with respect to y_{i-1}.
  __device__ RowPair<V> slope(int64_t i) const {
    RowPair<V> result = direction(i);
    if (is_paper && i > 0) {
      const T length = generated_norm[i - 1], inverse = inverse_length(length);
      const int64_t p = position_of_query(i);
      result.scale *= inverse;
      result.y = generated + (i - 1) * channels;
      result.other_scale = length > T(0) && total[p] != INFINITY ? -alpha[p] * total[p] * inverse / length : T(0);
    }
    return result;
  }
  __device__ RowPair<V> gradient_row(int64_t i) const { return {gradient + i * channels, nullptr, T(1), T(0)}; }
};

// Which rows are multiplied; products [samples, chunks, kChunk, kChunk]: of step r with row t.
enum class ChunkProduct {
  kDirections,  // u_t . k_r, of later rows t
  kMatches,     // k_t . k_r, likewise
  kSlopes,      // d_t . (the slope of a_r), of earlier rows t
  kGradients,   // d_t . (the gradient of the output r), likewise
};

template <ChunkProduct kProduct, class V>
__device__ __forceinline__ RowPair<V> step_row(const SampleScan<V>& of, int64_t r) {
  if constexpr (kProduct == ChunkProduct::kSlopes) return of.slope(r);
  if constexpr (kProduct == ChunkProduct::kGradients) return of.gradient_row(r);
  return of.matched(r);
}
template <ChunkProduct kProduct, class V>
__device__ __forceinline__ RowPair<V> other_row(const SampleScan<V>& of, int64_t t) {
  if constexpr (kProduct == ChunkProduct::kDirections) return of.direction(t);
  if constexpr (kProduct == ChunkProduct::kMatches) return of.matched(t);
  return of.difference(t);
}

// Sums over a warp of kCount values of every lane; with kStep = kWarp / 2, lane l gets those of values kOfLane * l,
// kOfLane * l + 1 and so on in the first kOfLane = kCount / kWarp elements.
template <int kCount, int kStep, class T>
__device__ __forceinline__ void sum_over_lanes(T* values) {
  constexpr int kLeft = kCount / 2;
  const bool is_upper = (threadIdx.x & kStep) != 0;
#pragma unroll
  for (int i = 0; i < kLeft; ++i) {
    const T given = is_upper ? values[i] : values[i + kLeft], kept = is_upper ? values[i + kLeft] : values[i];
    values[i] = kept + __shfl_xor_sync(0xffffffffu, given, kStep);
  }
  if constexpr (kStep > 1) sum_over_lanes<kLeft, kStep / 2>(values);
}

// A block multiplies kProductSide steps with as many other rows. Its threads share the channels, so that all loads are
// on their way at once and few rows keep many multiprocessors busy; the sums over warps have a fixed order.
template <class V, ChunkProduct kProduct>
__global__ void __launch_bounds__(kProductThreads, 1)
    coherent_semantic_attention_products_kernel(CoherentScan<V> scan, ScoreType<V>* __restrict__ products) {
  using T = ScoreType<V>;
  constexpr bool kIsForward = kProduct == ChunkProduct::kDirections || kProduct == ChunkProduct::kMatches;
  // What registers hold: channels of a thread that are on their way, and steps whose sums are under way.
  constexpr int kDepth = sizeof(T) == 8 ? 1 : 2, kStepsAtOnce = sizeof(T) == 8 ? kProductSide / 2 : kProductSide;
  constexpr int kSums = kStepsAtOnce * kProductSide;
  __shared__ RowPair<V> rows[2][kProductSide];  // steps, others; null: none
  __shared__ T partial[kProductWarps][kSums];
  const int64_t sample = blockIdx.z, chunk = blockIdx.x;
  const SampleScan<V> of(scan, sample);
  int low = 0, high = blockIdx.y;  // the tile's place along both sides of the chunk, low <= high
  for (; high >= kProductTiles - low; ++low) high -= kProductTiles - low;
  high += low;
  const int first_of_steps = (kIsForward ? low : high) * kProductSide;
  const int first_of_others = (kIsForward ? high : low) * kProductSide;
  const int thread = threadIdx.x;
  if (thread < kProductSide) {
    const int64_t step = chunk * kChunk + first_of_steps + thread, other = chunk * kChunk + first_of_others + thread;
    rows[0][thread] = step < of.masked ? step_row<kProduct>(of, step) : RowPair<V>{};
    rows[1][thread] = other < of.masked ? other_row<kProduct>(of, other) : RowPair<V>{};
  }
  __syncthreads();
  products += (sample * scan.layout.chunks() + chunk) * kChunk * kChunk;
  for (int first_step = 0; first_step < kProductSide; first_step += kStepsAtOnce) {
    T sums[kSums] = {};
    for (int64_t channel = thread; channel < of.channels; channel += kProductThreads * kDepth) {
      T steps[kDepth][kStepsAtOnce], others[kDepth][kProductSide];
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        const int64_t c = channel + d * kProductThreads;
        const bool exists = c < of.channels;
#pragma unroll
        for (int r = 0; r < kStepsAtOnce; ++r)
          steps[d][r] = rows[0][first_step + r].template global_value<kProduct == ChunkProduct::kSlopes>(c, exists);
#pragma unroll
        for (int t = 0; t < kProductSide; ++t) others[d][t] = rows[1][t].template global_value<!kIsForward>(c, exists);
      }
#pragma unroll
      for (int d = 0; d < kDepth; ++d)
#pragma unroll
        for (int i = 0; i < kSums; ++i) sums[i] = fma(steps[d][i / kProductSide], others[d][i % kProductSide], sums[i]);
    }
    sum_over_lanes<kSums, kWarp / 2>(sums);
#pragma unroll
    for (int i = 0; i < kSums / kWarp; ++i) partial[thread / kWarp][thread % kWarp * (kSums / kWarp) + i] = sums[i];
    __syncthreads();
    if (thread < kSums) {
      T sum = partial[0][thread];
#pragma unroll
      for (int w = 1; w < kProductWarps; ++w) sum += partial[w][thread];
      const int step = first_of_steps + first_step + thread / kProductSide;
      products[step * kChunk + first_of_others + thread % kProductSide] = sum;
    }
    __syncthreads();
  }
}

template <ChunkProduct kProduct, class V>
void launch_coherent_products(const CoherentScan<V>& scan, ScoreType<V>* products, cudaStream_t stream) {
  launch_kernel(coherent_semantic_attention_products_kernel<V, kProduct>,
                dim3(static_cast<unsigned>(scan.layout.chunks()), kNeededTiles, coherent_grid_z(scan.layout.samples)),
                dim3(kProductThreads), 0, stream, scan, products);
}

// The launches of a scan: `passes` of all chunks at once and the last one, which settles what they left.
template <class T, class Launch>
void for_each_pass(const CoherentLayout& layout, int64_t passes, T* vectors, int32_t* changed, const Launch& launch) {
  for (int64_t pass = 0; pass <= passes; ++pass) {
    const ScanCarries<T> carries{vectors,
                                 changed,
                                 layout.samples,
                                 layout.chunks(),
                                 layout.channels,
                                 static_cast<int>(pass),
                                 static_cast<int>(passes)};
    const auto blocks = static_cast<unsigned>(pass == passes ? 1 : layout.chunks());
    launch(carries, dim3(blocks, 1, coherent_grid_z(layout.samples)));
  }
}

// A chunk's products on their way to shared memory.
template <class T>
struct ChunkProducts {
  static constexpr int kQuads = kChunk * kChunk / kQuad / kScanThreads;
  Quad<T> quads[kQuads];

  __device__ __forceinline__ void load(const T* __restrict__ products, const CoherentLayout& layout, int64_t sample,
                                       int64_t chunk) {
    const T* from = products + (sample * layout.chunks() + chunk) * kChunk * kChunk;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) quads[i] = load_quad(from + (i * kScanThreads + threadIdx.x) * kQuad);
  }
  __device__ __forceinline__ void store(T* out) const {
#pragma unroll
    for (int i = 0; i < kQuads; ++i) store_quad(out + (i * kScanThreads + threadIdx.x) * kQuad, quads[i]);
  }
};

}  // namespace
}  // namespace inpaint
