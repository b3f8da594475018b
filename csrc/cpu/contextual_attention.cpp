// The key norms of contextual_attention on the CPU.
#include "contextual_attention.h"

#include <algorithm>

namespace inpaint {
namespace {

constexpr int64_t kRowsPerTask = 8;

// energy[x] = sum_c key[c, x]^2 for one row of positions; channels are added in order, so the result is reproducible.
template <class T>
void row_energy(const MapView<T>& key, int64_t y, T* energy) {
  std::fill_n(energy, key.grid.width, T(0));
  for (int64_t c = 0; c < key.channels; ++c) {
    const T* row = key.at(c, y, 0);
    for (int64_t x = 0; x < key.grid.width; ++x) energy[x] += row[x * key.column_stride] * row[x * key.column_stride];
  }
}

template <class T>
T patch_sum(const T* energy, int64_t height, int64_t width, int64_t top, int64_t left, int64_t patch) {
  T sum = 0;
  for (int64_t y = std::max<int64_t>(top, 0); y < std::min(top + patch, height); ++y) {
    for (int64_t x = std::max<int64_t>(left, 0); x < std::min(left + patch, width); ++x) sum += energy[y * width + x];
  }
  return sum;
}

template <class T>
void key_norm(const Tensor& key, const Tensor& energy, const Tensor& norm, int64_t patch, NormRule rule, T eps) {
  const int64_t batch = key.size(0), channels = key.size(1), height = key.size(2), width = key.size(3);
  const int64_t positions = height * width;
  const T elements = static_cast<T>(channels * patch * patch);
  T* energies = energy.mutable_data_ptr<T>();
  T* norms = norm.mutable_data_ptr<T>();
  torch::stable::parallel_for(0, batch * height, kRowsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      row_energy(view_of<T>(key, row / height), row % height, energies + row * width);
    }
  });
  torch::stable::parallel_for(0, batch * height, kRowsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* map = energies + row / height * positions;
      const int64_t top = row % height + window_start(patch);
      for (int64_t x = 0; x < width; ++x) {
        const T sum = patch_sum(map, height, width, top, x + window_start(patch), patch);
        norms[row * width + x] = patch_norm(rule, sum, eps, elements);
      }
    }
  });
}

}  // namespace

Tensor contextual_attention_key_norm(const Tensor& key, int64_t patch, const std::string& rule_name, double eps) {
  check_rank(key, "key", 4);
  STD_TORCH_CHECK(patch >= 1, "patch: expected at least 1, got ", patch);
  const NormRule rule = parse_norm_rule(rule_name);
  Tensor norm = torch::stable::new_empty(key, {key.size(0), key.size(2), key.size(3)});
  const Tensor energy = torch::stable::new_empty(norm, {norm.size(0), norm.size(1), norm.size(2)});
  dispatch_float_double(key.scalar_type(), "key", [&](auto zero) {
    using scalar_t = decltype(zero);
    key_norm<scalar_t>(key, energy, norm, patch, rule, static_cast<scalar_t>(eps));
  });
  return norm;
}

}  // namespace inpaint

STABLE_TORCH_LIBRARY_IMPL(inpaint_native, CPU, m) {
  m.impl("contextual_attention_key_norm", TORCH_BOX(&inpaint::contextual_attention_key_norm));
}
