// dilated_conv2d on the CPU.
#include "convolution_arguments.h"

namespace inpaint {
namespace {

// x [B, Cin, H, W], weight [C, Cin, kh, kw] and packed, bias [C], residual as y -> y [B, C, Ho, Wo]; maps of one
// layout.
void dilated_conv2d(const Tensor& x, const Tensor& weight, const Tensor& packed, const std::optional<Tensor>& bias,
                    int64_t stride_y, int64_t stride_x, int64_t pad_top, int64_t pad_left, int64_t dilation_y,
                    int64_t dilation_x, bool few_outputs, int64_t upsample, bool reflect, const std::string& activation,
                    double slope, const std::optional<Tensor>& residual, Tensor y) {
  const ConvolutionArguments geometry{stride_y, stride_x, pad_top, pad_left, dilation_y, dilation_x, upsample, reflect};
  STD_TORCH_CHECK(weight.size(0) == y.size(1), "weight: expected an output channel for each of y");
  dispatch_element(x.scalar_type(), "x", [&](auto sum, auto element) {
    using T = decltype(sum);
    using Element = decltype(element);
    auto convolution = convolution_of<T, Element>(x, weight, packed, bias, geometry,
                                                  {false, false, geometry.unit_stride(), few_outputs}, y);
    convolution.epilogue.activation = activation_kind(activation);
    convolution.epilogue.slope = static_cast<T>(slope);
    if (residual) {
      const auto map = map_of<const Element>(*residual, "residual");
      STD_TORCH_CHECK(residual->numel() == y.numel() && map.channels_last == convolution.output.channels_last,
                      "residual: expected the shape and the layout of y");
      convolution.epilogue.residual = map.data;
    }
    convolve(convolution);
  });
}

}  // namespace
}  // namespace inpaint

STABLE_TORCH_LIBRARY_IMPL(inpaint_native, CPU, m) { m.impl("dilated_conv2d", TORCH_BOX(&inpaint::dilated_conv2d)); }
