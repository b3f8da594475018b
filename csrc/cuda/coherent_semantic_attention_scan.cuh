// What the scans of coherent_semantic_attention share: the rows that steps combine, their products inside a chunk, and
// the geometry of a launch.
//
// Products come from tiles of 32 x 32 rows: a step needs those with later queries only, three quarters of a chunk.
#pragma once

#include "coherent_semantic_attention.cuh"

namespace inpaint {
namespace {

constexpr int kScanThreads = 512;
constexpr int kScanWarps = kScanThreads / kWarp;
constexpr int kRowsOfWarp = kChunk / kScanWarps;
constexpr int kProductSide = 32;
constexpr int kProductDepth = 64;
constexpr int kProductThreads = 256;
constexpr int kSubtiles = 3;
static_assert(kChunk == 2 * kWarp, "a lane has two rows of a chunk");

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

template <class V, ChunkProduct kProduct>
__global__ void __launch_bounds__(kProductThreads, 1)
    coherent_semantic_attention_products_kernel(CoherentScan<V> scan, ScoreType<V>* __restrict__ products) {
  using T = ScoreType<V>;
  constexpr bool kIsForward = kProduct == ChunkProduct::kDirections || kProduct == ChunkProduct::kMatches;
  constexpr int kLoads = kProductSide * kProductDepth / kProductThreads;
  constexpr int kLoadStep = kProductThreads / kProductDepth;  // rows between two loads of a thread
  constexpr int kMicro = 2, kMicroThreads = kProductSide / kMicro;
  __shared__ T step_tile[kProductDepth][kProductSide + 1], other_tile[kProductDepth][kProductSide + 1];
  const int64_t sample = blockIdx.z, chunk = blockIdx.x;
  const SampleScan<V> of(scan, sample);
  // Of the four quarters, blockIdx.y names one that holds pairs that are needed.
  const int half_of_steps = blockIdx.y == 2 || (!kIsForward && blockIdx.y == 1);
  const int half_of_others = blockIdx.y == 2 || (kIsForward && blockIdx.y == 1);
  const int64_t first_step = chunk * kChunk + half_of_steps * kProductSide;
  const int64_t first_other = chunk * kChunk + half_of_others * kProductSide;
  const int load_channel = threadIdx.x % kProductDepth, load_row = threadIdx.x / kProductDepth;
  const int column = threadIdx.x % kMicroThreads, row = threadIdx.x / kMicroThreads;
  RowPair<V> steps[kLoads], others[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int64_t at = load_row + i * kLoadStep, step = first_step + at, other = first_other + at;
    steps[i] = step < of.masked ? step_row<kProduct>(of, step) : RowPair<V>{};
    others[i] = other < of.masked ? other_row<kProduct>(of, other) : RowPair<V>{};
  }
  T next_steps[kLoads], next_others[kLoads];
  const auto load = [&](int64_t channel) {
    const int64_t c = channel + load_channel;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      next_steps[i] = c < of.channels && steps[i].x != nullptr ? steps[i][c] : T(0);
      next_others[i] = c < of.channels && others[i].x != nullptr ? others[i][c] : T(0);
    }
  };
  T sums[kMicro][kMicro] = {};
  load(0);
  for (int64_t channel = 0; channel < of.channels; channel += kProductDepth) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      step_tile[load_channel][load_row + i * kLoadStep] = next_steps[i];
      other_tile[load_channel][load_row + i * kLoadStep] = next_others[i];
    }
    __syncthreads();
    load(channel + kProductDepth);
#pragma unroll 8
    for (int depth = 0; depth < kProductDepth; ++depth) {
#pragma unroll
      for (int m = 0; m < kMicro; ++m)
#pragma unroll
        for (int n = 0; n < kMicro; ++n)
          sums[m][n] =
              fma(step_tile[depth][row + m * kMicroThreads], other_tile[depth][column + n * kMicroThreads], sums[m][n]);
    }
    __syncthreads();
  }
  products += (sample * scan.layout.chunks() + chunk) * kChunk * kChunk;
#pragma unroll
  for (int m = 0; m < kMicro; ++m) {
    const int r = half_of_steps * kProductSide + row + m * kMicroThreads;
#pragma unroll
    for (int n = 0; n < kMicro; ++n)
      products[r * kChunk + half_of_others * kProductSide + column + n * kMicroThreads] = sums[m][n];
  }
}

template <ChunkProduct kProduct, class V>
void launch_coherent_products(const CoherentScan<V>& scan, ScoreType<V>* products, cudaStream_t stream) {
  launch_kernel(coherent_semantic_attention_products_kernel<V, kProduct>,
                dim3(static_cast<unsigned>(scan.layout.chunks()), kSubtiles, coherent_grid_z(scan.layout.samples)),
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

// Copies the chunk's products to shared memory: `out` holds kChunk x kChunk values.
template <class T>
__device__ void load_products(const T* __restrict__ products, const CoherentLayout& layout, int64_t sample,
                              int64_t chunk, T* out) {
  const T* from = products + (sample * layout.chunks() + chunk) * kChunk * kChunk;
  for (int i = threadIdx.x; i < kChunk * kChunk; i += kScanThreads) out[i] = from[i];
}

}  // namespace
}  // namespace inpaint
