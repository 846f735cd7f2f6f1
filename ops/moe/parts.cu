// A thread adds 16 bytes of a token's parts, eight slots ahead. Where the routing is not known, the first column of
// each part is marked before the product, with a NaN that no arithmetic makes.
#include "kestrel/hopper/pdl.cuh"
#include "kestrel/hopper/tma.cuh"
#include "kestrel/launch.h"
#include "ops/moe/parts.h"
#include "ops/moe/warp_items.cuh"

namespace kestrel::cuda {
namespace {

constexpr int kThreads = 128;
constexpr uint32_t kMark = 0xffc0dead;

struct MarkArgs {
  uint32_t* parts;
  int64_t count, columns;
};

__global__ void __launch_bounds__(kThreads) mark_kernel(const __grid_constant__ MarkArgs args) {
  wait_for_predecessor();
  release_successor();
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i < args.count) args.parts[i * args.columns] = kMark;
}

struct Routing {
  const int32_t *ids, *expert_map;
  int64_t ids_stride;
  uint32_t routed, experts;
};

template <class Part, class Out>
struct SumArgs {
  Out* out;
  const Part* parts;  // [tokens * slots, columns]
  int64_t out_stride, columns;
  uint32_t slots;
  Divider<uint32_t> blocks_per_token;
  Routing routing;  // ids null: not known
};

template <class Part, class Out, int kVec>
__global__ void __launch_bounds__(kThreads) sum_parts_kernel(const __grid_constant__ SumArgs<Part, Out> args) {
  constexpr int kAhead = 8;
  uint32_t token, block;
  args.blocks_per_token(blockIdx.x, &token, &block);
  const int64_t own = (int64_t{block} * blockDim.x + threadIdx.x) * kVec, column = min(own, args.columns - kVec);
  const Part* const parts = args.parts + int64_t{token} * args.slots * args.columns;
  const auto row = [&](uint32_t slot) { return parts + int64_t{slot} * args.columns; };
  wait_for_predecessor();
  release_successor();
  float sum[kVec] = {};
  for (uint32_t base = 0; base < args.slots; base += kAhead) {
    Vec<Part, kVec> part[kAhead];
#pragma unroll
    for (uint32_t k = 0; k < kAhead; ++k) {
      const Part* const from = row(min(base + k, args.slots - 1)) + column;
      if constexpr (kVec > 1)
        part[k] = load_last<kVec>(from);
      else
        part[k] = load<kVec>(from);
    }
    const uint32_t slot = base + threadIdx.x % kAhead;
    bool there = slot < args.slots;
    if (there) {
      if (sizeof(Part) == 2 || args.routing.ids)
        there = static_cast<uint32_t>(expert_of(args.routing, token, slot)) < args.routing.experts;
      else
        there = *reinterpret_cast<const uint32_t*>(row(slot)) != kMark;
    }
    const uint32_t mask = __ballot_sync(~0u, there);
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (!(mask >> k & 1)) continue;
      float values[kVec];
      to_floats(part[k], values);
#pragma unroll
      for (int i = 0; i < kVec; ++i) sum[i] += values[i];
    }
  }
  if (own < args.columns) store(args.out + token * args.out_stride + own, from_floats<Out>(sum));
}

template <class Part, class Out>
void sum(Stream stream, const MoeArgs& a, const MoeArgs& product, int64_t first) {
  constexpr int kVec = kVec16<Part>;
  Out* const out = a.out.ptr<Out>() + first;
  const int64_t stride = a.out_rows.inner_stride;
  const bool vectors = product.width % kVec == 0 && stride % kVec == 0 && aligned_to(out, kVec * sizeof(Out));
  const int64_t per_token = product.width / (vectors ? kVec : 1);
  const int threads = static_cast<int>(std::min<int64_t>(ceil_div(per_token, kWarp) * kWarp, kThreads));
  const int64_t blocks = ceil_div(per_token, threads);
  const SumArgs<Part, Out> args{
      out,
      product.out.ptr<Part>(),
      stride,
      product.width,
      static_cast<uint32_t>(a.slots),
      Divider<uint32_t>(blocks),
      {a.ids, a.expert_map, a.ids_stride, static_cast<uint32_t>(a.routed), static_cast<uint32_t>(a.experts)}};
  const LaunchShape shape{a.tokens * blocks, threads};
  vectors ? launch<sum_parts_kernel<Part, Out, kVec>>(stream, shape, args)
          : launch<sum_parts_kernel<Part, Out, 1>>(stream, shape, args);
}

}  // namespace

void mark_parts(Stream stream, const MoeArgs& product) {
  const int64_t count = product.assignments();
  if (count == 0) return;
  const MarkArgs args{static_cast<uint32_t*>(product.out.data), count, product.width};
  launch<mark_kernel>(stream, {ceil_div(count, kThreads), kThreads}, args);
}

void sum_parts(Stream stream, const MoeArgs& a, const MoeArgs& product, int64_t first) {
  dispatch<bf16, f16>(a.out.dtype, [&]<class Out>() {
    product.out.dtype == DType::kF32 ? sum<float, Out>(stream, a, product, first)
                                     : sum<Out, Out>(stream, a, product, first);
  });
}

}  // namespace kestrel::cuda
