// A thread takes a vector of one head of one token: 16 elements that become 16 bytes of e4m3, or 16 bytes copied; key
// and value are the two halves of the grid. Layouts that the vectors do not fit go element by element. Bound by memory,
// 3 bytes an element in fp8 and 4 in 16 bits: scattered pieces of 2 KB (page size 1, 32 heads of 64) go out as fast as
// a stream.
#include <algorithm>

#include "kestrel/hopper/divide.cuh"
#include "kestrel/hopper/pdl.cuh"
#include "kestrel/hopper/value.cuh"
#include "kestrel/hopper/vec.cuh"
#include "kestrel/launch.h"
#include "ops/kv_cache_write/slots.cuh"

namespace kestrel::cuda {
namespace {

constexpr int kThreads = 256;

template <class T, class Cache>
struct VectorArgs {
  const T* key;
  const T* value;
  Cache* key_cache;
  Cache* value_cache;
  int64_t token, head;               // strides of key and of value
  int64_t page, offset, cache_head;  // strides of both caches
  DeviceValue<float> k_scale, v_scale;
  Slots slots;
  Divider<uint32_t> vectors_per_token, vectors_per_head;
  uint32_t vectors;
};

template <class T, class Cache>
__global__ void __launch_bounds__(kThreads) kv_cache_write_kernel(const __grid_constant__ VectorArgs<T, Cache> args) {
  constexpr int kVec = kVec16<Cache>, kPart = kVec16<T>;  // elements of a store, of a load
  const bool is_value = blockIdx.y;
  const uint32_t vector = blockIdx.x * kThreads + threadIdx.x;
  uint32_t token, rest, head, column;
  args.vectors_per_token(vector, &token, &rest);
  args.vectors_per_head(rest, &head, &column);
  const T* source = (is_value ? args.value : args.key) + token * args.token + head * args.head + column * kVec;
  const float scale = (is_value ? args.v_scale : args.k_scale).at(vector < args.vectors ? head : 0);
  if (starts_early() && vector < args.vectors) {
    prefetch(args.slots.address(token));
#pragma unroll
    for (int p = 0; p < kVec / kPart; ++p) prefetch_line(source + p * kPart);
  }
  wait_for_predecessor();
  release_successor();
  if (vector >= args.vectors) return;
  Vec<T, kPart> parts[kVec / kPart];
#pragma unroll
  for (int p = 0; p < kVec / kPart; ++p) parts[p] = load<kPart>(source + p * kPart);
  const Place place = place_of(args.slots, args.slots.at(token));
  if (place.page < 0) return;
  Cache* out = (is_value ? args.value_cache : args.key_cache) + place.page * args.page + place.offset * args.offset +
               head * args.cache_head + column * kVec;
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
struct ElementArgs {
  const T* source;
  Cache* cache;
  int64_t token, head, page, offset, cache_head;  // strides
  DeviceValue<float> scale;
  Slots slots;
  int64_t heads, head_size, elements;
};

template <class T, class Cache>
__global__ void __launch_bounds__(kThreads)
    kv_cache_write_element_kernel(const __grid_constant__ ElementArgs<T, Cache> args) {
  wait_for_predecessor();
  release_successor();
  const int64_t element = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (element >= args.elements) return;
  const int64_t column = element % args.head_size, head = element / args.head_size % args.heads;
  const int64_t token = element / args.head_size / args.heads;
  const Place place = place_of(args.slots, args.slots.at(token));
  if (place.page < 0) return;
  const T x = args.source[token * args.token + head * args.head + column];
  Cache& out = args.cache[place.page * args.page + place.offset * args.offset + head * args.cache_head + column];
  if constexpr (std::is_same_v<T, Cache>)
    out = x;
  else
    out = from_float<Cache>(to_float(x) * (1.0f / args.scale.at(head)));
}

template <class T, class Cache>
bool vectors_fit(const Tensor& source, const Tensor& cache) {
  bool fit = aligned_to(source.data, 16) && aligned_to(cache.data, 16);
  for (int dim = 0; dim < source.rank - 1; ++dim) fit = fit && source.stride[dim] % kVec16<T> == 0;
  for (int dim = 0; dim < cache.rank - 1; ++dim) fit = fit && cache.stride[dim] % kVec16<Cache> == 0;
  return fit;
}

bool same_strides(const Tensor& a, const Tensor& b) { return std::equal(a.stride, a.stride + a.rank, b.stride); }

template <class T, class Cache>
void run_elements(Stream stream, const KvCacheWriteArgs& a, const Slots& slots, const Tensor& source,
                  const Tensor& cache, const Value<float>& scale) {
  const ElementArgs<T, Cache> args{source.ptr<T>(),
                                   cache.ptr<Cache>(),
                                   source.stride[0],
                                   source.stride[1],
                                   cache.stride[0],
                                   cache.stride[1],
                                   cache.stride[2],
                                   scale,
                                   slots,
                                   a.heads,
                                   a.head_size,
                                   source.numel()};
  launch<kv_cache_write_element_kernel<T, Cache>>(stream, {ceil_div(args.elements, kThreads), kThreads}, args);
}

template <class T, class Cache>
void choose(Stream stream, const KvCacheWriteArgs& a) {
  constexpr int kVec = kVec16<Cache>;
  const Slots slots(a);
  const int64_t per_head = a.head_size / kVec, vectors = a.tokens * a.heads * per_head;
  if (a.head_size % kVec == 0 && vectors_fit<T, Cache>(a.key, a.key_cache) &&
      vectors_fit<T, Cache>(a.value, a.value_cache) && same_strides(a.key, a.value) &&
      same_strides(a.key_cache, a.value_cache) && fits_32_bits(vectors + kThreads)) {
    const VectorArgs<T, Cache> args{a.key.ptr<T>(),
                                    a.value.ptr<T>(),
                                    a.key_cache.ptr<Cache>(),
                                    a.value_cache.ptr<Cache>(),
                                    a.key.stride[0],
                                    a.key.stride[1],
                                    a.key_cache.stride[0],
                                    a.key_cache.stride[1],
                                    a.key_cache.stride[2],
                                    a.k_scale,
                                    a.v_scale,
                                    slots,
                                    Divider<uint32_t>(a.heads * per_head),
                                    Divider<uint32_t>(per_head),
                                    static_cast<uint32_t>(vectors)};
    launch<kv_cache_write_kernel<T, Cache>>(stream, {ceil_div(vectors, kThreads), kThreads, 2}, args);
  } else {
    run_elements<T, Cache>(stream, a, slots, a.key, a.key_cache, a.k_scale);
    run_elements<T, Cache>(stream, a, slots, a.value, a.value_cache, a.v_scale);
  }
}

}  // namespace

void kv_cache_write(Stream stream, const KvCacheWriteArgs& args) {
  dispatch<bf16, f16>(args.key.dtype,
                      [&]<class T>() { args.fp8 ? choose<T, e4m3>(stream, args) : choose<T, T>(stream, args); });
}

}  // namespace kestrel::cuda
