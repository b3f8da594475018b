// Parallel loops on torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

namespace inpaint {

inline int64_t worker_count() { return torch::stable::get_num_threads(); }

// Less work than this, in values read and computed, is done before a second thread has woken up.
constexpr int64_t kParallelWork = 1 << 15;

// Until `ready()`: a short spin, then other threads go first. OpenMP's own barrier spins much longer, which on a busy
// machine keeps the very thread that it waits for from running (measured with a third process on two cores: a forward
// with 4,096 keys took 0.7 CPU seconds, and 0.3 with this).
template <class Ready>
void wait_until(const Ready& ready) {
  constexpr int kSpins = 2000;
  for (int spin = 0; !ready(); ++spin) {
    if (spin >= kSpins) std::this_thread::yield();
  }
}

// Calls task(worker, phase, i) for phase in [0, phases) and i in [0, count), each exactly once, all of one phase before
// any of the next; worker < worker_count(). Which worker runs which task varies, so results must not depend on it.
// Tasks must not throw. `work`: roughly the values that one task handles.
template <class Task>
void run_phases(int64_t phases, int64_t count, int64_t work, const Task& task) {
  const int64_t workers = std::min(count, worker_count());
  if (count * work < kParallelWork || workers <= 1) {
    for (int64_t phase = 0; phase < phases; ++phase)
      for (int64_t i = 0; i < count; ++i) task(0, phase, i);
    return;
  }
  struct Progress {
    std::atomic<int64_t> taken{0}, done{0};
  };
  const auto progress = std::make_unique<Progress[]>(phases);
  // However many of the workers torch really starts, and whenever: whoever is there takes what is left.
  torch::stable::parallel_for(0, workers, 1, [&](int64_t worker, int64_t) {
    for (int64_t phase = 0; phase < phases; ++phase) {
      Progress& now = progress[phase];
      int64_t finished = 0;
      for (int64_t i; (i = now.taken.fetch_add(1, std::memory_order_relaxed)) < count; ++finished)
        task(worker, phase, i);
      now.done.fetch_add(finished, std::memory_order_acq_rel);
      wait_until([&] { return now.done.load(std::memory_order_acquire) == count; });
    }
  });
}

// The same with a single phase: task(worker, i).
template <class Task>
void run_tasks(int64_t count, int64_t work, const Task& task) {
  run_phases(1, count, work, [&](int64_t worker, int64_t, int64_t i) { task(worker, i); });
}

}  // namespace inpaint
