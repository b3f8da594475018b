// Every CUDA source of the library, compiled for the emulation, and the launchers and index maps that tests call.
// Built by tests/emulation_build.py, never shipped. launchers.h says what a parameter is in Python.
#include "../../csrc/cuda/coherent_semantic_attention.cu"
#include "../../csrc/cuda/coherent_semantic_attention_backward.cu"
#include "../../csrc/cuda/coherent_semantic_attention_generate.cu"
#include "../../csrc/cuda/contextual_attention.cu"
#include "../../csrc/cuda/contextual_attention_backward.cu"
#include "../../csrc/cuda/contextual_attention_forward.cu"
#include "../../csrc/math/contextual_attention.h"
#include "features.cu"
#include "planted.cu"

namespace {

using emulation::Exposed;

// Steps of the CUDA kernels' fuse, in the terms of column_neighbour and row_neighbour.
int64_t column_neighbour_by_steps(int64_t p, int64_t step, int64_t height, int64_t width) {
  inpaint::GridPosition at{static_cast<int>(p / width), static_cast<int>(p % width)};
  return at.step_down(static_cast<int>(step), height, width) ? at.y * width + at.x : -1;
}
int64_t row_neighbour_by_steps(int64_t p, int64_t step, int64_t height, int64_t width) {
  inpaint::GridPosition at{static_cast<int>(p / width), static_cast<int>(p % width)};
  return at.step_right(static_cast<int>(step), height, width) ? at.y * width + at.x : -1;
}

void expose_contextual_attention(Exposed& exposed) {
  using namespace inpaint;
  exposed.add<&launch_key_norm<float>>("contextual_attention_key_norm_float32");
  exposed.add<&launch_key_norm<double>>("contextual_attention_key_norm_float64");
  exposed.add<&launch_rows>("contextual_attention_rows");
  exposed.add<&launch_scores<float>>("contextual_attention_scores_float32");
  exposed.add<&launch_statistics<float>>("contextual_attention_statistics_float32");
  exposed.add<&launch_matches<float>>("contextual_attention_matches_float32");
  exposed.add<&launch_softmax_backward<float>>("contextual_attention_softmax_backward_float32");
  exposed.add<&launch_scores<double>>("contextual_attention_scores_float64");
  exposed.add<&launch_statistics<double>>("contextual_attention_statistics_float64");
  exposed.add<&launch_matches<double>>("contextual_attention_matches_float64");
  exposed.add<&launch_softmax_backward<double>>("contextual_attention_softmax_backward_float64");
  exposed.add<&launch_paste_weights<float, float>>("contextual_attention_paste_weights_float32_float32");
  exposed.add<&launch_paste<float, float>>("contextual_attention_paste_float32_float32");
  exposed.add<&launch_paste_weights<float, __half>>("contextual_attention_paste_weights_float32_float16");
  exposed.add<&launch_paste<float, __half>>("contextual_attention_paste_float32_float16");
  exposed.add<&launch_paste_weights<float, __nv_bfloat16>>("contextual_attention_paste_weights_float32_bfloat16");
  exposed.add<&launch_paste<float, __nv_bfloat16>>("contextual_attention_paste_float32_bfloat16");
  exposed.add<&launch_paste_weights<double, double>>("contextual_attention_paste_weights_float64_float64");
  exposed.add<&launch_paste<double, double>>("contextual_attention_paste_float64_float64");
  exposed.add<&launch_fuse_backward<float, float>>("contextual_attention_fuse_backward_float32_float32");
  exposed.add<&launch_patch_backward<float, float>>("contextual_attention_patch_backward_float32_float32");
  exposed.add<&launch_fuse_backward<float, __half>>("contextual_attention_fuse_backward_float32_float16");
  exposed.add<&launch_patch_backward<float, __half>>("contextual_attention_patch_backward_float32_float16");
  exposed.add<&launch_fuse_backward<float, __nv_bfloat16>>("contextual_attention_fuse_backward_float32_bfloat16");
  exposed.add<&launch_patch_backward<float, __nv_bfloat16>>("contextual_attention_patch_backward_float32_bfloat16");
  exposed.add<&launch_fuse_backward<double, double>>("contextual_attention_fuse_backward_float64_float64");
  exposed.add<&launch_patch_backward<double, double>>("contextual_attention_patch_backward_float64_float64");

  exposed.add_elementwise<&row_neighbour>("row_neighbour");
  exposed.add_elementwise<&column_neighbour>("column_neighbour");
  exposed.add_elementwise<&column_neighbour_by_steps>("column_neighbour_by_steps");
  exposed.add_elementwise<&row_neighbour_by_steps>("row_neighbour_by_steps");
  exposed.add_elementwise<&window_start>("window_start");
  exposed.add_elementwise<&patch_norm<float>>("patch_norm_float32");
  exposed.add_elementwise<&patch_norm<double>>("patch_norm_float64");
}

void expose_coherent_semantic_attention(Exposed& exposed) {
  using namespace inpaint;
  exposed.add<&launch_coherent_pack<float>>("coherent_semantic_attention_pack_float32");
  exposed.add<&launch_coherent_search<float>>("coherent_semantic_attention_search_float32");
  exposed.add<&launch_coherent_operands<float>>("coherent_semantic_attention_operands_float32");
  exposed.add<&launch_coherent_filter<float>>("coherent_semantic_attention_filter_float32");
  exposed.add<&launch_coherent_generate<float>>("coherent_semantic_attention_generate_float32");
  exposed.add<&launch_coherent_backward_scan<float>>("coherent_semantic_attention_backward_scan_float32");
  exposed.add<&launch_coherent_gradient<float>>("coherent_semantic_attention_gradient_float32");
  exposed.add<&launch_coherent_pack<double>>("coherent_semantic_attention_pack_float64");
  exposed.add<&launch_coherent_search<double>>("coherent_semantic_attention_search_float64");
  exposed.add<&launch_coherent_generate<double>>("coherent_semantic_attention_generate_float64");
  exposed.add<&launch_coherent_backward_scan<double>>("coherent_semantic_attention_backward_scan_float64");
  exposed.add<&launch_coherent_gradient<double>>("coherent_semantic_attention_gradient_float64");
  exposed.add<&launch_coherent_pack<__half>>("coherent_semantic_attention_pack_float16");
  exposed.add<&launch_coherent_search<__half>>("coherent_semantic_attention_search_float16");
  exposed.add<&launch_coherent_operands<__half>>("coherent_semantic_attention_operands_float16");
  exposed.add<&launch_coherent_filter<__half>>("coherent_semantic_attention_filter_float16");
  exposed.add<&launch_coherent_generate<__half>>("coherent_semantic_attention_generate_float16");
  exposed.add<&launch_coherent_backward_scan<__half>>("coherent_semantic_attention_backward_scan_float16");
  exposed.add<&launch_coherent_gradient<__half>>("coherent_semantic_attention_gradient_float16");
  exposed.add<&launch_coherent_pack<__nv_bfloat16>>("coherent_semantic_attention_pack_bfloat16");
  exposed.add<&launch_coherent_search<__nv_bfloat16>>("coherent_semantic_attention_search_bfloat16");
  exposed.add<&launch_coherent_operands<__nv_bfloat16>>("coherent_semantic_attention_operands_bfloat16");
  exposed.add<&launch_coherent_filter<__nv_bfloat16>>("coherent_semantic_attention_filter_bfloat16");
  exposed.add<&launch_coherent_generate<__nv_bfloat16>>("coherent_semantic_attention_generate_bfloat16");
  exposed.add<&launch_coherent_backward_scan<__nv_bfloat16>>("coherent_semantic_attention_backward_scan_bfloat16");
  exposed.add<&launch_coherent_gradient<__nv_bfloat16>>("coherent_semantic_attention_gradient_bfloat16");
  exposed.add<&launch_coherent_coefficients<float>>("coherent_semantic_attention_coefficients_float32");
  exposed.add<&launch_coherent_coefficients<double>>("coherent_semantic_attention_coefficients_float64");
}

}  // namespace

namespace emulation {

std::vector<Function> functions() {
  Exposed exposed;
  expose_contextual_attention(exposed);
  expose_coherent_semantic_attention(exposed);
  features::expose_features(exposed);
  planted::expose_planted(exposed);
  return exposed.functions();
}

void set_descending(bool descending) { machine.descending = descending; }

bool is_sanitized() {
#ifdef __SANITIZE_ADDRESS__
  return true;
#else
  return false;
#endif
}

}  // namespace emulation
