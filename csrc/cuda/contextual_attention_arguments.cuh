// How the tensors of a call become the arguments of contextual_attention's CUDA launchers.
#pragma once

#include <cstring>
#include <optional>
#include <type_traits>

#include "contextual_attention_tiles.cuh"

namespace inpaint {
namespace {

// Calls `body` with a zero of the CUDA type that `type` names.
template <class Body>
auto dispatch_floating(ScalarType type, const char* name, Body&& body) {
  if (type == ScalarType::Half) return body(__half{});
  if (type == ScalarType::BFloat16) return body(__nv_bfloat16{});
  return dispatch_float_double(type, name, body);
}

// The type of the scores of maps of type V.
template <class V>
using ScoreType = std::conditional_t<std::is_same_v<V, double>, double, float>;

// Small structs of int64 that arrive as a tensor on the CPU.
template <class Struct>
Struct struct_of(const Tensor& fields, const char* name) {
  check_dense(fields, name, 1);
  STD_TORCH_CHECK(fields.is_cpu() && fields.scalar_type() == ScalarType::Long &&
                      fields.numel() == static_cast<int64_t>(sizeof(Struct) / sizeof(int64_t)),
                  name, ": expected ", sizeof(Struct) / sizeof(int64_t), " int64 values on the CPU");
  Struct result;
  std::memcpy(&result, fields.const_data_ptr<int64_t>(), sizeof result);
  return result;
}

inline AttentionTile tile_of(const Tensor& fields) {
  const auto tile = struct_of<AttentionTile>(fields, "tile");
  STD_TORCH_CHECK(tile.key_cell_width % kQuad == 0 && tile.key_columns % kQuad == 0 &&
                      tile.key_cell_width >= tile.key_width && tile.key_columns >= tile.keys(),
                  "tile: expected lines of keys that are padded to a multiple of ", kQuad);
  return tile;
}

template <class T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

inline void check_elements(const Tensor& tensor, const char* name, int64_t count) {
  STD_TORCH_CHECK(tensor.is_contiguous() && tensor.numel() == count, name, ": expected ", count,
                  " contiguous elements, got ", tensor.numel());
}

inline void check_logits(const AttentionTile& tile, const Tensor& logits) {
  check_elements(logits, "logits", tile.samples * tile.queries() * tile.logit_columns());
}

inline void check_keep(const AttentionTile& tile, const std::optional<Tensor>& keep) {
  if (keep) check_elements(*keep, "keep", tile.samples * tile.logit_columns());
}

}  // namespace
}  // namespace inpaint
