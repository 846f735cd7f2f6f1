// The CPU twins' threads: a fixed pool, as large as the cores this process may use (KESTREL_NUM_THREADS overrides).
#pragma once

#include <cstdint>

namespace kestrel::cpu {

int thread_count();

// A reference to a callable: no allocation, no copy.
class RangeBody {
 public:
  template <class F>
  RangeBody(const F& body)
      : object_(&body),
        call_([](const void* f, int64_t first, int64_t last) { (*static_cast<const F*>(f))(first, last); }) {}
  void operator()(int64_t first, int64_t last) const { call_(object_, first, last); }

 private:
  const void* object_;
  void (*call_)(const void*, int64_t, int64_t);
};

// body(first, last) over pieces of [0, count) of at least `grain` items, on all threads; returns when all are done.
// One piece where the whole is small, the pool is busy with another caller, or the call comes from inside a piece.
// The body must not throw.
void parallel_for(int64_t count, int64_t grain, RangeBody body);

}  // namespace kestrel::cpu
