// A warp takes heads of one token, queries or values (heads.cuh), a lane the same 16-byte vector of several, in place;
// each lane works out the factor of one head and tells it to the others. Other layouts go element by element. Bound by
// memory, 4 bytes an element; small calls by the chain position -> tau: all other loads are on their way before the
// position is known, and positions are asked for before the wait (a token of 6144: 1.06 us, 1.35 without).
#include "kestrel/hopper/heads.cuh"
#include "kestrel/hopper/index.cuh"
#include "kestrel/hopper/pdl.cuh"
#include "kestrel/launch.h"
#include "ops/tau_tail/args.h"
#include "ops/tau_tail/factor.cuh"

namespace kestrel::cuda {
namespace {

constexpr int kManyLoads = 2;  // 740 x 6144: 4.8 us; one 4.8 but 4.2 instead of 3.2 from L2, four 5.2
constexpr int kThreads = 128;
constexpr int kBlocks = 8;  // on an SM: left to itself ptxas would save registers and put loads off

template <class T, class Tau>
struct VectorArgs {
  HeadSide<T> sides[2];  // queries, values
  FastIndices positions;
  Table<Tau> tau;
  const T* tok;
  int64_t tok_token;  // stride
};

template <class T, class Tau, int kLoads>
__global__ void __launch_bounds__(kHeadThreads, kBlocks)
    tau_tail_kernel(const __grid_constant__ VectorArgs<T, Tau> args) {
  constexpr int kVec = kVec16<T>;
  const bool is_value = blockIdx.x >= args.sides[1].first_block;
  const HeadSide<T>& side = args.sides[is_value];
  const HeadLane<kLoads> lane(side);
  T* x = side.x + lane.token * side.token + lane.first_head * side.head + lane.vector * kVec;
  const int64_t step = side.heads_per_load * side.head;
  const uint32_t own = lane.own_head();
  const T* tok_at = args.tok + lane.token * args.tok_token + (is_value ? side.heads + own : own);
  const Tau* table = args.tau.data + own;
  const uint32_t* position_at = args.positions.address(lane.token);
  compute_now(x);
  compute_now(tok_at);
  compute_now(table);
  compute_now(position_at);
  prefetch(lane.any ? position_at : args.positions.data);
  prefetch(lane.any ? tok_at : args.tok);
#pragma unroll
  for (int i = 0; i < kLoads; ++i) prefetch_line(lane.any && lane.inside(i) ? x + i * step : side.x);
  wait_for_predecessor();
  release_successor();
  if (!lane.any) return;
  const IndexWords position = args.positions.at(position_at);
  const T tok = *tok_at;
  Vec<T, kVec> v[kLoads] = {};
#pragma unroll
  for (int i = 0; i < kLoads; ++i)
    if (lane.inside(i)) v[i] = load<kVec>(x + i * step);
  __syncwarp();  // else the loads would move behind the return
  if (!args.tau.holds(position)) return;
  const Tau tau = *args.tau.row(table, position);
  const float factor = tau_factor(to_float(tok), to_float(tau));
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    v[i] = scaled<T>(v[i], lane.of_head(i, factor));
    if (lane.inside(i)) store(x + i * step, v[i]);
  }
}

template <class T, class Tau>
struct ElementArgs {
  T* qkv;
  const T* tok;
  Rows qkv_rows, tok_rows, position_rows;
  DeviceIndices positions;
  Table<Tau> tau;
  int64_t heads, head_size;
};

template <class T, class Tau>
__global__ void __launch_bounds__(kThreads) tau_tail_element_kernel(const __grid_constant__ ElementArgs<T, Tau> args) {
  wait_for_predecessor();
  release_successor();
  const int64_t index = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  const int64_t column = index % args.head_size, head = index / args.head_size % (2 * args.heads);
  const int64_t token = index / args.head_size / (2 * args.heads);
  if (token >= args.qkv_rows.count) return;
  const int64_t position = args.positions.at(args.position_rows.offset(token));
  if (!args.tau.holds(position)) return;
  const bool is_value = head >= args.heads;
  T* x = args.qkv + args.qkv_rows.offset(token) + (is_value ? head + args.heads : head) * args.head_size + column;
  const Tau tau = args.tau.row(position)[is_value ? head - args.heads : head];
  const float factor = tau_factor(to_float(args.tok[args.tok_rows.offset(token) + head]), to_float(tau));
  *x = from_float<T>(__fmul_rn(to_float(*x), factor));
}

// [tokens..., heads, head_size] out of the tokens' queries, keys and values.
Tensor heads_of(const TauTailArgs& a, int64_t first_head, int64_t element_size) {
  Tensor t = a.qkv_out;
  t.data = static_cast<char*>(t.data) + first_head * a.head_size * element_size;
  t.rank += 1;
  t.shape[t.rank - 2] = a.heads;
  t.stride[t.rank - 2] = t.shape[t.rank - 1] = a.head_size;
  t.stride[t.rank - 1] = 1;
  return t;
}

template <class T, class Tau, int kLoads>
void run_vectors(Stream stream, const TauTailArgs& a, const Tensor& queries, const Tensor& values) {
  const int64_t vectors = a.head_size / kVec16<T>;
  int64_t blocks = 0;
  const HeadSide<T> query(queries, vectors, kLoads, &blocks), value(values, vectors, kLoads, &blocks);
  const VectorArgs<T, Tau> args{{query, value},
                                FastIndices(a.position_ids, token_rows(a.position_ids, 0).inner_stride),
                                Table<Tau>(a.tau_pos_table),
                                a.tok_qv_lin.ptr<T>(),
                                token_rows(a.tok_qv_lin, 1).inner_stride};
  if (blocks > 0) launch<tau_tail_kernel<T, Tau, kLoads>>(stream, {blocks, kHeadThreads}, args);
}

template <class T, class Tau>
void choose(Stream stream, const TauTailArgs& a) {
  constexpr int kVec = kVec16<T>;
  const Rows rows = token_rows(a.qkv_out, 1), tok_rows = token_rows(a.tok_qv_lin, 1),
             positions = token_rows(a.position_ids, 0);
  const int64_t elements = rows.count * 2 * a.heads * a.head_size, vectors = a.head_size / kVec;
  const Tensor queries = heads_of(a, 0, sizeof(T)), values = heads_of(a, 2 * a.heads, sizeof(T));
  if (a.head_size % kVec == 0 && HeadSide<T>::fits(queries, vectors) && tok_rows.uniform() && positions.uniform() &&
      Table<Tau>(a.tau_pos_table).fits()) {
    many_heads(kManyLoads, vectors, elements / kVec) ? run_vectors<T, Tau, kManyLoads>(stream, a, queries, values)
                                                     : run_vectors<T, Tau, 1>(stream, a, queries, values);
  } else {
    const ElementArgs<T, Tau> args{a.qkv_out.ptr<T>(),
                                   a.tok_qv_lin.ptr<T>(),
                                   rows,
                                   tok_rows,
                                   positions,
                                   DeviceIndices(a.position_ids),
                                   Table<Tau>(a.tau_pos_table),
                                   a.heads,
                                   a.head_size};
    launch<tau_tail_element_kernel<T, Tau>>(stream, {ceil_div(elements, kThreads), kThreads}, args);
  }
}

}  // namespace

void tau_tail(Stream stream, const TauTailArgs& args) {
  dispatch<bf16, f16>(args.qkv_out.dtype, [&]<class T>() {
    args.tau_pos_table.dtype == DType::kF32 ? choose<T, float>(stream, args) : choose<T, T>(stream, args);
  });
}

}  // namespace kestrel::cuda
