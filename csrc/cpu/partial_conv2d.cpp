// partial_conv2d on the CPU.
#include "convolution_arguments.h"

namespace inpaint {
namespace {

template <class T>
PixelMap<T> pixel_map(const Tensor& map, const char* name, int64_t batch, int64_t plane) {
  check_dense(map, name, 4);
  STD_TORCH_CHECK(map.numel() == (map.size(0) == batch ? batch : 1) * plane, name, ": expected [B or 1, 1, Ho, Wo]");
  return {elements<T>(map), map.size(0) == 1 ? 0 : plane};
}

// x [B, Cin, H, W], mask [B or 1, M, H, W] whose mask m covers the next segments[m] channels, weight [C, Cin, kh, kw]
// and packed, bias [C], scale and shift [B or 1, 1, Ho, Wo] in the dtype of the sums
// -> y = convolution(x * mask) * scale + bias * shift [B, C, Ho, Wo].
void partial_conv2d(const Tensor& x, const Tensor& mask, const Tensor& segments, const Tensor& weight,
                    const Tensor& packed, const std::optional<Tensor>& bias, int64_t stride_y, int64_t stride_x,
                    int64_t pad_top, int64_t pad_left, int64_t dilation_y, int64_t dilation_x, bool few_outputs,
                    const Tensor& scale, const Tensor& shift, Tensor y) {
  const ConvolutionArguments geometry{stride_y, stride_x, pad_top, pad_left, dilation_y, dilation_x, 1, false};
  STD_TORCH_CHECK(weight.size(0) == y.size(1), "weight: expected an output channel for each of y");
  check_dense(mask, "mask", 4);
  check_dense(segments, "segments", 1);
  STD_TORCH_CHECK(mask.scalar_type() == x.scalar_type() && mask.size(1) == segments.numel() &&
                      mask.size(2) == x.size(2) && mask.size(3) == x.size(3) &&
                      (mask.size(0) == 1 || mask.size(0) == x.size(0)),
                  "mask: expected [B or 1, M, H, W] in the dtype of x");
  dispatch_element(x.scalar_type(), "x", [&](auto sum, auto element) {
    using T = decltype(sum);
    using Element = decltype(element);
    auto convolution = convolution_of<T, Element>(x, weight, packed, bias, geometry,
                                                  {false, false, geometry.unit_stride(), few_outputs}, y);
    const int64_t* channels = segments.const_data_ptr<int64_t>();
    int64_t covered = 0;
    for (int64_t m = 0; m < segments.numel(); ++m) covered += channels[m];
    STD_TORCH_CHECK(covered == x.size(1), "segments: expected a sum of ", x.size(1), ", got ", covered);
    const int64_t mask_batch = mask.size(0) == 1 ? 0 : mask.size(1) * mask.size(2) * mask.size(3);
    convolution.masks = {elements<Element>(mask), mask_batch, mask.size(1), channels};
    const int64_t plane = y.size(2) * y.size(3);
    convolution.epilogue.scale = pixel_map<T>(scale, "scale", x.size(0), plane);
    convolution.epilogue.shift = pixel_map<T>(shift, "shift", x.size(0), plane);
    convolve(convolution);
  });
}

}  // namespace
}  // namespace inpaint

STABLE_TORCH_LIBRARY_IMPL(inpaint_native, CPU, m) { m.impl("partial_conv2d", TORCH_BOX(&inpaint::partial_conv2d)); }
