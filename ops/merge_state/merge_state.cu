// A row of D elements belongs to a power of two of a warp's lanes, one vector of 16 bytes each (a loop for what is
// longer): its two lse are read by all of them before one of them writes, where lse may be lse_a. Layouts that vectors
// do not fit go element by element, a warp per row. Bound by memory: 3 elements moved for each one written.
#include <cmath>

#include "kestrel/hopper/divide.cuh"
#include "kestrel/hopper/pdl.cuh"
#include "kestrel/hopper/vec.cuh"
#include "kestrel/hopper/warp.cuh"
#include "kestrel/launch.h"
#include "ops/merge_state/states.h"

namespace kestrel::cuda {
namespace {

constexpr int kThreads = 256;

template <class Index>
struct Args {
  State out, out_a, out_b;
  State lse, lse_a, lse_b;
  Divider<Index> heads, tokens;
  Index rows, vectors;  // in all; of a row
  int log_lanes;        // of a row
};

template <class T, int kVec, class Index>
__global__ void __launch_bounds__(kThreads) merge_state_kernel(const __grid_constant__ Args<Index> args) {
  const Index thread = Index{blockIdx.x} * kThreads + threadIdx.x;
  const Index row = thread >> args.log_lanes;
  const int lanes = 1 << args.log_lanes, lane = threadIdx.x & (lanes - 1);
  Index h, t, b, token;
  args.heads(row, &token, &h);
  args.tokens(token, &b, &t);
  const auto start = [&](const State& s) { return static_cast<T*>(s.data) + s.at(b, t, h) + lane * kVec; };
  const auto logarithm = [&](const State& s) { return static_cast<float*>(s.data) + s.at(b, t, h); };
  const T* of_a = start(args.out_a);
  const T* of_b = start(args.out_b);
  T* out = start(args.out);
  const float* at_a = logarithm(args.lse_a);
  const float* at_b = logarithm(args.lse_b);
  float* lse = logarithm(args.lse);
  compute_now(of_a);
  compute_now(of_b);
  compute_now(at_a);
  compute_now(at_b);
  wait_for_predecessor();
  release_successor();
  const bool inside = row < args.rows;
  Index vector = lane;
  Vec<T, kVec> packed_a{}, packed_b{};
  float a_lse = 0, b_lse = 0;
  if (inside) {
    a_lse = *at_a;
    b_lse = *at_b;
    if (vector < args.vectors) {
      packed_a = load<kVec>(of_a);
      packed_b = load<kVec>(of_b);
    }
  }
  __syncwarp();  // every lane of the row has its two lse: one of them may be written now
  if (!inside) return;

  const bool no_a = a_lse == -INFINITY, no_b = b_lse == -INFINITY;
  const float top = no_a && no_b ? 0.0f : fmaxf(a_lse, b_lse);
  const float a_weight = fast_exp2((a_lse - top) * 1.44269504f), b_weight = fast_exp2((b_lse - top) * 1.44269504f);
  const float sum = a_weight + b_weight, reciprocal = 1.0f / sum;
  for (; vector < args.vectors; vector += lanes) {
    Vec<T, kVec> merged;
    if (no_a || no_b) {  // what a part without keys holds is not looked at: 0 * NaN would be NaN
#pragma unroll
      for (int w = 0; w < Vec<T, kVec>::kWords; ++w)
        merged.words[w] = !no_b ? packed_b.words[w] : !no_a ? packed_a.words[w] : 0;
    } else {
      float a[kVec], of_other[kVec];
      to_floats(packed_a, a);
      to_floats(packed_b, of_other);
#pragma unroll
      for (int i = 0; i < kVec; ++i) a[i] = fmaf(a_weight * reciprocal, a[i], b_weight * reciprocal * of_other[i]);
      merged = from_floats<T>(a);
    }
    store(out, merged);
    of_a += lanes * kVec;
    of_b += lanes * kVec;
    out += lanes * kVec;
    if (vector + lanes < args.vectors) {
      packed_a = load<kVec>(of_a);
      packed_b = load<kVec>(of_b);
    }
  }
  if (lane == 0) *lse = no_a ? b_lse : no_b ? a_lse : top + logf(sum);
}

template <class T, int kVec, class Index>
void run(Stream stream, const MergeStateArgs& a) {
  const int64_t vectors = a.width / kVec;
  int log = 0;
  while (log < 5 && int64_t{1} << log < vectors) ++log;
  const int64_t rows = a.batch * a.tokens * a.heads;
  const Args<Index> args{a.out,
                         a.out_a,
                         a.out_b,
                         a.lse,
                         a.lse_a,
                         a.lse_b,
                         Divider<Index>(a.heads),
                         Divider<Index>(a.tokens),
                         static_cast<Index>(rows),
                         static_cast<Index>(vectors),
                         log};
  launch<merge_state_kernel<T, kVec, Index>>(stream, {ceil_div(rows << log, kThreads), kThreads}, args);
}

template <int kVec>
bool vectors_fit(const State& s, int64_t element) {
  return aligned_to(s.data, kVec * element) && s.batch % kVec == 0 && s.token % kVec == 0 && s.head % kVec == 0;
}

}  // namespace

void merge_state(Stream stream, const MergeStateArgs& args) {
  dispatch<bf16, f16, float>(args.dtype, [&]<class T>() {
    constexpr int kVec = kVec16<T>;
    const bool fit = args.width % kVec == 0 && vectors_fit<kVec>(args.out, sizeof(T)) &&
                     vectors_fit<kVec>(args.out_a, sizeof(T)) && vectors_fit<kVec>(args.out_b, sizeof(T));
    // As many threads as the largest row takes lanes, so that a thread's number fits too.
    if (fit && fits_32_bits(args.batch * args.tokens * args.heads * kWarp + kThreads))
      run<T, kVec, uint32_t>(stream, args);
    else
      run<T, 1, int64_t>(stream, args);
  });
}

}  // namespace kestrel::cuda
