#include "kestrel/cpu/parallel.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

#include "kestrel/cpu/target.h"

namespace kestrel::cpu {
namespace {

int usable_cores() {
  if (const char* value = std::getenv("KESTREL_NUM_THREADS"))
    if (const int wanted = std::atoi(value); wanted > 0) return wanted;
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(CPU_COUNT(&set), 1);
  return std::max(static_cast<int>(std::thread::hardware_concurrency()), 1);
}

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Workers wait for `round` to change, take pieces by a shared counter, and count themselves out. They spin for some
// microseconds before they sleep: a decode step makes hundreds of calls back to back.
class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
  }

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  void run(int64_t count, int64_t piece, RangeBody body) {
    body_ = &body;
    count_ = count;
    piece_ = piece;
    next_.store(0, std::memory_order_relaxed);
    busy_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
    round_.fetch_add(1, std::memory_order_release);
    round_.notify_all();
    take_pieces();
    while (busy_.load(std::memory_order_acquire) > 0) pause();
  }

  std::mutex& mutex() { return mutex_; }

 private:
  static constexpr int kSpins = 4000;

  void take_pieces() {
    for (;;) {
      const int64_t first = next_.fetch_add(piece_, std::memory_order_relaxed);
      if (first >= count_) return;
      (*body_)(first, std::min(first + piece_, count_));
    }
  }

  void work();

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  const RangeBody* body_ = nullptr;
  int64_t count_ = 0, piece_ = 1;
  std::atomic<int64_t> next_{0};
  std::atomic<int> busy_{0};
  std::atomic<uint32_t> round_{0};
};

thread_local bool inside_piece = false;

void Pool::work() {
  inside_piece = true;
  for (uint32_t seen = 0;;) {
    for (int spin = 0; spin < kSpins && round_.load(std::memory_order_acquire) == seen; ++spin) pause();
    round_.wait(seen, std::memory_order_acquire);
    ++seen;
    take_pieces();
    busy_.fetch_sub(1, std::memory_order_release);
  }
}

// Never destroyed: workers may outlive static destructors. After fork() the child has no workers and starts anew.
std::atomic<Pool*> pool_instance{nullptr};
std::once_flag fork_handler;

Pool& pool() {
  if (Pool* ready = pool_instance.load(std::memory_order_acquire)) return *ready;
  std::call_once(fork_handler, [] { pthread_atfork(nullptr, nullptr, [] { pool_instance = nullptr; }); });
  static std::mutex creation;
  std::lock_guard lock(creation);
  if (!pool_instance.load()) pool_instance = new Pool(usable_cores());
  return *pool_instance.load();
}

Level detect() {
#ifdef KESTREL_CPU_LEVELS
  Level best = kV1;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) best = kV3;
  if (best == kV3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd"))
    best = kV4;
  if (const char* value = std::getenv("KESTREL_CPU_LEVEL")) {
    if (value[0] == 'v' && value[1] == '1') return kV1;
    if (value[0] == 'v' && value[1] == '3') return std::min(best, kV3);
  }
  return best;
#else
  return kV1;
#endif
}

}  // namespace

Level level() {
  static const Level chosen = detect();
  return chosen;
}

int thread_count() { return pool().size(); }

void parallel_for(int64_t count, int64_t grain, RangeBody body) {
  if (count <= 0) return;
  if (count <= grain || inside_piece) return body(0, count);
  Pool& threads = pool();
  std::unique_lock lock(threads.mutex(), std::try_to_lock);
  if (!lock || threads.size() == 1) return body(0, count);
  // Four pieces a thread: a thread that the system takes away does not hold up the rest.
  const int64_t pieces = std::min<int64_t>((count + grain - 1) / grain, 4 * threads.size());
  inside_piece = true;
  threads.run(count, (count + pieces - 1) / pieces, body);
  inside_piece = false;
}

}  // namespace kestrel::cpu
