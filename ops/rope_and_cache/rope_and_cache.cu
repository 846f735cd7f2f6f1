// Queries, keys and values are three ranges of blocks. A thread takes a piece: two 16-byte vectors of one head of one
// token, either partners in rotation (rotate.cuh) or neighbours past R, and takes them through the steps of the
// separate ops in registers, packed again after each. Other layouts go by pairs and single elements. An index out of
// range leaves out the step that it is for, as in the separate ops. Bound by memory; small calls by the chain position
// -> row of the table, beside which all else is loaded.
#include <algorithm>
#include <type_traits>

#include "kestrel/hopper/divide.cuh"
#include "kestrel/hopper/pdl.cuh"
#include "kestrel/hopper/value.cuh"
#include "kestrel/launch.h"
#include "ops/kv_cache_write/slots.cuh"
#include "ops/rope_and_cache/args.h"
#include "ops/rotary_embedding/rotate.cuh"
#include "ops/tau_tail/factor.cuh"

namespace kestrel::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kBlocks = 8;  // on an SM: left to itself ptxas would save registers and put loads off
constexpr int kQuery = 0, kKey = 1, kValue = 2;
struct NoTau {};

template <class T>
struct Side {
  T* x;
  int64_t token, head;  // strides
  Divider<uint32_t> per_token, per_head;
  uint32_t pieces, first_block;
};

template <class T, class Cache, class Tau>
struct VectorArgs {
  Side<T> sides[3];
  Cache* caches[2];
  int64_t page, offset, cache_head;  // strides of both caches
  FastIndices positions;
  Table<float> cos_sin;
  FastIndices slots;
  uint32_t slot_count;
  Divider<uint32_t> page_size;
  DeviceValue<float> k_scale, v_scale;
  const T* tok;
  int64_t tok_token;
  Table<Tau> tau;
  uint32_t heads, half, rotated;  // rotated pieces of a head
};

template <class T, class Cache, bool kNeighbours, class Tau>
__global__ void __launch_bounds__(kThreads, kBlocks)
    rope_and_cache_kernel(const __grid_constant__ VectorArgs<T, Cache, Tau> args) {
  constexpr int kVec = kVec16<T>;
  constexpr bool kTau = !std::is_same_v<Tau, NoTau>;
  const int which = (blockIdx.x >= args.sides[kKey].first_block) + (blockIdx.x >= args.sides[kValue].first_block);
  const Side<T>& side = args.sides[which];
  const uint32_t index = (blockIdx.x - side.first_block) * kThreads + threadIdx.x;
  uint32_t token, rest, head, piece;
  side.per_token(index, &token, &rest);
  side.per_head(rest, &head, &piece);
  const bool rotated = which != kValue && piece < args.rotated;
  const bool apart = !kNeighbours && rotated;
  const uint32_t column = (apart ? kVec : 2 * kVec) * piece, step = apart ? args.half : kVec;
  T* x = side.x + token * side.token + head * side.head + column;
  const uint32_t* position_at = args.positions.address(token);
  const uint32_t* slot_at = args.slots.address(token);
  compute_now(x);
  compute_now(position_at);
  compute_now(slot_at);
  const bool inside = index < side.pieces;
  float scale = 1.0f;
  if constexpr (!std::is_same_v<T, Cache>)
    if (which != kQuery && inside) scale = (which == kKey ? args.k_scale : args.v_scale).at(head);
  wait_for_predecessor();
  release_successor();
  if (!inside) return;
  auto first = load<kVec>(x), second = load<kVec>(x + step);
  const IndexWords slot = args.slots.at(slot_at);
  const IndexWords position = args.positions.at(position_at);

  if constexpr (kTau) {
    if (which != kKey) {
      const T tok = args.tok[token * args.tok_token + head + (which == kValue ? args.heads : 0)];
      const float factor = tau_factor(to_float(tok), to_float(args.tau.row(position)[head]));
      if (args.tau.holds(position)) {
        first = scale_vector(first, factor);
        second = scale_vector(second, factor);
      }
    }
  }
  if (rotated) {
    const float* row = args.cos_sin.row(position) + kVec * piece;
    float cosines[kVec], sines[kVec];
    load_floats(row, cosines);
    load_floats(row + args.half, sines);
    if (args.cos_sin.holds(position)) rotate_piece<kNeighbours>(first, second, cosines, sines);
  }
  if (which == kQuery) {
    store(x, first);
    store(x + step, second);
    return;
  }
  if (!slot.below(args.slot_count)) return;
  uint32_t page, offset;
  args.page_size(slot.low, &page, &offset);
  Cache* out = args.caches[which - kKey] + page * args.page + offset * args.offset + head * args.cache_head + column;
  if constexpr (std::is_same_v<T, Cache>) {
    store(out, first);
    store(out + step, second);
  } else {
    const float reciprocal = 1.0f / scale;
    const auto first8 = convert_vector<Cache>(first, reciprocal), second8 = convert_vector<Cache>(second, reciprocal);
    if (apart) {
      store(out, first8);
      store(out + step, second8);
    } else {
      store(out, Vec<Cache, 2 * kVec>{{first8.words[0], first8.words[1], second8.words[0], second8.words[1]}});
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

template <class T>
bool heads_fit(const Tensor& x) {
  const Rows rows = token_rows(x, 2);
  return rows.uniform() && vectors_fit<T, kVec16<T>>(x, rows) && x.stride[x.rank - 2] % kVec16<T> == 0;
}

template <class T, class Cache>
bool caches_fit(const Tensor& a, const Tensor& b) {
  bool fit = aligned_to(a.data, 16) && aligned_to(b.data, 16) && std::equal(a.stride, a.stride + 4, b.stride);
  for (int dim = 0; dim < 3; ++dim) fit = fit && a.stride[dim] % kVec16<Cache> == 0;
  return fit;
}

template <class T, class Cache, class Tau>
bool run_vectors(Stream stream, const RopeAndCacheArgs& a) {
  constexpr int kPiece = 2 * kVec16<T>;
  constexpr bool kTau = !std::is_same_v<Tau, NoTau>;
  const KvCacheWriteArgs& w = a.write;
  const Tensor &q = a.rotary.query, &cos_sin = a.rotary.cos_sin_cache;
  const int64_t width = cos_sin.shape[1], size = w.head_size, slots = w.pages * w.page_size;
  const Rows positions = token_rows(a.rotary.positions, 0), tok_rows = kTau ? token_rows(*a.tok_qv_lin, 1) : Rows{};
  const Table<float> table(cos_sin);
  const Table<Tau> tau(kTau ? *a.tau_pos_table : cos_sin);
  if (slots == 0 || !fits_32_bits(slots) || size % kPiece != 0 || width % kPiece != 0 || !positions.uniform() ||
      !tok_rows.uniform() || !table.fits() || !tau.fits() || !aligned_to(table.data, 16) || table.stride % 4 != 0 ||
      !heads_fit<T>(q) || !heads_fit<T>(w.key) || !heads_fit<T>(w.value) ||
      !caches_fit<T, Cache>(w.key_cache, w.value_cache))
    return false;

  int64_t blocks = 0;
  bool fit = true;
  const auto side = [&](const Tensor& x, int64_t columns) {
    const int64_t per_head = columns / kPiece, per_token = x.size(-2) * per_head, pieces = w.tokens * per_token;
    Side<T> s{x.ptr<T>(), token_rows(x, 2).inner_stride, x.stride[x.rank - 2], {}, {},
              0,          static_cast<uint32_t>(blocks)};
    fit = fit && fits_32_bits(pieces + kThreads);
    if (pieces == 0 || !fit) return s;
    s.per_token = Divider<uint32_t>(per_token);
    s.per_head = Divider<uint32_t>(per_head);
    s.pieces = static_cast<uint32_t>(pieces);
    blocks += ceil_div(pieces, kThreads);
    return s;
  };
  const int64_t written = w.key_cache.empty() ? 0 : size;
  const Side<T> query = side(q, kTau ? size : width), key = side(w.key, written), value = side(w.value, written);
  if (!fit || !fits_32_bits(blocks)) return false;
  if (blocks == 0) return true;
  const VectorArgs<T, Cache, Tau> args{{query, key, value},
                                       {w.key_cache.ptr<Cache>(), w.value_cache.ptr<Cache>()},
                                       w.key_cache.stride[0],
                                       w.key_cache.stride[1],
                                       w.key_cache.stride[2],
                                       FastIndices(a.rotary.positions, positions.inner_stride),
                                       table,
                                       FastIndices(w.slot_mapping, w.slot_mapping.stride[0]),
                                       static_cast<uint32_t>(slots),
                                       Divider<uint32_t>(w.page_size),
                                       w.k_scale,
                                       w.v_scale,
                                       kTau ? a.tok_qv_lin->ptr<T>() : nullptr,
                                       tok_rows.inner_stride,
                                       tau,
                                       static_cast<uint32_t>(w.heads),
                                       static_cast<uint32_t>(width / 2),
                                       static_cast<uint32_t>(width / kPiece)};
  const LaunchShape shape{blocks, kThreads};
  a.rotary.interleaved ? launch<rope_and_cache_kernel<T, Cache, true, Tau>>(stream, shape, args)
                       : launch<rope_and_cache_kernel<T, Cache, false, Tau>>(stream, shape, args);
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
