// A warp takes heads of one token (heads.cuh), a lane the same 16-byte vector of several, in place: adjacent lanes read
// adjacent bytes and give each other the other half of a pair. Queries and keys are two ranges of blocks. Other layouts
// and widths go pair by pair. Elements past R are not touched. Bound by memory, 2 R elements moved a head; small calls
// by the chain position -> row of the table -> rotation: the vectors are on their way before the position is known, and
// positions are asked for before the wait (a token of 32 x 64: 1.04 us, 1.30 without).
#include "kestrel/hopper/heads.cuh"
#include "kestrel/hopper/index.cuh"
#include "kestrel/hopper/pdl.cuh"
#include "kestrel/launch.h"
#include "ops/rotary_embedding/args.h"
#include "ops/rotary_embedding/rotate.cuh"

namespace kestrel::cuda {
namespace {

constexpr int kManyLoads = 4;  // 740 x 32 x 64: 3.1 us; two 3.4
constexpr int kThreads = 128;
// Blocks on an SM that registers leave room for. ptxas would aim at 16 and, to save registers, issue the loads one
// after the other.
template <int kLoads>
constexpr int kBlocks = kLoads == 1 ? 8 : 6;

template <class T>
struct VectorArgs {
  HeadSide<T> sides[2];  // query, key
  FastIndices positions;
  Table<float> cos_sin;
  uint32_t half;
};

template <class T, bool kNeighbours, int kLoads>
__global__ void __launch_bounds__(kHeadThreads, kBlocks<kLoads>)
    rotary_embedding_kernel(const __grid_constant__ VectorArgs<T> args) {
  constexpr int kVec = kVec16<T>;
  const HeadSide<T>& side = args.sides[blockIdx.x >= args.sides[1].first_block];
  const HeadLane<kLoads> lane(side);
  T* x = side.x + lane.token * side.token + lane.first_head * side.head + lane.vector * kVec;
  const int64_t step = side.heads_per_load * side.head;
  Rotation<T, kNeighbours> rotation(lane.vector, args.half);
  const float* table = args.cos_sin.data + rotation.column;
  const uint32_t* position_at = args.positions.address(lane.token);
  compute_now(x);
  compute_now(table);
  compute_now(position_at);
  prefetch(lane.any ? position_at : args.positions.data);
  prefetch_line(lane.any ? x : side.x);
  wait_for_predecessor();
  release_successor();
  if (!lane.any) return;
  const IndexWords position = args.positions.at(position_at);
  Vec<T, kVec> v[kLoads] = {};
#pragma unroll
  for (int i = 0; i < kLoads; ++i)
    if (lane.inside(i)) v[i] = load<kVec>(x + i * step);
  __syncwarp();  // else the loads would move behind the return
  if (!args.cos_sin.holds(position)) return;
  rotation.load_row(args.cos_sin.row(table, position), args.half);
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    v[i] = rotation.turned(v[i]);
    if (lane.inside(i)) store(x + i * step, v[i]);
  }
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

template <class T, int kLoads>
void run_vectors(Stream stream, const RotaryArgs& a, int64_t vectors) {
  int64_t blocks = 0;
  VectorArgs<T> args{{HeadSide<T>(a.query, vectors, kLoads, &blocks), {}},
                     FastIndices(a.positions, token_rows(a.positions, 0).inner_stride),
                     Table<float>(a.cos_sin_cache),
                     static_cast<uint32_t>(a.cos_sin_cache.shape[1] / 2)};
  args.sides[1].first_block = static_cast<uint32_t>(blocks);
  if (a.key) args.sides[1] = HeadSide<T>(*a.key, vectors, kLoads, &blocks);
  if (blocks == 0) return;
  const LaunchShape shape{blocks, kHeadThreads};
  a.interleaved ? launch<rotary_embedding_kernel<T, true, kLoads>>(stream, shape, args)
                : launch<rotary_embedding_kernel<T, false, kLoads>>(stream, shape, args);
}

template <class T>
void choose(Stream stream, const RotaryArgs& a) {
  constexpr int kVec = kVec16<T>;
  const int64_t width = a.cos_sin_cache.shape[1], vectors = width / kVec;
  const Rows positions = token_rows(a.positions, 0);
  const Table<float> table(a.cos_sin_cache);
  if (width % (2 * kVec) != 0 || !table.fits() || !positions.uniform() || !aligned_to(table.data, 16) ||
      table.stride % 4 != 0 || !HeadSide<T>::fits(a.query, vectors) || (a.key && !HeadSide<T>::fits(*a.key, vectors))) {
    run_pairs<T>(stream, a, a.query);
    if (a.key) run_pairs<T>(stream, a, *a.key);
    return;
  }
  const int64_t heads = a.query.size(-2) + (a.key ? a.key->size(-2) : 0);
  many_heads(kManyLoads, vectors, positions.count * heads * vectors) ? run_vectors<T, kManyLoads>(stream, a, vectors)
                                                                     : run_vectors<T, 1>(stream, a, vectors);
}

}  // namespace

void rotary_embedding(Stream stream, const RotaryArgs& args) {
  if (args.cos_sin_cache.empty()) return;  // no position lies in it
  dispatch<bf16, f16, float>(args.query.dtype, [&]<class T>() { choose<T>(stream, args); });
}

}  // namespace kestrel::cuda
