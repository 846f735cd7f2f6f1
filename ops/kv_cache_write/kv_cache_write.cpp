#include "ops/kv_cache_write/kv_cache_write.h"

#include "kestrel/contract.h"
#include "kestrel/cpu/target.h"
#include "kestrel/cuda.h"
#include "ops/kv_cache_write/args.h"

KESTREL_CPU_TWIN(kv_cache_write, void(const kestrel::KvCacheWriteArgs& args));

namespace kestrel {
namespace cuda {
void kv_cache_write(Stream stream, const KvCacheWriteArgs& args);
}

namespace {

Value<float> check_scale(Contract& c, const char* name, const std::optional<Value<float>>& scale, int64_t heads) {
  if (!scale) c.fail(ErrorKind::kTypeError, name, "be a number or a float32 array", "None");
  if (!scale->tensor) return *scale;
  Arg arg = c.in(name, *scale->tensor).dtype({DType::kF32});
  if (scale->tensor->numel() != 1) arg.shape({heads});
  return *scale;
}

}  // namespace

void check_kv_cache(Contract& c, KvCacheWriteArgs* args, std::string_view kv_cache_dtype,
                    const std::optional<Value<float>>& k_scale, const std::optional<Value<float>>& v_scale,
                    const char* key_cache_name, const char* value_cache_name) {
  args->fp8 = kv_cache_dtype == "fp8" || kv_cache_dtype == "fp8_e4m3";
  c.require(args->fp8 || kv_cache_dtype == "auto", "kv_cache_dtype", "auto, fp8 or fp8_e4m3",
            std::string(kv_cache_dtype));
  Dim pages("pages"), page_size("page_size");
  const auto check = [&](const char* name, const Tensor& cache) {
    Arg arg = c.out(name, cache);
    args->fp8 ? arg.dtype({DType::kE4M3, DType::kU8}) : arg.dtype_like(args->key);
    arg.shape({pages, page_size, args->heads, args->head_size}).last_contiguous();
  };
  check(key_cache_name, args->key_cache);
  check(value_cache_name, args->value_cache);
  args->pages = pages;
  args->page_size = page_size;
  c.in("slot_mapping", args->slot_mapping).dtype({DType::kI64, DType::kI32}).shape({args->tokens});
  if (!args->fp8) return;  // scales are not looked at
  args->k_scale = check_scale(c, "k_scale", k_scale, args->heads);
  args->v_scale = check_scale(c, "v_scale", v_scale, args->heads);
}

void check_slots(Contract& c, Stream stream, const KvCacheWriteArgs& args) {
  c.indices(stream, "slot_mapping", args.slot_mapping, 0, args.pages * args.page_size, true);
}

void reshape_and_cache_flash(Stream stream, Tensor key, Tensor value, Tensor key_cache, Tensor value_cache,
                             Tensor slot_mapping, std::string_view kv_cache_dtype, std::optional<Value<float>> k_scale,
                             std::optional<Value<float>> v_scale) {
  Contract c("reshape_and_cache_flash");
  Dim T("T"), H("H"), D("D");
  c.in("key", key).dtype({DType::kBF16, DType::kF16}).shape({T, H, D}).last_contiguous();
  c.in("value", value).like(key).last_contiguous();
  KvCacheWriteArgs args{key, value, key_cache, value_cache, slot_mapping, {}, {}, false, T, H, D, 0, 0};
  check_kv_cache(c, &args, kv_cache_dtype, k_scale, v_scale, "key_cache", "value_cache");
  check_slots(c, stream, args);
  if (key.empty() || key_cache.empty()) return;
  if (c.on_cpu()) return cpu::kv_cache_write(args);
  if constexpr (kHasCuda) {
    DeviceGuard guard(key.device);
    cuda::kv_cache_write(stream, args);
  }
}

}  // namespace kestrel
