// The plain kernel: right for every problem of the contract, with fp32 FMAs instead of tensor cores. A block is one
// query row of one query head. Its warps take chunks of the row's visible keys in turn; in a warp, kLanes lanes hold a
// key, 8 elements each, so that a warp works on 32 / kLanes keys at a time. Each such group of lanes keeps an online
// softmax of its own (Milakov & Gimelshein 2018), and the groups, then the warps, are joined once, at the end.
// Which lane sees which key follows from the row's interval and D alone: a row's bits depend on nothing else.
// Bound by the latency of page table, keys and values for one query; by the FMAs and conversions for many.
#include <algorithm>
#include <limits>

#include "kestrel/hopper/divide.cuh"
#include "kestrel/hopper/numeric.cuh"
#include "kestrel/hopper/pdl.cuh"
#include "kestrel/hopper/vec.cuh"
#include "kestrel/hopper/warp.cuh"
#include "kestrel/launch.h"
#include "ops/attention/device.cuh"
#include "ops/attention/problem.h"

namespace kestrel::cuda {
namespace {

constexpr int kWarps = 16;
constexpr int kThreads = kWarps * kWarp;
constexpr int kPart = 8;   // elements of a row that a lane holds
constexpr int kSteps = 4;  // keys of a group in a chunk: so many loads are on their way at once
constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <class Index>
struct Args {
  AttentionProblem problem;
  Divider<Index> by_q_heads, by_q_len, by_group, by_page_size;
  int64_t first;  // (row, head) of block 0
};

// What a set of keys gives: out = sum of exp(score - top) v, not yet divided by sum.
struct Partial {
  float top = -kInfinity, sum = 0.0f;
  float out[kPart] = {};
};

__device__ __forceinline__ float base_of(float top) { return top == -kInfinity ? 0.0f : top; }  // -inf - -inf is NaN
__device__ __forceinline__ float exp_of(float difference) { return fast_exp2(difference * 1.44269504f); }

// The `count` elements at p, zeros after them; not looked at where there are none.
template <int kVec, class T>
__device__ __forceinline__ Vec<T, kPart> load_part(const T* p, int count) {
  Vec<T, kPart> part{};
  if constexpr (kVec == kPart) {
    if (count > 0) part = load<kPart>(p);
  } else {
    constexpr int kPerWord = 4 / sizeof(T);
#pragma unroll
    for (int i = 0; i < kPart; ++i)
      if (i < count) part.words[i / kPerWord] |= uint32_t{p[i].bits} << i % kPerWord * (8 * sizeof(T));
  }
  return part;
}

// The sequence that packed row `row` belongs to, or -1: the last that begins at or before it. The whole warp looks, at
// 32 places at a time.
__device__ __forceinline__ int64_t find_sequence(const AttentionProblem& p, int64_t row) {
  int64_t first = 0, count = p.batch;
  while (count > 1) {
    const int64_t step = (count + kWarp - 1) / kWarp, place = threadIdx.x % kWarp * step;
    const unsigned begun = __ballot_sync(~0u, place < count && p.cu_seqlens_q[first + place] <= row);
    if (!begun) return -1;
    const int64_t passed = (31 - __clz(static_cast<int>(begun))) * step;
    first += passed;
    count = min(step, count - passed);
  }
  return count == 1 && p.cu_seqlens_q[first] <= row && row < p.cu_seqlens_q[first + 1] ? first : -1;
}

// Lengths come from device memory: whatever stands there, the keys lie within the tensors.
__device__ __forceinline__ Sequence checked_sequence(const AttentionProblem& p, int64_t b) {
  Sequence s = sequence_of(p, b);
  int64_t end = p.k_len;
  if (p.cu_seqlens_k) end = min(end, int64_t{p.cu_seqlens_k[b + 1]});
  s.k_first = max(s.k_first, int64_t{0});
  s.k_len = max(min(s.k_len, end - s.k_first), int64_t{0});
  return s;
}

template <class Q, class KV, int kLanes, int kVec, class Index>
__global__ void __launch_bounds__(kThreads) attention_kernel(const __grid_constant__ Args<Index> args) {
  constexpr int kKeys = kWarp / kLanes;  // of a warp at a time
  constexpr int kChunk = kSteps * kKeys;
  __shared__ float tops[kWarps], sums[kWarps], outs[kWarps][kLanes * kPart];
  const AttentionProblem& p = args.problem;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int column = lane % kLanes * kPart;
  const int count = max(min(static_cast<int>(p.head_size) - column, kPart), 0);
  wait_for_predecessor();
  release_successor();

  Index row, head, b, query;
  args.by_q_heads(static_cast<Index>(args.first + blockIdx.x), &row, &head);
  if (p.cu_seqlens_q) {
    const int64_t found = find_sequence(p, row);
    if (found < 0) return;  // the whole block
    b = static_cast<Index>(found);
    query = static_cast<Index>(row - p.cu_seqlens_q[b]);
  } else {
    args.by_q_len(row, &b, &query);
  }
  const Sequence s = checked_sequence(p, b);
  const int64_t q_token = p.cu_seqlens_q ? int64_t{row} : int64_t{query};
  Index k_head, member;
  args.by_group(head, &k_head, &member);
  const KeyRange range = visible_keys(p, s, query);
  const Q* q_row = static_cast<const Q*>(p.q) + p.q_stride.at(s.q_batch, q_token, head) + column;
  const KV* k_base = static_cast<const KV*>(p.k) + column;
  const KV* v_base = static_cast<const KV*>(p.v) + column;
  const int32_t* table = p.page_table ? p.page_table + s.k_batch * p.page_table_stride : nullptr;
  const float scale = p.softmax_scale * (p.k_scale_at ? *p.k_scale_at : p.k_scale);

  float q[kPart];
  to_floats(load_part<kVec>(q_row, count), q);
  Partial mine;
  for (int64_t chunk = range.first + warp * kChunk; chunk < range.last; chunk += kWarps * kChunk) {
    // Keys past the end, and those of a page that is none, are never loaded: what lies there may be NaN.
    int64_t pages[kSteps], slots[kSteps];
    bool seen[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int64_t key = chunk + step * kKeys + lane / kLanes;
      seen[step] = key < range.last;
      pages[step] = s.k_batch;
      slots[step] = s.k_first + key;
      if (table) {
        Index entry, slot;
        args.by_page_size(static_cast<Index>(key), &entry, &slot);
        pages[step] = seen[step] ? table[entry] : -1;
        slots[step] = slot;
        seen[step] = pages[step] >= 0 && pages[step] < p.pages;
      }
    }
    Vec<KV, kPart> k[kSteps], v[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      k[step] = load_part<kVec>(k_base + p.k_stride.at(pages[step], slots[step], k_head), seen[step] ? count : 0);
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      v[step] = load_part<kVec>(v_base + p.v_stride.at(pages[step], slots[step], k_head), seen[step] ? count : 0);

    float scores[kSteps], values[kPart];
    float top = mine.top;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      to_floats(k[step], values);
      float score = 0.0f;
#pragma unroll
      for (int i = 0; i < kPart; ++i) score = fmaf(q[i], values[i], score);
#pragma unroll
      for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) score += shuffle_xor(score, lanes);
      score *= scale;
      if (p.softcap > 0.0f) score = p.softcap * tanhf(score / p.softcap);
      scores[step] = seen[step] ? score : -kInfinity;
      top = fmaxf(top, scores[step]);
    }
    const float base = base_of(top), shrink = exp_of(mine.top - base);
    mine.top = top;
    mine.sum *= shrink;
#pragma unroll
    for (int i = 0; i < kPart; ++i) mine.out[i] *= shrink;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const float weight = exp_of(scores[step] - base);
      mine.sum += weight;
      to_floats(v[step], values);
#pragma unroll
      for (int i = 0; i < kPart; ++i) mine.out[i] = fmaf(weight, values[i], mine.out[i]);
    }
  }

  // The groups of the warp, pairwise; then, in their order, the warps that had keys.
#pragma unroll
  for (int lanes = kLanes; lanes < kWarp; lanes *= 2) {
    const float their_top = shuffle_xor(mine.top, lanes), top = fmaxf(mine.top, their_top), base = base_of(top);
    const float shrink = exp_of(mine.top - base), their_shrink = exp_of(their_top - base);
    mine.top = top;
    mine.sum = mine.sum * shrink + shuffle_xor(mine.sum, lanes) * their_shrink;
#pragma unroll
    for (int i = 0; i < kPart; ++i) mine.out[i] = mine.out[i] * shrink + shuffle_xor(mine.out[i], lanes) * their_shrink;
  }
  if (lane < kLanes) {
    if (lane == 0) {
      tops[warp] = mine.top;
      sums[warp] = mine.sum;
    }
#pragma unroll
    for (int i = 0; i < kPart; ++i) outs[warp][column + i] = mine.out[i];
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) >= p.head_size) return;
  const int busy = static_cast<int>(min((range.last - range.first + kChunk - 1) / kChunk, int64_t{kWarps}));
  const float sink = p.sink ? sink_of(p, head) : -kInfinity;
  float top = sink, sum = 0.0f, out = 0.0f;
  for (int w = 0; w < busy; ++w) top = fmaxf(top, tops[w]);
  const float base = base_of(top);
  if (p.sink) sum = exp_of(sink - base);
  for (int w = 0; w < busy; ++w) {
    const float shrink = exp_of(tops[w] - base);
    sum = fmaf(sums[w], shrink, sum);
    out = fmaf(outs[w][threadIdx.x], shrink, out);
  }
  const float v_scale = p.v_scale_at ? *p.v_scale_at : p.v_scale;
  Q* out_row = static_cast<Q*>(p.out) + p.out_stride.at(s.q_batch, q_token, head);
  out_row[threadIdx.x] = from_float<Q>(sum == 0.0f ? 0.0f : out * (v_scale / sum));
  if (p.lse && threadIdx.x == 0)
    p.lse[p.lse_stride.at(s.q_batch, q_token, head)] = sum == 0.0f ? -kInfinity : base + logf(sum);
}

template <class Q, class KV, int kLanes, int kVec>
void run(Stream stream, const AttentionProblem& p) {
  // The kernel for odd layouts serves the sizes past 32 bits too.
  using Index = std::conditional_t<kVec == 1, int64_t, uint32_t>;
  constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;
  const int64_t count = (p.cu_seqlens_q ? 1 : p.batch) * p.q_len * p.q_heads;
  Args<Index> args{p,
                   Divider<Index>(p.q_heads),
                   Divider<Index>(p.q_len),
                   Divider<Index>(p.q_heads / p.k_heads),
                   Divider<Index>(std::max<int64_t>(p.page_size, 1)),
                   0};
  for (; args.first < count; args.first += kMostBlocks)
    launch<attention_kernel<Q, KV, kLanes, kVec, Index>>(stream, {std::min(count - args.first, kMostBlocks), kThreads},
                                                         args);
}

bool vectors_fit(const void* data, const AttentionStrides& stride, DType dtype) {
  return aligned_to(data, kPart * size_of(dtype)) && stride.batch % kPart == 0 && stride.token % kPart == 0 &&
         stride.head % kPart == 0;
}

template <class Q, class KV, int kLanes>
void choose(Stream stream, const AttentionProblem& p) {
  const int64_t rows = (p.cu_seqlens_q ? 1 : p.batch) * p.q_len;
  constexpr int64_t kMargin = kWarps * kWarp * kSteps;  // chunks run past the last key
  const bool small = fits_32_bits(rows * p.q_heads) && fits_32_bits(p.batch) && fits_32_bits(p.k_len + kMargin) &&
                     fits_32_bits(p.page_size);
  if (small && p.head_size % kPart == 0 && vectors_fit(p.q, p.q_stride, p.q_dtype) &&
      vectors_fit(p.k, p.k_stride, p.kv_dtype) && vectors_fit(p.v, p.v_stride, p.kv_dtype))
    return run<Q, KV, kLanes, kPart>(stream, p);
  run<Q, KV, kLanes, 1>(stream, p);
}

}  // namespace

void attention(Stream stream, const AttentionProblem& p) {
  dispatch<bf16, f16>(p.q_dtype, [&]<class Q>() {
    dispatch<Q, e4m3>(p.kv_dtype, [&]<class KV>() {
      if (p.head_size <= 64) return choose<Q, KV, 8>(stream, p);
      if (p.head_size <= 128) return choose<Q, KV, 16>(stream, p);
      choose<Q, KV, 32>(stream, p);
    });
  });
}

}  // namespace kestrel::cuda
