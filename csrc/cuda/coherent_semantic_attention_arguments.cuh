// How the tensors of a call become the arguments of coherent_semantic_attention's CUDA launchers.
#pragma once

#include "arguments.cuh"
#include "coherent_semantic_attention.cuh"

namespace inpaint {
namespace {

inline CoherentLayout layout_of(const Tensor& fields) {
  const auto layout = struct_of<CoherentLayout>(fields, "layout");
  const bool is_channels_first = layout.position_stride == 1 && layout.channel_stride == layout.positions;
  const bool is_channels_last = layout.channel_stride == 1 && layout.position_stride == layout.channels;
  STD_TORCH_CHECK(is_channels_first || is_channels_last, "layout: expected dense maps");
  STD_TORCH_CHECK(layout.plan_stride == 0 || layout.plan_stride == layout.positions,
                  "layout: expected masks of all samples or of each");
  STD_TORCH_CHECK(layout.positions < (int64_t{1} << 31), "layout: at most 2^31 - 1 positions, got ", layout.positions);
  return layout;
}

// Data of a plan's tensor, `each` elements for every mask.
inline const int32_t* plan_data(const CoherentLayout& layout, const Tensor& tensor, int64_t each) {
  check_elements(tensor, "plan", (layout.plan_stride == 0 ? 1 : layout.samples) * each);
  return tensor.const_data_ptr<int32_t>();
}

// A map [samples, channels, height, width] in the order of memory that the layout names.
inline void check_map(const CoherentLayout& layout, const Tensor& map, const char* name) {
  check_rank(map, name, 4);
  STD_TORCH_CHECK(map.numel() == layout.samples * layout.sample_size(), name, ": expected ",
                  layout.samples * layout.sample_size(), " elements, got ", map.numel());
}

inline void check_rows(const CoherentLayout& layout, const Tensor& rows, const Tensor& norm) {
  check_elements(rows, "rows", layout.samples * layout.sample_size());
  check_elements(norm, "norm", layout.samples * layout.positions);
}

template <class T>
T* written_or_null(std::optional<Tensor>& tensor) {
  return tensor ? tensor->mutable_data_ptr<T>() : nullptr;
}

}  // namespace
}  // namespace inpaint
