// CUDA kernels of contextual_attention.
#include "../common.h"
#include "../math/contextual_attention.h"

namespace inpaint {
namespace {

// energy[b, p] = sum_c key[b, c, p]^2. Neighbouring threads read neighbouring positions of one channel: coalesced.
template <class T>
__global__ void contextual_attention_key_energy_kernel(const T* __restrict__ key, T* __restrict__ energy, int64_t batch,
                                                       int64_t channels, int64_t positions) {
  for (int64_t i = global_thread(); i < batch * positions; i += grid_stride()) {
    const T* pixel = key + (i / positions) * channels * positions + i % positions;
    T sum = 0;
    for (int64_t c = 0; c < channels; ++c) {
      const T value = pixel[c * positions];
      sum += value * value;
    }
    energy[i] = sum;
  }
}

// norm[b, y, x] = rule(sum of energy over the patch around (y, x)), zero outside the map.
template <class T>
__global__ void contextual_attention_key_norm_kernel(const T* __restrict__ energy, T* __restrict__ norm, int64_t batch,
                                                     int64_t height, int64_t width, int64_t patch, NormRule rule, T eps,
                                                     T patch_elements) {
  const int64_t positions = height * width;
  for (int64_t i = global_thread(); i < batch * positions; i += grid_stride()) {
    const T* map = energy + (i / positions) * positions;
    const int64_t top = i % positions / width + window_start(patch);
    const int64_t left = i % width + window_start(patch);
    T sum = 0;
    for (int64_t y = max(top, int64_t{0}); y < min(top + patch, height); ++y) {
      for (int64_t x = max(left, int64_t{0}); x < min(left + patch, width); ++x) {
        sum += map[y * width + x];
      }
    }
    norm[i] = patch_norm(rule, sum, eps, patch_elements);
  }
}

// key: [batch, channels, height, width]; energy, which is scratch, and norm: [batch, height, width].
template <class T>
void launch_key_norm(const T* key, T* energy, T* norm, int64_t batch, int64_t channels, int64_t height, int64_t width,
                     int64_t patch, NormRule rule, T eps, unsigned blocks, cudaStream_t stream) {
  launch_kernel(contextual_attention_key_energy_kernel<T>, blocks, kThreadsPerBlock, 0, stream, key, energy, batch,
                channels, height * width);
  launch_kernel(contextual_attention_key_norm_kernel<T>, blocks, kThreadsPerBlock, 0, stream, energy, norm, batch,
                height, width, patch, rule, eps, static_cast<T>(channels * patch * patch));
}

}  // namespace
}  // namespace inpaint

#ifndef INPAINT_EMULATION

namespace inpaint {
namespace {

Tensor contextual_attention_key_norm(const Tensor& key, int64_t patch, const std::string& rule_name, double eps) {
  check_dense(key, "key", 4);
  STD_TORCH_CHECK(patch >= 1, "patch: expected at least 1, got ", patch);
  const NormRule rule = parse_norm_rule(rule_name);
  const CudaLaunch launch(key);
  Tensor norm = torch::stable::new_empty(key, {key.size(0), key.size(2), key.size(3)});
  if (norm.numel() == 0) return norm;
  const Tensor energy = torch::stable::empty_like(norm);
  dispatch_float_double(key.scalar_type(), "key", [&](auto zero) {
    using scalar_t = decltype(zero);
    launch_key_norm<scalar_t>(key.const_data_ptr<scalar_t>(), energy.mutable_data_ptr<scalar_t>(),
                              norm.mutable_data_ptr<scalar_t>(), key.size(0), key.size(1), key.size(2), key.size(3),
                              patch, rule, static_cast<scalar_t>(eps), blocks_for(norm.numel()), launch.stream);
  });
  return norm;
}

}  // namespace
}  // namespace inpaint

STABLE_TORCH_LIBRARY_IMPL(inpaint_native, CUDA, m) {
  m.impl("contextual_attention_key_norm", TORCH_BOX(&inpaint::contextual_attention_key_norm));
}

#endif  // INPAINT_EMULATION
