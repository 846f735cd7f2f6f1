// One head of one token into the cache, for all CPU twins that write it: the key's dtype as it is, or e4m3(x * r).
#pragma once

#include <algorithm>
#include <cstring>

#include "kestrel/cpu/convert.h"
#include "kestrel/cpu/index.h"
#include "kestrel/cpu/parallel.h"
#include "ops/kv_cache_write/args.h"

namespace KESTREL_CPU {

template <class T>
void store_head(T* __restrict cache, const T* __restrict x, int64_t size, float /*r*/) {
  std::memcpy(cache, x, static_cast<size_t>(size) * sizeof(T));
}

template <class T>
void store_head(e4m3* __restrict cache, const T* __restrict x, int64_t size, float r) {
  for (int64_t i = 0; i < size; ++i) cache[i] = from_float<e4m3>(to_float(x[i]) * r);
}

// Keys or values: where a head of a slot lies in their cache, and their 1 / scale.
template <class Cache>
struct CacheSide {
  const Tensor& cache;
  const Value<float>& scale;

  Cache* head(int64_t page, int64_t offset, int64_t head) const {
    return cache.ptr<Cache>() + page * cache.stride[0] + offset * cache.stride[1] + head * cache.stride[2];
  }
  float reciprocal(int64_t head) const {
    if (!scale.tensor) return 1.0f / scale.host;
    return 1.0f / scale.tensor->ptr<float>()[scale.tensor->numel() == 1 ? 0 : head * scale.tensor->stride[0]];
  }
};

// key(token, page, offset, first_head, last_head) and value(...) for every token with a slot. Threads share the 2 H
// heads out, never the tokens: of two tokens with one slot the later one wins.
template <class KeyBody, class ValueBody>
void for_each_slot(const KvCacheWriteArgs& args, const KeyBody& key, const ValueBody& value) {
  const int64_t grain = 1 + 65536 / (args.tokens * args.head_size);
  parallel_for(2 * args.heads, grain, [&](int64_t first, int64_t last) {
    for (int64_t token = 0; token < args.tokens; ++token) {
      const int64_t slot = index_at(args.slot_mapping, token * args.slot_mapping.stride[0]);
      if (slot < 0) continue;
      const int64_t page = slot / args.page_size, offset = slot % args.page_size;
      if (first < args.heads) key(token, page, offset, first, std::min(last, args.heads));
      if (last > args.heads) value(token, page, offset, std::max<int64_t>(first - args.heads, 0), last - args.heads);
    }
  });
}

}  // namespace KESTREL_CPU
