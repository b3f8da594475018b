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

  // csrc/cpu/coherent_semantic_attention_{forward,backward}: inpaint_kernels/ops/coherent_semantic_attention.py
  // documents the arguments and allocates the results.
  m.def(
      "coherent_semantic_attention_forward(Tensor x, Tensor flags, str variant, Tensor(a!) output, Tensor(b!) index, "
      "Tensor(c!) alpha, Tensor(d!) beta, Tensor(e!) total) -> ()");
  m.def(
      "coherent_semantic_attention_backward(Tensor grad, Tensor x, Tensor flags, Tensor index, Tensor alpha, Tensor "
      "beta, Tensor total, str variant, str gradient, float triple_weight, Tensor(a!) grad_x) -> ()");

  // csrc/cuda/coherent_semantic_attention{,_generate,_backward}: `layout` is a struct of int64 on the CPU, plans and
  // scratch are tensors; inpaint_kernels/cuda_kernels/coherent_semantic_attention.py makes them.
  m.def(
      "coherent_semantic_attention_pack(Tensor layout, Tensor row_of, Tensor known, Tensor map, bool masked_only, "
      "Tensor(a!) rows, Tensor(b!)? norm, Tensor(c!)? output, Tensor(d!)? index, Tensor(e!)? alpha, Tensor(f!)? beta, "
      "Tensor(g!)? total) -> ()");
  m.def(
      "coherent_semantic_attention_search(Tensor layout, Tensor positions, Tensor known, Tensor rows, Tensor norm, "
      "Tensor? listed, Tensor? count, int blocks, bool large_tiles, Tensor(a!) partial_score, Tensor(b!) partial_key, "
      "Tensor? found_score, Tensor? found_key, Tensor? candidates, bool is_paper, Tensor(c!) value, Tensor(d!) match, "
      "Tensor(e!) index) -> ()");
  m.def(
      "coherent_semantic_attention_operands(Tensor layout, Tensor positions, Tensor known, Tensor rows, Tensor norm, "
      "Tensor(a!) query_operands, Tensor(b!) key_operands, Tensor(c!) count) -> ()");
  m.def(
      "coherent_semantic_attention_filter(Tensor layout, Tensor positions, Tensor known, Tensor rows, Tensor norm, "
      "Tensor products, int first_sample, int first_query, int first_key, bool is_last, float error, Tensor(a!) "
      "maximum, Tensor(b!) found_score, Tensor(c!) found_key, Tensor(d!) candidates, Tensor(e!) listed, Tensor(f!) "
      "count) -> ()");
  m.def(
      "coherent_semantic_attention_generate(Tensor layout, Tensor positions, Tensor known, Tensor rows, Tensor norm, "
      "Tensor value, Tensor match, bool is_paper, int passes, Tensor(a!) products, Tensor(b!) vectors, Tensor(c!) "
      "changed, Tensor(d!) alpha, Tensor(e!) beta, Tensor(f!) total, Tensor(g!) output) -> ()");
  m.def(
      "coherent_semantic_attention_coefficients(Tensor layout, Tensor positions, Tensor known, Tensor row_of, Tensor "
      "index, Tensor alpha, Tensor beta, Tensor(a!) match, Tensor(b!) alphas, Tensor(c!) betas) -> ()");
  m.def(
      "coherent_semantic_attention_backward_scan(Tensor layout, Tensor positions, Tensor known, Tensor? rows, Tensor? "
      "norm, Tensor? generated, Tensor? generated_norm, Tensor gradient, Tensor match, Tensor alpha, Tensor beta, "
      "Tensor total, bool is_paper, int passes, Tensor(a!)? products, Tensor(b!) vectors, Tensor(c!) changed, "
      "Tensor(d!)? lambda_, Tensor(e!) key_terms, Tensor(f!)? query_terms) -> ()");
  m.def(
      "coherent_semantic_attention_gradient(Tensor layout, Tensor positions, Tensor known, Tensor row_of, Tensor "
      "sorted_keys, Tensor order, Tensor alphas, Tensor betas, Tensor gradient, Tensor? key_terms, Tensor? "
      "query_terms, str mode, float weight, Tensor output_gradient, Tensor(a!) map_gradient) -> ()");

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

  // csrc/cpu/convolution_weights: weight [rows, channels, kh, kw] -> bytes, which the convolutions with the same flags
  // read in its place; `few_outputs` is the caller's choice (inpaint_kernels/ops/_convolution.py).
  m.def(
      "convolution_pack_weight(Tensor weight, bool gated, bool gate_first, bool unit_stride, bool few_outputs) -> "
      "Tensor");
  m.def("convolution_weight_digest(Tensor weight) -> int");

  // csrc/cpu/convolution_weight_gradient: of the weight and the bias, from grad [B, O, Ho, Wo] and x [B, Cin, H, W].
  m.def(
      "convolution_weight_gradient(Tensor grad, Tensor x, int stride_y, int stride_x, int pad_top, int pad_left, "
      "int dilation_y, int dilation_x, int upsample, bool reflect, Tensor(a!) grad_weight, Tensor(b!)? grad_bias) -> "
      "()");

  // csrc/cpu/{gated,dilated,partial}_conv2d: of the weight only the shape is read. The caller allocates the outputs, in
  // the layout of x.
  m.def(
      "gated_conv2d(Tensor x, Tensor weight, Tensor packed, Tensor? bias, int stride_y, int stride_x, int pad_top, "
      "int pad_left, int dilation_y, int dilation_x, bool few_outputs, int upsample, bool reflect, str activation, "
      "float slope, bool gate_first, Tensor(a!) y, Tensor(b!)? gates) -> ()");
  m.def(
      "gated_conv2d_gate_backward(Tensor grad, Tensor y, Tensor gates, str activation, float slope, bool gate_first, "
      "Tensor(a!) grad_sums) -> ()");
  m.def(
      "dilated_conv2d(Tensor x, Tensor weight, Tensor packed, Tensor? bias, int stride_y, int stride_x, int pad_top, "
      "int pad_left, int dilation_y, int dilation_x, bool few_outputs, int upsample, bool reflect, str activation, "
      "float slope, Tensor? residual, Tensor(a!) y) -> ()");
  m.def(
      "partial_conv2d(Tensor x, Tensor mask, Tensor segments, Tensor weight, Tensor packed, Tensor? bias, int "
      "stride_y, int stride_x, int pad_top, int pad_left, int dilation_y, int dilation_x, bool few_outputs, Tensor "
      "scale, "
      "Tensor shift, Tensor(a!) y) -> ()");

  // csrc/cpu/hog: lines [ky, kx, n, cell rows, cell columns] bool -> features, and the picture or an empty tensor.
  m.def(
      "hog(Tensor images, Tensor? lines, int orientations, int cell_rows, int cell_columns, int block_rows, "
      "int block_columns, str block_norm, bool transform_sqrt, bool cells) -> (Tensor features, Tensor picture)");
}
