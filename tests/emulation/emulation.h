// CUDA kernels on the CPU: the sources of csrc/cuda, compiled by g++ and executed for the tests.
//
// What it is for. A machine without a GPU shall prove more of a kernel than that nvcc accepts it. The very same .cu
// file is compiled with -DINPAINT_EMULATION and this folder first on the include path: cuda_runtime.h, cuda_fp16.h and
// cuda_bf16.h are found here, launch_kernel() of csrc/common.h calls run_grid() instead of <<<>>>, and what module.cpp
// lists are NumPy functions. It shows wrong results and wrong accesses; it says nothing about speed.
//
// How it runs. One CPU thread executes block after block. Every CUDA thread is a fiber with its own stack. Between two
// barriers of the block one warp runs after the other; within a warp one lane after the other, each up to its next
// barrier, shuffle or vote. There the lanes of the mask meet, exchange their values and go on. A shuffle therefore
// never lets another warp run: it would act as a barrier and hide a missing one.
//
// What it finds:
//   * a missing barrier (or __syncwarp): every order is one that a GPU may choose. set_descending(true) runs blocks,
//     warps and lanes in descending order; both orders must give the same bits.
//   * a read of shared memory that nobody wrote: it is filled before every block, with NaN in every floating type
//     (bytes FF FF; in descending order FF 7F, so that an integer too differs between the orders).
//   * a barrier, shuffle or vote that not all of its threads reach, a shuffle from a lane that takes no part, a launch
//     that CUDA would refuse: std::runtime_error with the place.
//   * an access outside of a shared array, of the dynamic shared memory or of an argument: by the second build, with
//     AddressSanitizer. Shared arrays are plain statics there (thread-local variables get no red zones) and are not
//     filled; arguments and dynamic memory are allocations of exactly their size.
//
// Stricter than CUDA on purpose: threads that meet must do so at the same line, and a lane that is named in a mask must
// not have returned. Not emulated: __activemask, cooperative groups, textures, several streams at once, blocks that
// wait for other blocks.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "fiber.h"
#include "shared_memory.h"
#include "types.h"

namespace emulation {

constexpr unsigned kWarpSize = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kMaxExchangedBytes = 64;

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream stream;
  ((stream << parts), ...);
  return stream.str();
}

// ---- Threads -----------------------------------------------------------------------------------------------------

enum class State {
  kReady,     // to be run
  kAtBlock,   // waits at a barrier of the block
  kAtWarp,    // waits for the other lanes of its mask
  kReturned,  // has left the kernel
};

// A call in the kernel's source at which threads meet.
struct Meeting {
  const char* what = nullptr;
  const char* file = nullptr;
  int line = 0;
  uint32_t mask = 0;  // of the lanes that meet; 0 for a barrier of the block

  bool operator==(const Meeting& other) const {
    return line == other.line && mask == other.mask && same(what, other.what) && same(file, other.file);
  }
  std::string describe() const {
    std::ostringstream stream;
    stream << what;
    if (mask != 0) stream << " with mask 0x" << std::hex << mask << std::dec;
    stream << " (" << file << ":" << line << ")";
    return stream.str();
  }

  static bool same(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }
};

struct Thread {
  Fiber fiber;
  State state = State::kReturned;
  Meeting meeting;  // while it waits
  uint3 index;      // its threadIdx
  size_t bytes = 0;
  alignas(16) unsigned char offered[kMaxExchangedBytes];  // to the lanes of its mask, on arrival
  alignas(16) unsigned char given[kMaxExchangedBytes];  // the same once all have arrived; stays until the next meeting

  std::string describe() const {
    const std::string name = text("thread (", index.x, ", ", index.y, ", ", index.z, ")");
    return name + (state == State::kReturned ? " has returned" : " waits at " + meeting.describe());
  }
};

// ---- The machine -------------------------------------------------------------------------------------------------

// Everything about the launch that is running. There is one, in one CPU thread: a launch ends before it returns.
struct Machine {
  Thread threads[kMaxThreads];
  unsigned thread_count = 0;
  Thread* current = nullptr;  // null outside of kernels
  Context scheduler;
  void (*run_thread)(const void* body) = nullptr;
  const void* body = nullptr;
  unsigned char* dynamic_memory = nullptr;
  bool descending = false;
  bool abandoned = false;  // a launch failed and left fibers in the middle of a kernel
  std::string failure;     // of the thread that has just run
};

inline Machine machine;

}  // namespace emulation

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulation {

// ---- In kernels --------------------------------------------------------------------------------------------------

inline void* dynamic_shared_memory() { return machine.dynamic_memory; }

inline unsigned current_thread() { return static_cast<unsigned>(machine.current - machine.threads); }
inline unsigned current_lane() { return current_thread() % kWarpSize; }

// Ends the launch: the scheduler throws, and this thread never goes on.
[[noreturn]] inline void fail(const std::string& what) {
  machine.failure = what;
  machine.current->fiber.leave(machine.scheduler, true);
  std::abort();
}

__attribute__((noinline)) inline void meet(State state, const Meeting& meeting) {
  Thread& thread = *machine.current;
  thread.state = state;
  thread.meeting = meeting;
  thread.fiber.leave(machine.scheduler, false);
}

// What the lanes of a warp gave to one meeting. Valid until the calling lane's next one.
template <class T>
class WarpValues {
 public:
  WarpValues(const Thread* warp, const Meeting& meeting) : warp_(warp), meeting_(meeting) {}

  T operator[](unsigned lane) const {
    if (lane >= kWarpSize || !(meeting_.mask >> lane & 1) || warp_ + lane >= machine.threads + machine.thread_count)
      fail(text(meeting_.describe(), " reads lane ", lane, ", which takes no part"));
    T value;
    std::memcpy(&value, warp_[lane].given, sizeof(T));
    return value;
  }
  // Whether `lane` takes part.
  bool has(unsigned lane) const {
    return (meeting_.mask >> lane & 1) && warp_ + lane < machine.threads + machine.thread_count;
  }

 private:
  const Thread* warp_;
  Meeting meeting_;
};

// The lanes of `mask` meet, and each sees the `value` of all. Shuffles, votes and the plain C++ bodies of
// csrc/cuda/ptx.cuh are built on this.
template <class T>
WarpValues<T> warp_values(uint32_t mask, const T& value, const char* what = "warp_values",
                          const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= kMaxExchangedBytes, "too much for one exchange");
  const Meeting meeting{what, file, line, mask};
  if (!(mask >> current_lane() & 1)) fail(text(meeting.describe(), " leaves out the lane that calls it"));
  std::memcpy(machine.current->offered, &value, sizeof(T));
  machine.current->bytes = sizeof(T);
  meet(State::kAtWarp, meeting);
  return {machine.threads + current_thread() / kWarpSize * kWarpSize, meeting};
}

// ---- Scheduling --------------------------------------------------------------------------------------------------

inline std::string where() {
  return text(" in block (", blockIdx.x, ", ", blockIdx.y, ", ", blockIdx.z, ") of (", gridDim.x, ", ", gridDim.y, ", ",
              gridDim.z, ")");
}

EMULATION_NO_RED_ZONES inline void fiber_main() {
  machine.current->fiber.arrive();
  machine.run_thread(machine.body);
  machine.current->state = State::kReturned;
  machine.current->fiber.leave(machine.scheduler, true);
  std::abort();
}

inline void resume(Thread& thread) {
  machine.current = &thread;
  threadIdx = thread.index;
  thread.fiber.enter(machine.scheduler);
  machine.current = nullptr;
  if (!machine.failure.empty()) throw std::runtime_error(machine.failure + where());
}

// Calls visit(i) for every i in [first, last), in the order of the day.
template <class Visit>
void in_order(uint64_t first, uint64_t last, const Visit& visit) {
  for (uint64_t i = first; i < last; ++i) visit(machine.descending ? first + last - 1 - i : i);
}

// The first thread of [first, last) in `mask` that does not wait at `meeting`; null if all do.
inline Thread* missing_from(const Meeting& meeting, uint32_t mask, unsigned first, unsigned last) {
  for (unsigned i = first; i < last; ++i) {
    Thread& thread = machine.threads[i];
    const bool waits = thread.state == State::kAtBlock || thread.state == State::kAtWarp;
    if ((mask >> i % kWarpSize & 1) && !(waits && thread.meeting == meeting)) return &thread;
  }
  return nullptr;
}

// Lets the lanes go on whose meeting is complete; whether there were any.
inline bool complete_meetings(unsigned first, unsigned last) {
  bool any = false;
  for (unsigned i = first; i < last; ++i) {
    if (machine.threads[i].state != State::kAtWarp) continue;
    const Meeting meeting = machine.threads[i].meeting;
    if (missing_from(meeting, meeting.mask, first, last) != nullptr) continue;
    for (unsigned j = i; j < last; ++j) {
      Thread& thread = machine.threads[j];
      if (!(meeting.mask >> j % kWarpSize & 1)) continue;
      std::memcpy(thread.given, thread.offered, thread.bytes);
      thread.state = State::kReady;
    }
    any = true;
  }
  return any;
}

// Runs a warp until each of its lanes waits at a barrier of the block or has returned.
inline void run_warp(unsigned first, unsigned last) {
  do {
    in_order(first, last, [](uint64_t i) {
      if (machine.threads[i].state == State::kReady) resume(machine.threads[i]);
    });
  } while (complete_meetings(first, last));
  for (unsigned i = first; i < last; ++i) {
    const Thread& thread = machine.threads[i];
    if (thread.state != State::kAtWarp) continue;
    const Thread* other = missing_from(thread.meeting, thread.meeting.mask, first, last);
    throw std::runtime_error(
        text("divergent ", thread.meeting.what, ": ", thread.describe(), ", ", other->describe(), where()));
  }
}

// Lets all threads go on that wait at a barrier; false if all have returned.
inline bool pass_barrier() {
  Thread* const end = machine.threads + machine.thread_count;
  Thread* const waiting =
      std::find_if(machine.threads, end, [](const Thread& thread) { return thread.state == State::kAtBlock; });
  if (waiting == end) return false;
  if (const Thread* other = missing_from(waiting->meeting, ~uint32_t{0}, 0, machine.thread_count))
    throw std::runtime_error(
        text("divergent ", waiting->meeting.what, ": ", waiting->describe(), ", ", other->describe(), where()));
  for (Thread* thread = machine.threads; thread != end; ++thread) thread->state = State::kReady;
  return true;
}

inline void run_block() {
  for (unsigned i = 0; i < machine.thread_count; ++i) {
    Thread& thread = machine.threads[i];
    thread.fiber.prepare(i, fiber_main);
    thread.state = State::kReady;
    thread.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
  }
  do {
    in_order(0, (machine.thread_count + kWarpSize - 1) / kWarpSize, [](uint64_t warp) {
      const unsigned first = static_cast<unsigned>(warp) * kWarpSize;
      run_warp(first, std::min(first + kWarpSize, machine.thread_count));
    });
  } while (pass_barrier());
}

// Refuses what CUDA would, and more shared memory than every architecture from sm_86 on has.
inline void check_launch(dim3 blocks, dim3 threads, size_t shared_bytes) {
  constexpr size_t kMaxSharedBytes = 99 * 1024;
  const uint64_t count = uint64_t{threads.x} * threads.y * threads.z;
  const bool fits = count >= 1 && count <= kMaxThreads && threads.z <= 64 && blocks.x < (1u << 31) &&
                    blocks.y <= 65535 && blocks.z <= 65535 && shared_bytes <= kMaxSharedBytes;
  if (!fits)
    throw std::runtime_error(text("invalid launch: grid (", blocks.x, ", ", blocks.y, ", ", blocks.z, "), block (",
                                  threads.x, ", ", threads.y, ", ", threads.z, "), ", shared_bytes,
                                  " bytes of shared memory"));
  if (machine.current != nullptr) throw std::runtime_error("a kernel launches a kernel");
}

// Runs `body` once per thread of the grid.
template <class Body>
void run_grid(dim3 blocks, dim3 threads, size_t shared_bytes, const Body& body) {
  check_launch(blocks, threads, shared_bytes);
  if (machine.abandoned) {
    for (Thread& thread : machine.threads) thread.fiber.forget();
  }
  machine.abandoned = true;  // unless this launch reaches its end
  machine.failure.clear();
  machine.current = nullptr;
  machine.thread_count = threads.x * threads.y * threads.z;
  machine.run_thread = [](const void* body) { (*static_cast<const Body*>(body))(); };
  machine.body = &body;
  gridDim = blocks;
  blockDim = threads;
  DynamicMemory dynamic_memory(shared_bytes);
  machine.dynamic_memory = dynamic_memory.begin();
  StaticMemory static_memory;
  in_order(0, uint64_t{blocks.x} * blocks.y * blocks.z, [&](uint64_t block) {
    blockIdx = {static_cast<unsigned>(block % blocks.x), static_cast<unsigned>(block / blocks.x % blocks.y),
                static_cast<unsigned>(block / blocks.x / blocks.y)};
    const uint16_t poison = machine.descending ? 0x7fff : 0xffff;
    static_memory.fill(poison);
    dynamic_memory.fill(poison);
    run_block();
  });
  machine.abandoned = false;
}

}  // namespace emulation
