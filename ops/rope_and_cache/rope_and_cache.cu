// Queries, keys and values are three ranges of blocks. A warp takes heads of one token (heads.cuh), a lane the same
// vector of several, through the steps of the separate ops in registers, packed again after each. Other layouts go by
// pairs and single elements. An index out of range leaves out the step that it is for, as in the separate ops. Bound by
// memory; small calls by the chain position -> row of the table, beside which all else is loaded.
#include <algorithm>
#include <type_traits>

#include "kestrel/hopper/heads.cuh"
#include "kestrel/hopper/pdl.cuh"
#include "kestrel/hopper/value.cuh"
#include "kestrel/launch.h"
#include "ops/kv_cache_write/slots.cuh"
#include "ops/rope_and_cache/args.h"
#include "ops/rotary_embedding/rotate.cuh"
#include "ops/tau_tail/factor.cuh"

namespace kestrel::cuda {
namespace {

constexpr int kManyLoads = 2;  // 740 x 32 x 64: 5.4 us; one 5.8, four 5.6
constexpr int kThreads = 128;
constexpr int kBlocks = 8;  // on an SM: left to itself ptxas would save registers and put loads off
constexpr int kQuery = 0, kKey = 1, kValue = 2;
struct NoTau {};

template <class T, class Cache, class Tau>
struct VectorArgs {
  HeadSide<T> sides[3];
  Cache* caches[2];
  int64_t page, offset, cache_head;  // strides of both caches
  FastIndices positions;
  Table<float> cos_sin;
  FastIndices slots;
  uint32_t slot_count;
  Divider<uint32_t> page_size;
  uint32_t half, rotated;  // rotated vectors of a head
  DeviceValue<float> k_scale, v_scale;
  const T* tok;
  int64_t tok_token;
  Table<Tau> tau;
};

template <class T, class Cache, bool kNeighbours, class Tau, int kLoads>
__global__ void __launch_bounds__(kHeadThreads, kBlocks)
    rope_and_cache_kernel(const __grid_constant__ VectorArgs<T, Cache, Tau> args) {
  constexpr int kVec = kVec16<T>;
  constexpr bool kTau = !std::is_same_v<Tau, NoTau>, kScaled = !std::is_same_v<T, Cache>;
  const int which = (blockIdx.x >= args.sides[kKey].first_block) + (blockIdx.x >= args.sides[kValue].first_block);
  const HeadSide<T>& side = args.sides[which];
  const HeadLane<kLoads> lane(side);
  T* x = side.x + lane.token * side.token + lane.first_head * side.head + lane.vector * kVec;
  const int64_t step = side.heads_per_load * side.head;
  const uint32_t own = lane.own_head();
  Rotation<T, kNeighbours> rotation(lane.vector, args.half);
  const float* table = args.cos_sin.data + rotation.column;
  const uint32_t* position_at = args.positions.address(lane.token);
  const uint32_t* slot_at = args.slots.address(lane.token);
  compute_now(x);
  compute_now(table);
  compute_now(position_at);
  compute_now(slot_at);
  float scale = 1.0f;
  if constexpr (kScaled)
    if (which != kQuery) scale = (which == kKey ? args.k_scale : args.v_scale).at(own);
  if (starts_early() && lane.any) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) prefetch_line(lane.inside(i) ? x + i * step : x);
  }
  wait_for_predecessor();
  release_successor();
  if (!lane.any) return;
  const IndexWords position = args.positions.at(position_at);
  const IndexWords slot = args.slots.at(slot_at);
  Vec<T, kVec> v[kLoads] = {};
#pragma unroll
  for (int i = 0; i < kLoads; ++i)
    if (lane.inside(i)) v[i] = load<kVec>(x + i * step);
  T tok{};
  if constexpr (kTau)
    if (which != kKey) tok = args.tok[lane.token * args.tok_token + (which == kValue ? side.heads : 0) + own];
  __syncwarp();  // else ptxas would put loads behind the first use of an index
  if (which != kQuery && !slot.below(args.slot_count)) return;

  if constexpr (kTau) {
    if (which != kKey && args.tau.holds(position)) {
      const float factor = tau_factor(to_float(tok), to_float(*args.tau.row(args.tau.data + own, position)));
#pragma unroll
      for (int i = 0; i < kLoads; ++i) v[i] = scaled<T>(v[i], lane.of_head(i, factor));
    }
  }
  if (which != kValue && args.cos_sin.holds(position)) {
    rotation.load_row(args.cos_sin.row(table, position), args.half);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const Vec<T, kVec> turned = rotation.turned(v[i]);
      if (lane.vector < args.rotated) v[i] = turned;
    }
  }
  if (which == kQuery) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      if (lane.inside(i)) store(x + i * step, v[i]);
    return;
  }
  uint32_t page, offset;
  args.page_size(slot.low, &page, &offset);
  Cache* out = args.caches[which - kKey] + page * args.page + offset * args.offset + lane.first_head * args.cache_head +
               lane.vector * kVec;
  const int64_t out_step = side.heads_per_load * args.cache_head;
  const float reciprocal = 1.0f / scale;
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    if constexpr (kScaled) {
      auto bits = scaled<Cache>(v[i], lane.of_head(i, reciprocal));
      compute_now(bits);  // here, so that the store alone is conditional, without a branch
      if (lane.inside(i)) store(out + i * out_step, bits);
    } else {
      if (lane.inside(i)) store(out + i * out_step, v[i]);
    }
  }
}

// One of query, key and value: `pairs` of each head are rotated, the other elements are not.
template <class T, class Cache>
struct ElementArgs {
  T* x;
  Cache* cache;  // null: x is changed in place
  Rows tokens, position_rows, tok_rows;
  int64_t head_stride, heads, pairs, units;  // units of a head: pairs, then single elements
  DeviceIndices positions;
  Table<float> cos_sin;
  Slots slots;
  DeviceValue<float> scale;
  int64_t page, offset, cache_head;
  const T* tok;  // of this side; null: no tau
  const void* tau;
  int64_t tau_stride, tau_rows;
  bool tau_f32, neighbours;
};

template <class T, class Cache>
__global__ void __launch_bounds__(kThreads)
    rope_and_cache_element_kernel(const __grid_constant__ ElementArgs<T, Cache> args) {
  wait_for_predecessor();
  release_successor();
  const int64_t index = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  const int64_t unit = index % args.units, head = index / args.units % args.heads;
  const int64_t token = index / args.units / args.heads;
  if (token >= args.tokens.count) return;
  const bool rotated = unit < args.pairs;
  const int64_t column = !rotated ? unit + args.pairs : args.neighbours ? 2 * unit : unit;
  const int64_t step = !rotated ? 0 : args.neighbours ? 1 : args.pairs;
  T* x = args.x + args.tokens.offset(token) + head * args.head_stride + column;
  T a = x[0], b = x[step];
  const int64_t position = args.positions.at(args.position_rows.offset(token));
  if (args.tok && position >= 0 && position < args.tau_rows) {
    const int64_t at = position * args.tau_stride + head;
    const float tau =
        args.tau_f32 ? static_cast<const float*>(args.tau)[at] : to_float(static_cast<const T*>(args.tau)[at]);
    const float factor = tau_factor(to_float(args.tok[args.tok_rows.offset(token) + head]), tau);
    a = from_float<T>(__fmul_rn(to_float(a), factor));
    b = from_float<T>(__fmul_rn(to_float(b), factor));
  }
  if (rotated && args.cos_sin.holds(position)) {
    const float* row = args.cos_sin.row(position) + unit;
    float f = to_float(a), g = to_float(b);
    rotate_pair(f, g, row[0], row[args.pairs]);
    a = from_float<T>(f);
    b = from_float<T>(g);
  }
  if (!args.cache) {
    x[0] = a;
    if (rotated) x[step] = b;
    return;
  }
  const Place place = place_of(args.slots, args.slots.at(token));
  if (place.page < 0) return;
  Cache* out = args.cache + place.page * args.page + place.offset * args.offset + head * args.cache_head + column;
  const auto write = [&](Cache* to, T value) {
    if constexpr (std::is_same_v<T, Cache>)
      *to = value;
    else
      *to = from_float<Cache>(__fmul_rn(to_float(value), 1.0f / args.scale.at(head)));
  };
  write(out, a);
  if (rotated) write(out + step, b);
}

template <class T, class Cache>
void run_elements(Stream stream, const RopeAndCacheArgs& a, int which) {
  const KvCacheWriteArgs& w = a.write;
  const Tensor& x = which == kQuery ? a.rotary.query : which == kKey ? w.key : w.value;
  const Tensor& cache = which == kValue ? w.value_cache : w.key_cache;
  const bool tau = a.tok_qv_lin && which != kKey;
  const int64_t pairs = which == kValue ? 0 : a.rotary.cos_sin_cache.shape[1] / 2;
  const int64_t units = which == kQuery && !tau ? pairs : x.size(-1) - pairs;
  const ElementArgs<T, Cache> args{x.ptr<T>(),
                                   which == kQuery ? nullptr : cache.ptr<Cache>(),
                                   token_rows(x, 2),
                                   token_rows(a.rotary.positions, 0),
                                   tau ? token_rows(*a.tok_qv_lin, 1) : Rows{},
                                   x.stride[x.rank - 2],
                                   x.size(-2),
                                   pairs,
                                   units,
                                   DeviceIndices(a.rotary.positions),
                                   Table<float>(a.rotary.cos_sin_cache),
                                   Slots(w),
                                   which == kValue ? w.v_scale : w.k_scale,
                                   cache.stride[0],
                                   cache.stride[1],
                                   cache.stride[2],
                                   tau ? a.tok_qv_lin->ptr<T>() + (which == kValue ? w.heads : 0) : nullptr,
                                   tau ? a.tau_pos_table->data : nullptr,
                                   tau ? a.tau_pos_table->stride[0] : 0,
                                   tau ? a.tau_pos_table->shape[0] : 0,
                                   tau && a.tau_pos_table->dtype == DType::kF32,
                                   a.rotary.interleaved};
  const int64_t threads = args.tokens.count * args.heads * units;
  if (threads == 0 || (which != kQuery && cache.empty())) return;
  launch<rope_and_cache_element_kernel<T, Cache>>(stream, {ceil_div(threads, kThreads), kThreads}, args);
}

template <class T, class Cache>
bool caches_fit(const Tensor& a, const Tensor& b) {
  bool fit = aligned_to(a.data, 16) && aligned_to(b.data, 16) && std::equal(a.stride, a.stride + 4, b.stride);
  for (int dim = 0; dim < 3; ++dim) fit = fit && a.stride[dim] % kVec16<T> == 0;
  return fit;
}

template <class T, class Cache, class Tau, int kLoads>
void launch_vectors(Stream stream, const RopeAndCacheArgs& a, int64_t query_vectors, int64_t vectors) {
  constexpr bool kTau = !std::is_same_v<Tau, NoTau>;
  const KvCacheWriteArgs& w = a.write;
  const Tensor& cos_sin = a.rotary.cos_sin_cache;
  int64_t blocks = 0;
  const HeadSide<T> query(a.rotary.query, query_vectors, kLoads, &blocks), key(w.key, vectors, kLoads, &blocks),
      value(w.value, vectors, kLoads, &blocks);
  const VectorArgs<T, Cache, Tau> args{{query, key, value},
                                       {w.key_cache.ptr<Cache>(), w.value_cache.ptr<Cache>()},
                                       w.key_cache.stride[0],
                                       w.key_cache.stride[1],
                                       w.key_cache.stride[2],
                                       FastIndices(a.rotary.positions, token_rows(a.rotary.positions, 0).inner_stride),
                                       Table<float>(cos_sin),
                                       FastIndices(w.slot_mapping, w.slot_mapping.stride[0]),
                                       static_cast<uint32_t>(w.pages * w.page_size),
                                       Divider<uint32_t>(w.page_size),
                                       static_cast<uint32_t>(cos_sin.shape[1] / 2),
                                       static_cast<uint32_t>(cos_sin.shape[1] / kVec16<T>),
                                       w.k_scale,
                                       w.v_scale,
                                       kTau ? a.tok_qv_lin->ptr<T>() : nullptr,
                                       kTau ? token_rows(*a.tok_qv_lin, 1).inner_stride : 0,
                                       Table<Tau>(kTau ? *a.tau_pos_table : cos_sin)};
  if (blocks == 0) return;
  const LaunchShape shape{blocks, kHeadThreads};
  a.rotary.interleaved ? launch<rope_and_cache_kernel<T, Cache, true, Tau, kLoads>>(stream, shape, args)
                       : launch<rope_and_cache_kernel<T, Cache, false, Tau, kLoads>>(stream, shape, args);
}

template <class T, class Cache, class Tau>
bool run_vectors(Stream stream, const RopeAndCacheArgs& a) {
  constexpr int kVec = kVec16<T>;
  constexpr bool kTau = !std::is_same_v<Tau, NoTau>;
  const KvCacheWriteArgs& w = a.write;
  const Tensor& cos_sin = a.rotary.cos_sin_cache;
  const int64_t width = cos_sin.shape[1], size = w.head_size, slots = w.pages * w.page_size;
  const Table<float> table(cos_sin);
  const int64_t vectors = w.key_cache.empty() ? 0 : size / kVec, query_vectors = (kTau ? size : width) / kVec;
  if (slots == 0 || !fits_32_bits(slots) || size % kVec != 0 || width == 0 || width % (2 * kVec) != 0 ||
      !table.fits() || !aligned_to(table.data, 16) || table.stride % 4 != 0 ||
      !token_rows(a.rotary.positions, 0).uniform() ||
      (kTau && !(token_rows(*a.tok_qv_lin, 1).uniform() && Table<Tau>(*a.tau_pos_table).fits())) ||
      !HeadSide<T>::fits(a.rotary.query, query_vectors) || !HeadSide<T>::fits(w.key, vectors) ||
      !HeadSide<T>::fits(w.value, vectors) || !caches_fit<T, Cache>(w.key_cache, w.value_cache))
    return false;
  const int64_t all = w.tokens * (a.rotary.query.size(-2) * query_vectors + 2 * w.heads * vectors);
  many_heads(kManyLoads, std::min(query_vectors, vectors), all)
      ? launch_vectors<T, Cache, Tau, kManyLoads>(stream, a, query_vectors, vectors)
      : launch_vectors<T, Cache, Tau, 1>(stream, a, query_vectors, vectors);
  return true;
}

template <class T, class Cache>
void choose(Stream stream, const RopeAndCacheArgs& a) {
  const bool done = !a.tau_pos_table                        ? run_vectors<T, Cache, NoTau>(stream, a)
                    : a.tau_pos_table->dtype == DType::kF32 ? run_vectors<T, Cache, float>(stream, a)
                                                            : run_vectors<T, Cache, T>(stream, a);
  if (done) return;
  for (const int which : {kQuery, kKey, kValue}) run_elements<T, Cache>(stream, a, which);
}

}  // namespace

void rope_and_cache(Stream stream, const RopeAndCacheArgs& args) {
  dispatch<bf16, f16>(args.rotary.query.dtype,
                      [&]<class T>() { args.write.fp8 ? choose<T, e4m3>(stream, args) : choose<T, T>(stream, args); });
}

}  // namespace kestrel::cuda
