// The k best keys of a row of any width, by a block. Each thread's best is one of as many maxima: a bound that at least
// k of them reach is reached by at least k keys, and by few more where the row is not ordered against us; those alone
// are gathered, cut down by a bound of their own where they are still many, and each one's rank is how many are larger.
// Bounds are found bit by bit from the top, one count over the block for each bit. Keys are distinct (keys.cuh), so the
// result does not depend on the order in which threads gather.
#pragma once

#include "kestrel/hopper/warp.cuh"
#include "ops/topk/args.h"
#include "ops/topk/keys.cuh"

namespace kestrel {

constexpr int kRoom = 4096;    // keys gathered
constexpr int kRanked = 256;   // keys ranked by comparing each with each
constexpr int kReached = 192;  // maxima at the bound, where k lets it stop early: about 212 keys of 1024 threads

template <class Key>
struct SelectShared {
  Key gathered[kRoom];
  Key ranked[kRanked];
  Key best[kMaxChosen];  // the result, largest first
  int found[3];
};

template <class Key>
__device__ __forceinline__ Key block_best(Key mine) {
  return over_block(mine, Key{0}, [](Key key) { return warp_best(key); });
}

__device__ __forceinline__ unsigned block_total(unsigned count) {
  return over_block(count, 0u, [](unsigned some) { return __reduce_add_sync(~0u, some); });
}

// A key that at least `least` keys reach, and no more than `most` once they are that few; 0 where there are not that
// many keys. reached(key), called by the whole block, counts them.
template <class Key, class Reached>
__device__ __forceinline__ Key find_bound(unsigned least, unsigned most, const Reached& reached) {
  Key bound = 0;
#pragma unroll 1
  for (Key bit = Key{1} << (8 * sizeof(Key) - 1); bit != 0; bit >>= 1) {
    const unsigned count = reached(bound | bit);
    if (count < least) continue;
    bound |= bit;
    if (count <= most) break;
  }
  return bound;
}

// for_each(f) calls f(key) for each of this thread's keys. For every thread of the block; at least k keys in all.
// Where a warp's threads work for_each out together, kTogether says so.
template <bool kTogether, class Key, class ForEach>
__device__ __forceinline__ void select_best(const ForEach& for_each, unsigned k, SelectShared<Key>& s) {
  if (threadIdx.x < 3) s.found[threadIdx.x] = 0;
  Key mine = 0;
  for_each([&](Key key) { mine = larger(mine, key); });
  if (k == 1) {
    const Key best = block_best(mine);
    if (threadIdx.x == 0) s.best[0] = best;
    __syncthreads();
    return;
  }
  const auto gather = [&](Key bound, Key* into, unsigned room, int* found) {
    __syncthreads();
    if (kTogether || mine >= bound)
      for_each([&](Key key) {
        if (key < bound) return;
        const unsigned at = atomicAdd(found, 1);
        if (at < room) into[at] = key;
      });
    __syncthreads();
    return static_cast<unsigned>(*found);
  };
  Key bound = find_bound<Key>(k, kReached, [&](Key b) -> unsigned { return __syncthreads_count(mine >= b); });
  unsigned count = gather(bound, s.gathered, kRoom, &s.found[0]);
  if (count > kRoom) {  // the best are crowded into few threads
    bound = find_bound<Key>(k, kRoom, [&](Key b) {
      unsigned reached = 0;
      if (kTogether || mine >= b) for_each([&](Key key) { reached += key >= b; });
      return block_total(reached);
    });
    count = gather(bound, s.gathered, kRoom, &s.found[1]);
  }
  const Key* keys = s.gathered;
  if (count > kRanked) {
    bound = find_bound<Key>(k, kRanked, [&](Key b) {
      unsigned reached = 0;
      for (unsigned i = threadIdx.x; i < count; i += blockDim.x) reached += s.gathered[i] >= b;
      return block_total(reached);
    });
    for (unsigned i = threadIdx.x; i < count; i += blockDim.x)
      if (s.gathered[i] >= bound) s.ranked[atomicAdd(&s.found[2], 1)] = s.gathered[i];
    __syncthreads();
    count = s.found[2];
    keys = s.ranked;
  }
  for (unsigned i = threadIdx.x; i < count; i += blockDim.x) {
    const Key key = keys[i];
    unsigned rank = 0;
    for (unsigned j = 0; j < count; ++j) rank += keys[j] > key;
    if (rank < k) s.best[rank] = key;
  }
  __syncthreads();
}

// The keys of a row of scores, a vector of kVec to a thread in turn.
template <class Key, int kVec, class T>
struct RowKeys {
  const T* row;
  uint32_t width;

  template <class F>
  __device__ __forceinline__ void operator()(const F& f) const {
    constexpr int kAhead = kVec == 1 ? 8 : 4;
    const uint32_t step = blockDim.x * kVec;
    for (uint32_t first = threadIdx.x * kVec; first < width; first += kAhead * step) {
      Vec<T, kVec> ahead[kAhead];
#pragma unroll
      for (int a = 0; a < kAhead; ++a)
        if (first + a * step < width) ahead[a] = load<kVec>(row + (first + a * step));
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        if (first + a * step >= width) break;
#pragma unroll
        for (int i = 0; i < kVec; ++i) f(key_of_bits<Key, T>(bits_at(ahead[a], i), first + a * step + i));
      }
    }
  }
};

constexpr int kSelectThreads = 1024;
inline int select_threads(int64_t width) { return width <= 2048 ? kRanked : kSelectThreads; }

// body.template operator()<Key, kVec>() for rows of scores.
template <class T, class Body>
void choose_keys(const Tensor& scores, const Rows& rows, int64_t width, Body&& body) {
  const auto with = [&]<class Key>() {
    if (width % kVec16<T> == 0 && vectors_fit<T, kVec16<T>>(scores, rows))
      body.template operator()<Key, kVec16<T>>();
    else
      body.template operator()<Key, 1>();
  };
  if constexpr (sizeof(T) == 2)
    if (width <= 0x10000) return with.template operator()<uint32_t>();
  with.template operator()<uint64_t>();
}

}  // namespace kestrel
