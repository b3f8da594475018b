// How the tensors of a call become the arguments of CUDA launchers.
#pragma once

#include <cstring>
#include <optional>

#include "device.cuh"

namespace inpaint {
namespace {

// Calls `body` with a zero of the CUDA type that `type` names.
template <class Body>
auto dispatch_floating(ScalarType type, const char* name, Body&& body) {
  if (type == ScalarType::Half) return body(__half{});
  if (type == ScalarType::BFloat16) return body(__nv_bfloat16{});
  return dispatch_float_double(type, name, body);
}

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

template <class T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

inline void check_elements(const Tensor& tensor, const char* name, int64_t count) {
  STD_TORCH_CHECK(tensor.is_contiguous() && tensor.numel() == count, name, ": expected ", count,
                  " contiguous elements, got ", tensor.numel());
}

}  // namespace
}  // namespace inpaint
