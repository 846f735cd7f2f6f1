// Where a token goes in the cache, and as what, for all kernels that write it.
#pragma once

#include "kestrel/hopper/index.cuh"
#include "kestrel/hopper/vec.cuh"
#include "ops/kv_cache_write/args.h"

namespace kestrel {

struct Slots {
  DeviceIndices indices;
  int64_t stride, count, page_size;

  explicit Slots(const KvCacheWriteArgs& args)
      : indices(args.slot_mapping),
        stride(args.slot_mapping.stride[0]),
        count(args.pages * args.page_size),
        page_size(args.page_size) {}
  __device__ __forceinline__ int64_t at(int64_t token) const { return indices.at(token * stride); }
  __device__ __forceinline__ const void* address(int64_t token) const { return indices.address(token * stride); }
};

struct Place {
  int64_t page, offset;  // page -1 where the slot is negative or past the end
};

__device__ __forceinline__ Place place_of(const Slots& slots, int64_t slot) {
  if (slot < 0 || slot >= slots.count) return {-1, 0};
  if (slots.page_size == 1) return {slot, 0};
  return {slot / slots.page_size, slot % slots.page_size};
}

}  // namespace kestrel
