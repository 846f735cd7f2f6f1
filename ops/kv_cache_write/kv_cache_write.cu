// A thread takes a vector of one head of one token: 16 elements that become 16 bytes of e4m3, or 16 bytes copied; key
// and value are the two halves of the grid. Scattered 2 KB pieces (page size 1, 32 heads of 64) go out as fast as a
// stream. Bound by memory: 3 bytes an element in fp8, 4 in 16 bits.
#include "kestrel/hopper/divide.cuh"
#include "kestrel/hopper/pdl.cuh"
#include "kestrel/hopper/value.cuh"
#include "kestrel/hopper/vec.cuh"
#include "kestrel/launch.h"
#include "ops/kv_cache_write/args.h"

namespace kestrel::cuda {
namespace {

constexpr int kThreads = 256;

// One of the two: key or value. Strides in elements.
template <class T, class Cache>
struct Side {
  const T* source;
  Cache* cache;
  int64_t token, head;                // of source
  int64_t page, in_page, cache_head;  // of cache
  DeviceValue<float> scale;
};

template <class T, class Cache, class Index>
struct KernelArgs {
  Side<T, Cache> sides[2];
  const void* slots;
  bool wide_slots;  // int64
  int64_t slot_stride, slot_count, page_size;
  Divider<Index> vectors_per_token, vectors_per_head;
  Index vectors;  // of one side
};

// The value of slot_mapping at a token, -1 where it lies outside the cache.
template <class Args>
__device__ __forceinline__ int64_t slot_of(const Args& args, int64_t token) {
  const int64_t slot = args.wide_slots ? static_cast<const int64_t*>(args.slots)[token * args.slot_stride]
                                       : static_cast<const int32_t*>(args.slots)[token * args.slot_stride];
  return slot < args.slot_count ? slot : -1;
}

template <class T, class Cache, int kVec, class Index>
__global__ void __launch_bounds__(kThreads) kv_cache_write_kernel(const KernelArgs<T, Cache, Index> args) {
  constexpr int kPart = kVec < kVec16<T> ? kVec : kVec16<T>;  // elements of one load
  const Side<T, Cache>& side = args.sides[blockIdx.y];
  const Index vector = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x;
  Index token, rest, head, column;
  args.vectors_per_token(vector, &token, &rest);
  args.vectors_per_head(rest, &head, &column);
  if (vector >= args.vectors) token = head = column = 0;
  const float scale = side.scale.at(head);  // asked for here, waited for below
  wait_for_predecessor();
  release_successor();
  if (vector >= args.vectors) return;
  const T* source = side.source + token * side.token + head * side.head + int64_t{column} * kVec;
  Vec<T, kPart> parts[kVec / kPart];
#pragma unroll
  for (int p = 0; p < kVec / kPart; ++p) parts[p] = load<kPart>(source + p * kPart);
  const int64_t slot = slot_of(args, token);
  if (slot < 0) return;
  const int64_t page = args.page_size == 1 ? slot : slot / args.page_size;
  Cache* out = side.cache + page * side.page + (slot - page * args.page_size) * side.in_page + head * side.cache_head +
               int64_t{column} * kVec;
  if constexpr (std::is_same_v<T, Cache>) {
    store(out, parts[0]);
  } else {
    const float reciprocal = 1.0f / scale;
    float f[kVec];
#pragma unroll
    for (int p = 0; p < kVec / kPart; ++p) {
      float part[kPart];
      to_floats(parts[p], part);
#pragma unroll
      for (int i = 0; i < kPart; ++i) f[p * kPart + i] = part[i] * reciprocal;
    }
    store(out, from_floats<Cache>(f));
  }
}

template <class T, class Cache>
Side<T, Cache> side_of(const Tensor& source, const Tensor& cache, const Value<float>& scale) {
  return {source.ptr<T>(), cache.ptr<Cache>(), source.stride[0], source.stride[1],
          cache.stride[0], cache.stride[1],    cache.stride[2],  scale};
}

template <class T, class Cache, int kVec>
bool vectors_fit(const Tensor& source, const Tensor& cache) {
  bool fit = aligned_to(source.data, 16) && aligned_to(cache.data, 16);
  for (int dim = 0; dim < source.rank - 1; ++dim) fit = fit && source.stride[dim] % kVec16<T> == 0;
  for (int dim = 0; dim < cache.rank - 1; ++dim) fit = fit && cache.stride[dim] % kVec16<Cache> == 0;
  return fit;
}

template <class T, class Cache, int kVec, class Index>
void run(Stream stream, const KvCacheWriteArgs& a) {
  const int64_t per_head = a.head_size / kVec, vectors = a.tokens * a.heads * per_head;
  const KernelArgs<T, Cache, Index> args{
      {side_of<T, Cache>(a.key, a.key_cache, a.k_scale), side_of<T, Cache>(a.value, a.value_cache, a.v_scale)},
      a.slot_mapping.data,
      a.slot_mapping.dtype == DType::kI64,
      a.slot_mapping.stride[0],
      a.pages * a.page_size,
      a.page_size,
      Divider<Index>(a.heads * per_head),
      Divider<Index>(per_head),
      static_cast<Index>(vectors)};
  launch(stream, {ceil_div(vectors, kThreads), kThreads, 2}, kv_cache_write_kernel<T, Cache, kVec, Index>, args);
}

template <class T, class Cache>
void choose(Stream stream, const KvCacheWriteArgs& a) {
  constexpr int kVec = kVec16<Cache>;  // 16 bytes written
  if (a.head_size % kVec == 0 && vectors_fit<T, Cache, kVec>(a.key, a.key_cache) &&
      vectors_fit<T, Cache, kVec>(a.value, a.value_cache) && fits_32_bits(a.key.numel() / kVec + kThreads))
    run<T, Cache, kVec, uint32_t>(stream, a);
  else
    run<T, Cache, 1, int64_t>(stream, a);
}

}  // namespace

void kv_cache_write(Stream stream, const KvCacheWriteArgs& args) {
  dispatch<bf16, f16>(args.key.dtype,
                      [&]<class T>() { args.fp8 ? choose<T, e4m3>(stream, args) : choose<T, T>(stream, args); });
}

}  // namespace kestrel::cuda
