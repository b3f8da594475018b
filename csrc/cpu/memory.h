// Memory of the CPU kernels: buffers on huge pages, the larger of which are kept from call to call.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "../common.h"

namespace inpaint {

constexpr int64_t kAlignment = 64;

inline int64_t round_up(int64_t value, int64_t multiple) { return ceil_div(value, multiple) * multiple; }

// Large blocks ask for huge pages: a strip of 68 MB is otherwise 17,000 page faults (measured: a fifth of a forward).
// Even so fresh pages are dear where the system has to find them again, as after a large tensor was freed (measured
// beside calls that take and free a gigabyte: 0.20 s instead of 0.07 s with 4,096 keys). So some of them are kept.
class LargeBlocks {
 public:
  static constexpr int64_t kHugePage = int64_t{2} << 20;
  static constexpr int64_t kSmallest = 2 * kHugePage;
  static constexpr int64_t kMostKept = int64_t{32} << 20;  // bytes in all

  static LargeBlocks& instance() {
    static LargeBlocks* const blocks = new LargeBlocks;  // never destroyed: threads may outlive static objects
    return *blocks;
  }

  // At least `bytes`, a multiple of kHugePage; null if there is no memory.
  void* take(int64_t bytes) {
    // Whoever finds the list in use goes on without it. That also keeps a forked child safe, for which nobody unlocks.
    if (const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock); lock.owns_lock()) {
      const auto fits = std::find_if(kept_.begin(), kept_.end(), [&](const Block& b) { return b.bytes == bytes; });
      if (fits != kept_.end()) {
        void* memory = fits->memory;
        kept_.erase(fits);
        return memory;
      }
    }
    void* memory = std::aligned_alloc(kHugePage, bytes);
#ifdef MADV_HUGEPAGE
    if (memory != nullptr) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
    return memory;
  }

  // Keeps the block in place of older ones, or frees it.
  void give(void* memory, int64_t bytes) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock() || bytes > kMostKept) return std::free(memory);
    kept_.push_back({memory, bytes});
    int64_t total = 0;
    for (const Block& block : kept_) total += block.bytes;
    for (; total > kMostKept; kept_.erase(kept_.begin())) {
      total -= kept_.front().bytes;
      std::free(kept_.front().memory);
    }
  }

 private:
  struct Block {
    void* memory;
    int64_t bytes;
  };
  std::mutex mutex_;
  std::vector<Block> kept_;  // oldest first
};

// Memory that is not initialised, or zeroed on request; for trivially constructible types.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size, bool zeroed = false)
      : data_(allocate(size * static_cast<int64_t>(sizeof(T))), Free{allocated(size * sizeof(T))}) {
    STD_TORCH_CHECK(data_ != nullptr, "inpaint_kernels: out of memory, ", size * sizeof(T), " bytes were needed");
    if (zeroed) std::memset(data_.get(), 0, size * sizeof(T));
  }
  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  static int64_t allocated(int64_t bytes) {
    return bytes >= LargeBlocks::kSmallest ? round_up(bytes, LargeBlocks::kHugePage)
                                           : round_up(std::max<int64_t>(bytes, 1), kAlignment);
  }
  static T* allocate(int64_t bytes) {
    const int64_t size = allocated(bytes);
    return static_cast<T*>(bytes >= LargeBlocks::kSmallest ? LargeBlocks::instance().take(size)
                                                           : std::aligned_alloc(kAlignment, size));
  }
  struct Free {
    int64_t bytes = 0;
    void operator()(T* p) const {
      if (bytes >= LargeBlocks::kSmallest)
        LargeBlocks::instance().give(p, bytes);
      else
        std::free(p);
    }
  };
  std::unique_ptr<T[], Free> data_;
};

}  // namespace inpaint
