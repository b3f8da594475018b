// Fibers: stacks of their own that one CPU thread runs in turn.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__) && !defined(INPAINT_EMULATION_UCONTEXT)
#define INPAINT_EMULATION_UCONTEXT
#endif

#ifdef INPAINT_EMULATION_UCONTEXT
#include <ucontext.h>
#else
// Saves the registers that a call preserves on the stack, the stack pointer in *from, and continues at `to`. ucontext's
// swapcontext does the same with two system calls: fifty times slower.
extern "C" __attribute__((visibility("hidden"))) void inpaint_emulation_switch(void** from, void* to);
asm(R"(
  .pushsection .text
  .globl inpaint_emulation_switch
  .hidden inpaint_emulation_switch
  .type inpaint_emulation_switch, @function
inpaint_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size inpaint_emulation_switch, .-inpaint_emulation_switch
  .popsection
)");
#endif

// For functions whose frames a fiber leaves behind: red zones in them would stay on the stack for the next kernel.
#define EMULATION_NO_RED_ZONES __attribute__((no_sanitize_address))

namespace emulation {

// A place to continue at.
#ifdef INPAINT_EMULATION_UCONTEXT
class Context {
 public:
  void prepare(unsigned char* stack, size_t bytes, void (*main)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, main, 0);
  }
  void switch_to(Context& other) { swapcontext(&context_, &other.context_); }

 private:
  ucontext_t context_;
};
#else
class Context {
 public:
  // `main` finds the stack as after a call: 8 bytes below a multiple of 16, where a null return address ends
  // backtraces.
  void prepare(unsigned char* stack, size_t bytes, void (*main)()) {
    constexpr int kSavedRegisters = 6;
    void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15});
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(main);
    for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
    stack_pointer_ = top;
  }
  void switch_to(Context& other) { inpaint_emulation_switch(&stack_pointer_, other.stack_pointer_); }

 private:
  void* stack_pointer_ = nullptr;
};
#endif

class Fiber {
 public:
  // Sets it to the start of `main`, which must never return. `number` tells the fibers apart.
  void prepare(unsigned number, void (*main)()) {
    if (stack_ == nullptr) allocate();
    // Stacks that begin at the same offset of their pages would share few cache sets.
    size_ = kStackBytes - number % 16 * 256;
    context_.prepare(stack_, size_, main);
  }

  // From the scheduler: runs the fiber until it leaves.
  void enter(Context& scheduler) {
#ifdef __SANITIZE_ADDRESS__
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, stack_, size_);
#endif
    scheduler.switch_to(context_);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  }

  // The first thing that `main` calls.
  void arrive() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack_, &scheduler_size_);
#endif
  }

  // From the fiber: back to the scheduler, for good or until it enters again.
  EMULATION_NO_RED_ZONES void leave(Context& scheduler, [[maybe_unused]] bool for_good) {
#ifdef __SANITIZE_ADDRESS__
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack, scheduler_stack_, scheduler_size_);
#endif
    context_.switch_to(scheduler);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake_stack, &scheduler_stack_, &scheduler_size_);
#endif
  }

  // After a launch that left it in the middle of a kernel: the frames on its stack are void.
  void forget() {
#ifdef __SANITIZE_ADDRESS__
    if (stack_ != nullptr) __asan_unpoison_memory_region(stack_, kStackBytes);
#endif
  }

 private:
  static constexpr size_t kStackBytes = size_t{256} << 10;

  // Pages cost memory once they are touched. One below the stack is closed, so an overflow ends the process.
  void allocate() {
    const size_t guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void* memory = mmap(nullptr, guard + kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    if (mprotect(memory, guard, PROT_NONE) != 0) throw std::bad_alloc();
    stack_ = static_cast<unsigned char*>(memory) + guard;
  }

  unsigned char* stack_ = nullptr;  // its lowest byte; stays for the next launches
  size_t size_ = 0;
  Context context_;
#ifdef __SANITIZE_ADDRESS__
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_size_ = 0;
#endif
};

}  // namespace emulation
