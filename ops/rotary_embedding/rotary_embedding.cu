// A thread rotates a piece (rotate.cuh) of one head of one token in place, in 16-byte vectors; the grid is flat over
// the pieces of query and key. Other layouts and widths go pair by pair. Elements past R are not touched. Bound by
// memory, 2 R elements moved a head; small calls by the chain position -> row of the table -> rotation: the vectors are
// on their way before the position is known.
#include "kestrel/hopper/divide.cuh"
#include "kestrel/hopper/index.cuh"
#include "kestrel/hopper/pdl.cuh"
#include "kestrel/launch.h"
#include "ops/rotary_embedding/args.h"
#include "ops/rotary_embedding/rotate.cuh"

namespace kestrel::cuda {
namespace {

constexpr int kThreads = 128;
// Blocks on an SM that registers leave room for. ptxas would aim at 16 and, to save registers, issue the loads one
// after the other.
constexpr int kBlocks = 8;

template <class T>
struct VectorArgs {
  T* query;
  T* key;
  int64_t query_token, query_head, key_token, key_head;  // strides
  FastIndices positions;
  Table<float> cos_sin;
  Divider<uint32_t> pieces_per_token, pieces_per_head;
  uint32_t query_heads, half, pieces;
};

template <class T, bool kNeighbours>
__global__ void __launch_bounds__(kThreads, kBlocks)
    rotary_embedding_kernel(const __grid_constant__ VectorArgs<T> args) {
  constexpr int kVec = kVec16<T>;
  const uint32_t index = blockIdx.x * kThreads + threadIdx.x;
  uint32_t token, rest, head, piece;
  args.pieces_per_token(index, &token, &rest);
  args.pieces_per_head(rest, &head, &piece);
  T* x = head < args.query_heads ? args.query + token * args.query_token + head * args.query_head
                                 : args.key + token * args.key_token + (head - args.query_heads) * args.key_head;
  x += (kNeighbours ? 2 * kVec : kVec) * piece;
  T* partner = x + (kNeighbours ? kVec : args.half);
  const uint32_t* position_at = args.positions.address(token);
  compute_now(x);
  compute_now(partner);
  compute_now(position_at);
  wait_for_predecessor();
  release_successor();
  if (index >= args.pieces) return;
  auto first = load<kVec>(x), second = load<kVec>(partner);
  const IndexWords position = args.positions.at(position_at);
  const float* row = args.cos_sin.row(position) + kVec * piece;
  float cosines[kVec], sines[kVec];
  load_floats(row, cosines);
  load_floats(row + args.half, sines);
  rotate_piece<kNeighbours>(first, second, cosines, sines);
  compute_now(first);  // else the loads would move behind the return
  compute_now(second);
  if (!args.cos_sin.holds(position)) return;
  store(x, first);
  store(partner, second);
}

template <class T>
struct PairArgs {
  T* x;
  Rows tokens, position_rows;
  int64_t head_stride, heads, half;
  DeviceIndices positions;
  Table<float> cos_sin;
  bool neighbours;
};

template <class T>
__global__ void __launch_bounds__(kThreads) rotary_embedding_pair_kernel(const __grid_constant__ PairArgs<T> args) {
  wait_for_predecessor();
  release_successor();
  const int64_t index = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  const int64_t pair = index % args.half, head = index / args.half % args.heads;
  const int64_t token = index / args.half / args.heads;
  if (token >= args.tokens.count) return;
  const int64_t position = args.positions.at(args.position_rows.offset(token));
  if (!args.cos_sin.holds(position)) return;
  T* x = args.x + args.tokens.offset(token) + head * args.head_stride + (args.neighbours ? 2 * pair : pair);
  T* partner = x + (args.neighbours ? 1 : args.half);
  const float* row = args.cos_sin.row(position) + pair;
  float a = to_float(*x), b = to_float(*partner);
  rotate_pair(a, b, row[0], row[args.half]);
  *x = from_float<T>(a);
  *partner = from_float<T>(b);
}

template <class T>
void run_pairs(Stream stream, const RotaryArgs& a, const Tensor& x) {
  const PairArgs<T> args{x.ptr<T>(),
                         token_rows(x, 2),
                         token_rows(a.positions, 0),
                         x.stride[x.rank - 2],
                         x.size(-2),
                         a.cos_sin_cache.shape[1] / 2,
                         DeviceIndices(a.positions),
                         Table<float>(a.cos_sin_cache),
                         a.interleaved};
  const int64_t pairs = args.tokens.count * args.heads * args.half;
  if (pairs > 0) launch<rotary_embedding_pair_kernel<T>>(stream, {ceil_div(pairs, kThreads), kThreads}, args);
}

template <class T>
void choose(Stream stream, const RotaryArgs& a) {
  constexpr int kVec = kVec16<T>;
  const int64_t width = a.cos_sin_cache.shape[1];
  const Rows positions = token_rows(a.positions, 0);
  const Table<float> table(a.cos_sin_cache);
  bool fit = width % (2 * kVec) == 0 && table.fits() && positions.uniform() && aligned_to(table.data, 16) &&
             table.stride % 4 == 0;
  int64_t heads = 0;
  for (const Tensor* x : {&a.query, a.key ? &*a.key : nullptr}) {
    if (!x) continue;
    const Rows rows = token_rows(*x, 2);
    fit = fit && rows.uniform() && vectors_fit<T, kVec>(*x, rows) && x->stride[x->rank - 2] % kVec == 0;
    heads += x->size(-2);
  }
  const int64_t per_head = width / (2 * kVec), pieces = positions.count * heads * per_head;
  if (!fit || !fits_32_bits(pieces + kThreads)) {
    run_pairs<T>(stream, a, a.query);
    if (a.key) run_pairs<T>(stream, a, *a.key);
    return;
  }
  if (pieces == 0) return;
  const Tensor& key = a.key ? *a.key : a.query;
  const VectorArgs<T> args{a.query.ptr<T>(),
                           key.ptr<T>(),
                           token_rows(a.query, 2).inner_stride,
                           a.query.stride[a.query.rank - 2],
                           token_rows(key, 2).inner_stride,
                           key.stride[key.rank - 2],
                           FastIndices(a.positions, positions.inner_stride),
                           table,
                           Divider<uint32_t>(heads * per_head),
                           Divider<uint32_t>(per_head),
                           static_cast<uint32_t>(a.query.size(-2)),
                           static_cast<uint32_t>(width / 2),
                           static_cast<uint32_t>(pieces)};
  const LaunchShape shape{ceil_div(pieces, kThreads), kThreads};
  a.interleaved ? launch<rotary_embedding_kernel<T, true>>(stream, shape, args)
                : launch<rotary_embedding_kernel<T, false>>(stream, shape, args);
}

}  // namespace

void rotary_embedding(Stream stream, const RotaryArgs& args) {
  if (args.cos_sin_cache.empty()) return;  // no position lies in it
  dispatch<bf16, f16, float>(args.query.dtype, [&]<class T>() { choose<T>(stream, args); });
}

}  // namespace kestrel::cuda
