#include "kestrel/ffi.h"
#include "ops/moe/moe.h"
#include "ops/moe/tile.h"

namespace {

namespace ffi = tvm::ffi;

kestrel::MoeLayerSizes layer_sizes(int64_t experts, int64_t hidden, int64_t inner, const ffi::String& dtype) {
  using kestrel::DType;
  const DType type = dtype == "fp8" ? DType::kE4M3 : dtype == "fp16" ? DType::kF16 : DType::kBF16;
  return {experts, hidden, inner, type};
}

// block_m, block_n, block_k, warps, stages, wgmma or not, a bit for each dtype.
ffi::Array<int64_t> moe_tile(int64_t index) {
  const kestrel::MoeTile& t = kestrel::moe_tile(index);
  const int64_t wgmma = t.kernel == kestrel::MoeKernel::kWgmma, dtypes = t.dtypes;
  return {t.block_m, t.block_n, t.block_k, t.num_warps, t.num_stages, wgmma, dtypes};
}

// The first token count, the tile of up and that of down, for each range.
ffi::Array<int64_t> moe_ranges(int64_t experts, int64_t hidden, int64_t inner, ffi::String dtype) {
  ffi::Array<int64_t> flat;
  for (const kestrel::MoeRange& range : kestrel::moe_ranges(layer_sizes(experts, hidden, inner, dtype)))
    for (const int64_t value : {range.first, int64_t{range.up}, int64_t{range.down}}) flat.push_back(value);
  return flat;
}

// points: tokens, up and down in turn.
void moe_learn(ffi::String gpu, int64_t experts, int64_t hidden, int64_t inner, ffi::String dtype,
               ffi::Array<int64_t> points) {
  std::vector<kestrel::MoePoint> list;
  for (size_t i = 0; i + 2 < points.size(); i += 3)
    list.push_back({points[i], static_cast<int>(points[i + 1]), static_cast<int>(points[i + 2])});
  kestrel::moe_learn(gpu, layer_sizes(experts, hidden, inner, dtype), std::move(list));
}

// Of a wgmma kernel. launch: the address of a MoeLaunch.
int64_t moe_add_tile(int block_m, int block_n, int block_k, int num_warps, int num_stages, int64_t dtypes,
                     int64_t launch) {
  const kestrel::MoeTile tile{
      block_m, block_n, block_k, num_warps, num_stages, kestrel::MoeKernel::kWgmma, static_cast<unsigned>(dtypes)};
  return kestrel::binding::raising(
      [&] { return int64_t{kestrel::moe_add_tile(tile, reinterpret_cast<kestrel::MoeLaunch>(launch))}; });
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(moe_tile_count, [] { return kestrel::moe_tile_count(); });
TVM_FFI_DLL_EXPORT_TYPED_FUNC(moe_tile, moe_tile);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(moe_add_tile, moe_add_tile);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(moe_last_kernel, [] { return ffi::String(kestrel::moe_last_kernel()); });
TVM_FFI_DLL_EXPORT_TYPED_FUNC(moe_ranges, moe_ranges);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(moe_learn, moe_learn);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(moe_forget, [] { kestrel::moe_forget(); });

KESTREL_EXPORT(moe_up);
KESTREL_EXPORT(moe_up_fp8);
KESTREL_EXPORT(moe_down);
KESTREL_EXPORT(moe_down_fp8);
