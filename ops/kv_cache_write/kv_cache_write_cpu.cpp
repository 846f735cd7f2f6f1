#include "ops/kv_cache_write/store_cpu.h"

namespace KESTREL_CPU {
namespace {

template <class T, class Cache>
void write(const KvCacheWriteArgs& args) {
  const auto store = [&](const Tensor& x, const CacheSide<Cache>& side) {
    return [&x, &args, side](int64_t token, int64_t page, int64_t offset, int64_t first, int64_t last) {
      for (int64_t h = first; h < last; ++h)
        store_head(side.head(page, offset, h), x.ptr<T>() + token * x.stride[0] + h * x.stride[1], args.head_size,
                   side.reciprocal(h));
    };
  };
  for_each_slot(args, store(args.key, {args.key_cache, args.k_scale}),
                store(args.value, {args.value_cache, args.v_scale}));
}

}  // namespace

void kv_cache_write(const KvCacheWriteArgs& args) {
  dispatch<bf16, f16>(args.key.dtype, [&]<class T>() { args.fp8 ? write<T, e4m3>(args) : write<T, T>(args); });
}

}  // namespace KESTREL_CPU
