// convolution_pack_weight and convolution_weight_digest on the CPU.
#include "convolution_weights.h"

#include "convolution_arguments.h"

namespace inpaint {
namespace {

// weight [rows, channels, kernel y, kernel x] -> bytes that the convolutions of these properties read.
Tensor convolution_pack_weight(const Tensor& weight, bool gated, bool gate_first, bool unit_stride, bool few_outputs) {
  check_dense(weight, "weight", 4);
  STD_TORCH_CHECK(!gated || weight.size(0) % 2 == 0, "weight: expected an even number of rows, got ", weight.size(0));
  Tensor packed;
  dispatch_element(weight.scalar_type(), "weight", [&](auto sum, auto element) {
    using T = decltype(sum);
    using Element = decltype(element);
    auto source = weight_of<Element>(weight, {gated, gate_first, unit_stride, few_outputs});
    source.data = elements<Element>(weight);
    packed = torch::stable::new_empty(weight, {packed_bytes<T>(source)}, ScalarType::Byte);
    pack_weight<T>(source, packed.data_ptr());
  });
  return packed;
}

// A number that another weight, or this one after a change, does not have (but for one in 2^64). Eight chains hide the
// latency of the multiplication: a weight is read about as quickly as memory delivers it.
int64_t convolution_weight_digest(const Tensor& weight) {
  map_of<const uint8_t>(weight, "weight");           // for its checks: all bytes are those of elements
  constexpr uint64_t kFactor = 0x9e3779b97f4a7c15u;  // 2^64 over the golden ratio
  constexpr int64_t kChains = 8, kWordBytes = sizeof(uint64_t);
  // Both halves of the product: the lower one alone would never move a high bit, such as a sign, down.
  const auto add = [](uint64_t sum, uint64_t word) {
    const unsigned __int128 product = static_cast<unsigned __int128>(sum ^ word) * kFactor;
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
  };
  const int64_t bytes = weight.numel() * static_cast<int64_t>(weight.element_size());
  const unsigned char* data = static_cast<const unsigned char*>(weight.data_ptr());
  uint64_t chains[kChains] = {1, 2, 3, 4, 5, 6, 7, 8};
  int64_t at = 0;
  for (; at + kChains * kWordBytes <= bytes; at += kChains * kWordBytes)
    for (int64_t i = 0; i < kChains; ++i) chains[i] = add(chains[i], load<uint64_t>(data + at + i * kWordBytes));
  uint64_t digest = 0;
  for (; at < bytes; ++at) digest = add(digest, data[at]);
  for (const uint64_t chain : chains) digest = add(digest, chain);
  return static_cast<int64_t>(add(digest, static_cast<uint64_t>(weight.is_contiguous())));
}

}  // namespace
}  // namespace inpaint

STABLE_TORCH_LIBRARY_IMPL(inpaint_native, CPU, m) {
  m.impl("convolution_pack_weight", TORCH_BOX(&inpaint::convolution_pack_weight));
  m.impl("convolution_weight_digest", TORCH_BOX(&inpaint::convolution_weight_digest));
}
