// Schemas of all native kernels. They are private: the public ops, inpaint_kernels::<op>, are declared in
// inpaint_kernels/ops/<op>.py, where their arguments are documented and checked. Each kernel file registers its own
// implementations; inpaint_kernels/_native.py lists which (op, dispatch key) pairs must exist after loading.
#include "common.h"

STABLE_TORCH_LIBRARY(inpaint_native, m) {
  // csrc/{cpu,cuda}/contextual_attention: key [B, C, H, W] -> norm [B, H, W], rule in {none, add, max, sum}.
  m.def("contextual_attention_key_norm(Tensor key, int patch, str rule, float eps) -> Tensor");
  // csrc/cpu/contextual_attention_{forward,backward}: inpaint_kernels/ops/contextual_attention.py documents the
  // arguments.
  m.def(
      "contextual_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? valid, Tensor? key_scale, "
      "Tensor? key_bias, Tensor? queries, int patch, str norm, float eps, int fuse, float scale, str masking, float "
      "fill, "
      "float? floor, int rate, int paste_size, int pad_cut, int pad_put, float divisor, bool return_offsets) -> "
      "(Tensor, Tensor, Tensor)");

  m.def(
      "contextual_attention_backward(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor? valid, "
      "Tensor? key_scale, Tensor? key_bias, Tensor? queries, int patch, str norm, float eps, int fuse, float scale, "
      "str masking, float fill, float? floor, int rate, int paste_size, int pad_cut, int pad_put, float divisor) -> "
      "(Tensor, Tensor, Tensor)");

  // csrc/cuda/contextual_attention_{forward,backward}: the passes between the matrix products of a tile. `tile` and
  // `phases` are structs of int64 on the CPU; inpaint_kernels/cuda_kernels/contextual_attention.py makes them.
  m.def("contextual_attention_rows(Tensor runs, int rows, Tensor(a!) row_of, Tensor(b!) position_of) -> ()");
  m.def(
      "contextual_attention_scores(Tensor tile, Tensor correlations, Tensor row_of, Tensor inverse_norm, Tensor "
      "factor, Tensor offset, Tensor(a!) logits, Tensor(b!) partial) -> ()");
  m.def("contextual_attention_statistics(Tensor partial, Tensor(a!) statistics) -> ()");
  m.def(
      "contextual_attention_paste_weights(Tensor tile, Tensor? keep, float floor, Tensor logits, Tensor statistics, "
      "Tensor? weight_gradients, Tensor(a!) weights, Tensor(b!)? dots) -> ()");
  m.def(
      "contextual_attention_paste(Tensor tile, Tensor phases, Tensor products, Tensor row_weight, Tensor "
      "column_weight, Tensor? wanted, Tensor(a!) output) -> ()");
  m.def(
      "contextual_attention_matches(Tensor tile, Tensor? keep, float floor, Tensor logits, Tensor statistics, Tensor? "
      "wanted, Tensor(a!) index, Tensor(b!) maximum) -> ()");
  m.def(
      "contextual_attention_softmax_backward(Tensor tile, Tensor weight_gradients, Tensor dots, Tensor factor, Tensor? "
      "keep, float floor, Tensor statistics, Tensor(a!) logits) -> ()");
  m.def(
      "contextual_attention_fuse_backward(Tensor tile, Tensor gradients, Tensor correlations, Tensor row_of, Tensor "
      "inverse_norm, Tensor positions, Tensor(a!) score_gradients, Tensor(b!) norm_sums) -> ()");
  m.def(
      "contextual_attention_patch_backward(Tensor tile, Tensor score_gradients, Tensor row_of, Tensor pixels, "
      "Tensor(a!) gradients) -> ()");

  // csrc/cpu/match_patches: the best key of every query -> index [B, hq, wq] (-1: none) and score [B, hq, wq].
  m.def(
      "match_patches(Tensor query, Tensor key, Tensor? valid, Tensor? key_scale, Tensor? key_bias, Tensor? queries, "
      "int patch) -> (Tensor, Tensor)");

  // csrc/cpu/patchmatch: approximate nearest patches -> index [B, hq, wq] and score [B, hq, wq].
  m.def(
      "patchmatch(Tensor query, Tensor key, Tensor start, Tensor queries, Tensor eligible, int patch, int iterations, "
      "int radius, int seed) -> (Tensor, Tensor)");

  // csrc/cpu/patch_vote: weighted mean of the proposals of matched patches -> [B, C, hq, wq].
  m.def(
      "patch_vote(Tensor key, Tensor index, Tensor score, Tensor confidence, Tensor targets, int patch, "
      "float bandwidth) -> Tensor");

  // csrc/cpu/{gated,dilated,partial}_conv2d: the caller allocates the outputs, in the layout of x.
  m.def(
      "gated_conv2d(Tensor x, Tensor weight, Tensor? bias, int stride_y, int stride_x, int pad_top, int pad_left, "
      "int dilation_y, int dilation_x, int upsample, bool reflect, str activation, float slope, bool gate_first, "
      "Tensor(a!) y, Tensor(b!)? pre) -> ()");
  m.def(
      "gated_conv2d_gate_backward(Tensor grad, Tensor pre, str activation, float slope, bool gate_first, "
      "Tensor(a!) grad_pre) -> ()");
  m.def(
      "dilated_conv2d(Tensor x, Tensor weight, Tensor? bias, int stride_y, int stride_x, int pad_top, int pad_left, "
      "int dilation_y, int dilation_x, bool reflect, str activation, float slope, Tensor? residual, Tensor(a!) y) -> "
      "()");
  m.def(
      "partial_conv2d(Tensor x, Tensor mask, Tensor segments, Tensor weight, Tensor? bias, int stride_y, int stride_x, "
      "int pad_top, int pad_left, int dilation_y, int dilation_x, Tensor scale, Tensor shift, Tensor(a!) y) -> ()");

  // csrc/cpu/hog: lines [ky, kx, n, cell rows, cell columns] bool -> features, and the picture or an empty tensor.
  m.def(
      "hog(Tensor images, Tensor? lines, int orientations, int cell_rows, int cell_columns, int block_rows, "
      "int block_columns, str block_norm, bool transform_sqrt, bool cells) -> (Tensor features, Tensor picture)");
}
