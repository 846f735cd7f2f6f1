// Writes keys and values into a paged cache: slot s >= 0 is page s / page_size, offset s % page_size; tokens with a
// negative slot are skipped. A slot named twice: the later token's on the CPU, either one's on CUDA.
//   key, value [T, H, D] bf16 | f16, any token and head stride     slot_mapping [T] i64 | i32, < pages * page_size
//   key_cache, value_cache [pages, page_size, H, D], any strides but the last
//   "auto": caches as key, copied bit for bit, scales ignored (they may be missing)
//   "fp8", "fp8_e4m3": caches e4m3 (or u8 bits) = e4m3(x * r), r = 1 / scale in fp32, nearest even, saturating at 448
//   k_scale, v_scale f32: a number, one element, or [H]: true value = stored * scale
#pragma once

#include <kestrel/tensor.h>

#include <string_view>

namespace kestrel {

KESTREL_API void reshape_and_cache_flash(Stream stream, Tensor key, Tensor value, Tensor key_cache, Tensor value_cache,
                                         Tensor slot_mapping, std::string_view kv_cache_dtype,
                                         std::optional<Value<float>> k_scale, std::optional<Value<float>> v_scale);

}  // namespace kestrel
