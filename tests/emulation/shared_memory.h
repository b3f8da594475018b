// Shared memory of the block that is running.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
// Only plain statics get red zones, and of those only the ones that no other library could define as well.
#define __shared__ static __attribute__((used))
#else
// Thread-local variables of a library lie together in one piece of memory, which StaticMemory fills as a whole. "used"
// says that somebody unseen writes to them: the compiler must not take an array that no kernel writes for zeros.
#define __shared__ static thread_local __attribute__((used))
#endif

#ifndef __SANITIZE_ADDRESS__
#include <link.h>
#endif

namespace emulation {

inline void fill_memory(unsigned char* memory, size_t bytes, uint16_t value) {
  const uint64_t pattern = value * uint64_t{0x0001000100010001};
  size_t i = 0;
  for (; i + sizeof(pattern) <= bytes; i += sizeof(pattern)) std::memcpy(memory + i, &pattern, sizeof(pattern));
  std::memcpy(memory + i, &pattern, bytes - i);
}

// Dynamic shared memory: one allocation of exactly its size, which AddressSanitizer guards.
class DynamicMemory {
 public:
  explicit DynamicMemory(size_t bytes) : memory_(static_cast<unsigned char*>(std::malloc(bytes))), bytes_(bytes) {
    if (memory_ == nullptr && bytes > 0) throw std::bad_alloc();
  }
  ~DynamicMemory() { std::free(memory_); }
  DynamicMemory(const DynamicMemory&) = delete;

  unsigned char* begin() const { return memory_; }
  void fill(uint16_t value) { fill_memory(memory_, bytes_, value); }

 private:
  unsigned char* memory_;
  size_t bytes_;
};

#ifdef __SANITIZE_ADDRESS__

class StaticMemory {
 public:
  void fill(uint16_t) {}
};

#else

// Static shared memory: all thread-local variables of this library. Those that are no shared arrays, pybind11's, get
// their values back at the end of the launch.
class StaticMemory {
 public:
  StaticMemory() {
    // Naming a variable makes the runtime set this library's thread-local memory up.
    static thread_local volatile char present = 1;
    const auto address = reinterpret_cast<uintptr_t>(&present);
    static_cast<void>(present);
    Search search{address, nullptr, 0};
    dl_iterate_phdr(find, &search);
    memory_ = search.memory;
    saved_.assign(memory_, memory_ + search.bytes);
  }
  ~StaticMemory() {
    if (!saved_.empty()) std::memcpy(memory_, saved_.data(), saved_.size());
  }
  StaticMemory(const StaticMemory&) = delete;

  void fill(uint16_t value) { fill_memory(memory_, saved_.size(), value); }

 private:
  struct Search {
    uintptr_t address;
    unsigned char* memory;
    size_t bytes;
  };

  // Called for every library of the process: is this the one whose thread-local memory holds the address?
  static int find(dl_phdr_info* library, size_t, void* data) {
    auto* search = static_cast<Search*>(data);
    if (library->dlpi_tls_data == nullptr) return 0;
    for (int i = 0; i < library->dlpi_phnum; ++i) {
      const auto& segment = library->dlpi_phdr[i];
      const auto begin = reinterpret_cast<uintptr_t>(library->dlpi_tls_data);
      if (segment.p_type != PT_TLS || search->address < begin || search->address >= begin + segment.p_memsz) continue;
      search->memory = static_cast<unsigned char*>(library->dlpi_tls_data);
      search->bytes = segment.p_memsz;
      return 1;
    }
    return 0;
  }

  unsigned char* memory_ = nullptr;
  std::vector<unsigned char> saved_;
};

#endif

}  // namespace emulation
