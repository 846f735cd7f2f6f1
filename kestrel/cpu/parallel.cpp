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

// Workers wait for `round_` to change and take pieces as long as there are some. The caller waits for the pieces alone:
// a worker that the system has not scheduled is not missed. Workers spin for some microseconds before they sleep: a
// decode step makes hundreds of calls back to back.
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
    pieces_ = static_cast<uint32_t>((count + piece - 1) / piece);
    pending_.store(pieces_, std::memory_order_relaxed);
    const uint64_t round = round_.load(std::memory_order_relaxed) + 1;
    tickets_.store(round << 32 | pieces_, std::memory_order_release);
    round_.store(static_cast<uint32_t>(round), std::memory_order_release);
    round_.notify_all();
    take_pieces();
    for (int spin = 0; pending_.load(std::memory_order_acquire) > 0; ++spin)
      spin < kSpins ? pause() : std::this_thread::yield();  // the last piece's thread may want this core
  }

  std::mutex& mutex() { return mutex_; }

 private:
  static constexpr int kSpins = 4000;

  void take_pieces() {
    uint64_t ticket = tickets_.load(std::memory_order_acquire);
    while (const uint32_t left = static_cast<uint32_t>(ticket)) {
      if (!tickets_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel, std::memory_order_acquire))
        continue;
      // The piece is ours: its round is not over before pending_ says so, and until then its description stays.
      const int64_t first = (pieces_ - left) * piece_;
      (*body_)(first, std::min(first + piece_, count_));
      pending_.fetch_sub(1, std::memory_order_release);
      ticket = tickets_.load(std::memory_order_acquire);
    }
  }

  void work();

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  const RangeBody* body_ = nullptr;
  int64_t count_ = 0, piece_ = 1;
  uint32_t pieces_ = 0;
  std::atomic<uint64_t> tickets_{0};  // the round, and in the low half how many of its pieces no thread has taken
  std::atomic<uint32_t> pending_{0};  // pieces that are not done
  std::atomic<uint32_t> round_{0};
};

thread_local bool inside_piece = false;

void Pool::work() {
  inside_piece = true;
  for (uint32_t seen = 0;;) {
    for (int spin = 0; spin < kSpins && round_.load(std::memory_order_acquire) == seen; ++spin) pause();
    round_.wait(seen, std::memory_order_acquire);
    seen = round_.load(std::memory_order_acquire);
    take_pieces();
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
