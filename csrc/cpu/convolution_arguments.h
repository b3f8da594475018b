// How the tensors of a call become a Convolution.
#pragma once

#include <optional>
#include <string>

#include "../common.h"
#include "convolution_weights.h"

namespace inpaint {

// Calls `body` with (zero of the sums' type, zero of the memory type).
template <class Body>
void dispatch_element(ScalarType type, const char* name, const Body& body) {
  switch (type) {
    case ScalarType::Float:
      return body(float{}, float{});
    case ScalarType::Double:
      return body(double{}, double{});
    case ScalarType::Half:
      return body(float{}, HalfBits{});
    case ScalarType::BFloat16:
      return body(float{}, BFloatBits{});
    default:
      STD_TORCH_CHECK(false, name, ": expected a floating-point tensor, got ", torch::headeronly::toString(type));
  }
}

template <class Element>
Element* elements(const Tensor& tensor) {
  return static_cast<Element*>(tensor.data_ptr());
}

template <class Element>
const Element* elements_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const Element*>(tensor->data_ptr()) : nullptr;
}

// Whether [B, C, H, W] lies in memory as channels_last. Sizes of 1 leave the stride of their dimension free.
inline bool is_channels_last(const Tensor& tensor) {
  int64_t expected = 1;
  for (int dim : {1, 3, 2, 0}) {
    if (tensor.size(dim) != 1 && tensor.stride(dim) != expected) return false;
    expected *= tensor.size(dim);
  }
  return true;
}

template <class Element>
Map<Element> map_of(const Tensor& tensor, const char* name) {
  check_rank(tensor, name, 4);
  const bool last = !tensor.is_contiguous();
  STD_TORCH_CHECK(!last || is_channels_last(tensor) || tensor.numel() == 0, name,
                  ": expected a tensor that is contiguous in NCHW or channels_last");
  return {elements<std::remove_const_t<Element>>(tensor), tensor.size(1), tensor.size(2), tensor.size(3), last};
}

inline ActivationKind activation_kind(const std::string& name) {
  if (name == "relu") return ActivationKind::relu;
  if (name == "elu") return ActivationKind::elu;
  if (name == "leaky_relu") return ActivationKind::leaky_relu;
  STD_TORCH_CHECK(name == "none", "activation: expected none, relu, elu or leaky_relu, got ", name);
  return ActivationKind::none;
}

// The geometry as it comes, rows before columns.
struct ConvolutionArguments {
  int64_t stride_y, stride_x, pad_top, pad_left, dilation_y, dilation_x, upsample;
  bool reflect;

  bool unit_stride() const { return stride_y == 1 && stride_x == 1; }
};

// weight [rows, channels, kernel y, kernel x]; a gate has features and gates in its rows.
struct WeightArguments {
  bool gated, gate_first, unit_stride, few_outputs;
};

template <class Element>
Weight<Element> weight_of(const Tensor& weight, const WeightArguments& arguments) {
  check_rank(weight, "weight", 4);
  Weight<Element> result{};
  result.rows = weight.size(0);
  result.channels = weight.size(1);
  result.kernel_y = weight.size(2);
  result.kernel_x = weight.size(3);
  result.gated = arguments.gated;
  result.gate_first = arguments.gate_first;
  result.unit_stride = arguments.unit_stride;
  result.few_outputs = arguments.few_outputs;
  return result;
}

// All but the masks and the epilogue. Only the shape of the weight is read; `packed` are its values.
template <class T, class Element>
Convolution<T, Element> convolution_of(const Tensor& x, const Tensor& weight, const Tensor& packed,
                                       const std::optional<Tensor>& bias, const ConvolutionArguments& geometry,
                                       const WeightArguments& weights, const Tensor& y) {
  Convolution<T, Element> convolution{};
  convolution.input = map_of<const Element>(x, "x");
  convolution.output = map_of<Element>(y, "y");
  convolution.batch = x.size(0);
  convolution.weight = weight_of<Element>(weight, weights);
  convolution.weight.packed = packed.data_ptr();
  convolution.bias = elements_or_null<Element>(bias);
  STD_TORCH_CHECK(weight.size(1) == x.size(1) && y.size(0) == x.size(0), "weight, y: the sizes do not fit x");
  STD_TORCH_CHECK(!bias || bias->numel() == weight.size(0), "bias: expected ", weight.size(0), " elements");
  const int64_t bytes = packed_bytes<T>(convolution.weight);
  STD_TORCH_CHECK(packed.is_contiguous() && packed.numel() == bytes && packed.scalar_type() == ScalarType::Byte,
                  "packed: expected ", bytes, " bytes");
  convolution.y = {x.size(2),        y.size(2),           weight.size(2),    geometry.stride_y,
                   geometry.pad_top, geometry.dilation_y, geometry.upsample, geometry.reflect};
  convolution.x = {x.size(3),         y.size(3),           weight.size(3),    geometry.stride_x,
                   geometry.pad_left, geometry.dilation_x, geometry.upsample, geometry.reflect};
  return convolution;
}

}  // namespace inpaint
