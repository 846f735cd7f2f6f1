// What both devices' kv_cache_write works on, and the part of its contract that other writers of the cache share.
// Strides are read from the tensors: the last dimension of key, value and caches is contiguous, all others are free,
// those of slot_mapping and of scales [H] too. Caches hold the key's dtype, or e4m3 | u8 where fp8.
#pragma once

#include <string_view>

#include "kestrel/contract.h"

namespace kestrel {

struct KvCacheWriteArgs {
  Tensor key, value, key_cache, value_cache, slot_mapping;
  Value<float> k_scale, v_scale;  // 1 where not fp8
  bool fp8;
  int64_t tokens, heads, head_size, pages, page_size;
};

// Checks caches, slots (but not their values), mode and scales against key, tokens, heads and head_size, which are
// set; sets fp8, scales, pages and page_size.
void check_kv_cache(Contract& c, KvCacheWriteArgs* args, std::string_view kv_cache_dtype,
                    const std::optional<Value<float>>& k_scale, const std::optional<Value<float>>& v_scale,
                    const char* key_cache_name, const char* value_cache_name);

void check_slots(Contract& c, Stream stream, const KvCacheWriteArgs& args);  // the values of slot_mapping

}  // namespace kestrel
