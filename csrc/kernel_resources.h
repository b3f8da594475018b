// How much dynamic shared memory a kernel may ask for: a size that the compiler's resource report cannot show.
//
// For authors of CUDA kernels: a kernel that calls dynamic_shared<T>() declares the most that any launch of it passes
// to launch_kernel(), once, at namespace scope of its .cu file:
//
//   INPAINT_DYNAMIC_SHARED(contextual_attention_scores_kernel, kScoreThreads * sizeof(float));
//
// `kernel` is the function's name without template arguments; `bytes` is a constant. Kernels without an entry count as
// 0. The kernel itself calls dynamic_shared<T>() and hands pointers to its device functions, so that a test sees who
// needs an entry. benches/evidence.py adds the entries to the compiler's report, tests/test_cuda_resources.py fails
// above 99 KiB. The entries lie in a section of their own, where both read them without loading the library.
#pragma once

#include <cstdint>

namespace inpaint {

// 128 bytes without a pointer: benches/evidence.py unpacks it from the object file.
struct KernelResource {
  char kernel[120];
  int64_t dynamic_shared_bytes;
};

}  // namespace inpaint

#define INPAINT_DYNAMIC_SHARED(kernel, bytes)                                                                \
  __attribute__((                                                                                            \
      used, unused,                                                                                          \
      section("inpaint_resources"))) static const ::inpaint::KernelResource inpaint_resource_of_##kernel = { \
      #kernel, static_cast<int64_t>(bytes)}
