// A thread scales kVectors vectors of 16 bytes of one query or value head of one token in place, kVectors-ths of the
// head apart: each thread works out the factor anew, which costs less than telling it. Other layouts go element by
// element. Bound by memory, 4 bytes an element; small calls by the chain position -> tau: all other loads are on their
// way before the position is known.
#include "kestrel/hopper/divide.cuh"
#include "kestrel/hopper/index.cuh"
#include "kestrel/hopper/pdl.cuh"
#include "kestrel/launch.h"
#include "ops/tau_tail/args.h"
#include "ops/tau_tail/factor.cuh"

namespace kestrel::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kBlocks = 8;  // on an SM: left to itself ptxas would save registers and put loads off

template <class T, class Tau>
struct VectorArgs {
  T* qkv;
  const T* tok;
  int64_t qkv_token, tok_token;  // strides
  FastIndices positions;
  Table<Tau> tau;
  Divider<uint32_t> threads_per_token, threads_per_head;
  uint32_t heads, head_size, threads;
};

template <class T, class Tau, int kVectors>
__global__ void __launch_bounds__(kThreads, kBlocks) tau_tail_kernel(const __grid_constant__ VectorArgs<T, Tau> args) {
  constexpr int kVec = kVec16<T>;
  const uint32_t index = blockIdx.x * kThreads + threadIdx.x;
  uint32_t token, rest, head, column;
  args.threads_per_token(index, &token, &rest);
  args.threads_per_head(rest, &head, &column);
  // Heads are counted over queries and values; the keys lie between.
  const bool is_value = head >= args.heads;
  const uint32_t tau_head = is_value ? head - args.heads : head, step = args.head_size / kVectors;
  T* x = args.qkv + token * args.qkv_token + uint64_t{is_value ? head + args.heads : head} * args.head_size +
         column * kVec;
  const T* tok_at = args.tok + token * args.tok_token + head;
  const uint32_t* position_at = args.positions.address(token);
  compute_now(x);
  compute_now(tok_at);
  compute_now(position_at);
  wait_for_predecessor();
  release_successor();
  if (index >= args.threads) return;
  Vec<T, kVec> v[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) v[i] = load<kVec>(x + i * step);
  const T tok = *tok_at;
  const IndexWords position = args.positions.at(position_at);
  const Tau tau = args.tau.row(position)[tau_head];
  const float factor = tau_factor(to_float(tok), to_float(tau));
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    v[i] = scale_vector(v[i], factor);
    compute_now(v[i]);  // else the loads would move behind the return
  }
  if (!args.tau.holds(position)) return;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) store(x + i * step, v[i]);
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

template <class T, class Tau, int kVectors>
void run_vectors(Stream stream, const TauTailArgs& a, const Rows& rows, int64_t threads) {
  const int64_t per_head = a.head_size / (kVectors * kVec16<T>);
  const VectorArgs<T, Tau> args{a.qkv_out.ptr<T>(),
                                a.tok_qv_lin.ptr<T>(),
                                rows.inner_stride,
                                token_rows(a.tok_qv_lin, 1).inner_stride,
                                FastIndices(a.position_ids, token_rows(a.position_ids, 0).inner_stride),
                                Table<Tau>(a.tau_pos_table),
                                Divider<uint32_t>(2 * a.heads * per_head),
                                Divider<uint32_t>(per_head),
                                static_cast<uint32_t>(a.heads),
                                static_cast<uint32_t>(a.head_size),
                                static_cast<uint32_t>(threads)};
  launch<tau_tail_kernel<T, Tau, kVectors>>(stream, {ceil_div(threads, kThreads), kThreads}, args);
}

template <class T, class Tau>
void choose(Stream stream, const TauTailArgs& a) {
  constexpr int kVec = kVec16<T>;
  const Rows rows = token_rows(a.qkv_out, 1), tok_rows = token_rows(a.tok_qv_lin, 1),
             positions = token_rows(a.position_ids, 0);
  const int64_t elements = rows.count * 2 * a.heads * a.head_size, vectors = elements / kVec;
  if (a.head_size % kVec == 0 && vectors_fit<T, kVec>(a.qkv_out, rows) && rows.uniform() && tok_rows.uniform() &&
      positions.uniform() && Table<Tau>(a.tau_pos_table).fits() && fits_32_bits(vectors + kThreads)) {
    a.head_size % (2 * kVec) == 0 ? run_vectors<T, Tau, 2>(stream, a, rows, vectors / 2)
                                  : run_vectors<T, Tau, 1>(stream, a, rows, vectors);
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
