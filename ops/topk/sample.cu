// One block per row: its k best (select.cuh), then the draw of topk.h, to the bit: a thread for each weight, one thread
// for the sums, which add up in order. Reading the row bounds it, from L2 what it reads twice.
#include "kestrel/hopper/pdl.cuh"
#include "kestrel/hopper/value.cuh"
#include "kestrel/launch.h"
#include "ops/topk/draw.h"
#include "ops/topk/select.cuh"

namespace kestrel::cuda {
namespace {

template <class T>
struct Args {
  int32_t* ids;
  const T* logits;
  Rows rows;
  uint32_t width;
  int k;
  DeviceValue<float> temperature;
  DeviceValue<int64_t> seed, offset;
};

// draw.h's exp_weight, each operation rounded by itself.
__device__ __forceinline__ float rounded_exp_weight(float x) {
  const float clamped = x < -87.0f ? -87.0f : x;
  const float shifted = __fadd_rn(__fmul_rn(clamped, 1.44269504f), 12582912.0f);
  const float n = __fsub_rn(shifted, 12582912.0f);
  const float r = __fadd_rn(__fsub_rn(clamped, __fmul_rn(n, 0.693359375f)), __fmul_rn(n, 2.12194440e-4f));
  float p = 0.00139506021f;
  p = __fadd_rn(__fmul_rn(p, r), 0.00836895313f);
  p = __fadd_rn(__fmul_rn(p, r), 0.0416662060f);
  p = __fadd_rn(__fmul_rn(p, r), 0.166665182f);
  p = __fadd_rn(__fmul_rn(p, r), 0.5f);
  p = __fadd_rn(__fadd_rn(__fmul_rn(__fmul_rn(p, r), r), r), 1.0f);
  const uint32_t exponent = __float_as_uint(shifted) - 0x4b400000u;
  const float result = __fmul_rn(p, __uint_as_float((exponent + 127) << 23));
  return x < -87.0f ? 0.0f : result;
}

template <class T, class Key, int kVec>
__global__ void __launch_bounds__(kSelectThreads) sample_top_k_kernel(const __grid_constant__ Args<T> args) {
  __shared__ SelectShared<Key> shared;
  __shared__ float weights[kMaxChosen], sums[kMaxChosen];
  __shared__ int first;
  wait_for_predecessor();
  release_successor();
  const int64_t row = blockIdx.x;
  const float temperature = args.temperature.at(0);
  const int k = temperature > 0.0f ? args.k : 1;
  select_best<false>(RowKeys<Key, kVec, T>{args.logits + args.rows.offset(row), args.width}, k, shared);
  const int i = threadIdx.x;
  if (k == 1) {
    if (i == 0) args.ids[row] = static_cast<int32_t>(index_of(shared.best[0]));
    return;
  }
  if (i < k) {
    const float highest = score_of_rank<T>(rank_of(shared.best[0])), mine = score_of_rank<T>(rank_of(shared.best[i]));
    weights[i] = rounded_exp_weight(__fdiv_rn(__fsub_rn(mine, highest), temperature));
  }
  __syncthreads();
  if (i == 0) {
    float sum = 0;
#pragma unroll 8
    for (int j = 0; j < k; ++j) sums[j] = sum = __fadd_rn(sum, weights[j]);
    first = k;
  }
  __syncthreads();
  if (i < k) {
    const float u = uniform(args.seed.at(0), args.offset.at(0), row);
    if (sums[i] > __fmul_rn(u, sums[k - 1])) atomicMin(&first, i);
  }
  __syncthreads();
  if (i == 0) args.ids[row] = static_cast<int32_t>(index_of(shared.best[first < k ? first : 0]));
}

template <class T>
void choose(Stream stream, const SampleArgs& a) {
  const Args<T> args{a.ids.ptr<int32_t>(),  a.logits.ptr<T>(), a.logits_rows, static_cast<uint32_t>(a.width),
                     static_cast<int>(a.k), a.temperature,     a.seed,        a.offset};
  choose_keys<T>(a.logits, a.logits_rows, a.width, [&]<class Key, int kVec>() {
    launch<sample_top_k_kernel<T, Key, kVec>>(stream, {a.logits_rows.count, select_threads(a.width)}, args);
  });
}

}  // namespace

void sample_top_k(Stream stream, const SampleArgs& args) {
  dispatch<bf16, f16, float>(args.logits.dtype, [&]<class T>() { choose<T>(stream, args); });
}

}  // namespace kestrel::cuda
