// Up to 512 experts, k <= 32: a warp per token, the experts' score + bias in registers as keys, k rounds of a maximum
// over the warp. Groups are some lanes each: these join their two best, and every lane counts the groups better than
// its own. Scores use the CPU twin's exponential, so that both devices choose alike. Bound by latency.
// Other shapes: a block per token, which works the scores out anew on each pass (select.cuh).
#include "kestrel/hopper/pdl.cuh"
#include "ops/topk/select.cuh"
#include "ops/topk/tile.cuh"

namespace kestrel::cuda {
namespace {

using Key = uint64_t;

// exp as in kestrel/cpu/math.h.
__device__ __forceinline__ float exponential(float x) {
  x = x < -104.0f ? -104.0f : x;
  x = x > 89.0f ? 89.0f : x;
  const float shifted = fmaf(x, 1.44269504f, 12582912.0f), n = __fsub_rn(shifted, 12582912.0f);
  const float r = fmaf(n, 2.12194440e-4f, fmaf(n, -0.693359375f, x));
  float p = 0.00139506021f;
  p = fmaf(p, r, 0.00836895313f);
  p = fmaf(p, r, 0.0416662060f);
  p = fmaf(p, r, 0.166665182f);
  p = fmaf(p, r, 0.5f);
  p = __fadd_rn(fmaf(__fmul_rn(p, r), r, r), 1.0f);
  const int32_t exponent = static_cast<int32_t>(__float_as_uint(shifted) - 0x4b400000u), half = exponent >> 1;
  return __fmul_rn(__fmul_rn(p, __uint_as_float(static_cast<uint32_t>(half + 127) << 23)),
                   __uint_as_float(static_cast<uint32_t>(exponent - half + 127) << 23));
}

// A row's scoring: sigmoid, or softmax by its highest logit and the sum of the exponentials.
struct Scoring {
  bool sigmoid;
  float highest, sum;
  __device__ __forceinline__ float operator()(float x) const {
    if (sigmoid) return __frcp_rn(__fadd_rn(1.0f, exponential(-x)));
    return __fdiv_rn(exponential(x - highest), sum);
  }
};

struct Bias {
  const void* data;
  DType dtype;
  __device__ __forceinline__ float at(int64_t i) const {
    if (!data) return 0.0f;
    if (dtype == DType::kF32) return static_cast<const float*>(data)[i];
    if (dtype == DType::kF16) return to_float(static_cast<const f16*>(data)[i]);
    return to_float(static_cast<const bf16*>(data)[i]);
  }
};

__device__ __forceinline__ Key key_of(float choice, uint32_t expert) {
  return key_of_bits<Key, float>(__float_as_uint(choice), expert);
}
template <class T>
__device__ __forceinline__ uint32_t rank_of_score(T x) {
  return rank_of_bits<float>(__float_as_uint(to_float(x)));
}

// The two largest ranks of some lanes' experts.
struct TwoBest {
  uint32_t best, second;
  __device__ __forceinline__ void join(uint32_t other, uint32_t other_second) {
    second = max(min(best, other), max(second, other_second));
    best = max(best, other);
  }
  __device__ __forceinline__ void join_lane(int step) {
    join(__shfl_xor_sync(~0u, best, step), __shfl_xor_sync(~0u, second, step));
  }
  __device__ __forceinline__ uint32_t rank_of_sum() const {
    const float sum = score_of_rank<float>(best) + score_of_rank<float>(second);
    return rank_of_bits<float>(__float_as_uint(sum));
  }
};

template <class T>
struct TileArgs {
  float* weights;
  int32_t* ids;
  const T* scores;
  Bias bias;
  int64_t weights_stride, ids_stride, scores_stride, rows;
  int experts, k;
  int groups, chosen_groups, log_group_lanes;  // groups: 1 where all may be chosen
  bool sigmoid, renormalize;
  float scale;
};

template <class T, class Tile>
__global__ void __launch_bounds__(kTileThreads) topk_router_kernel(const __grid_constant__ TileArgs<T> args) {
  constexpr int kPerLane = Tile::kPerLane;
  const int lane = threadIdx.x % kWarp, first = lane * kPerLane;
  const int64_t row = blockIdx.x * int64_t{kRowsPerBlock} + threadIdx.x / kWarp;
  int64_t at = row * args.scores_stride;
  float bias[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) bias[i] = holds<Tile>(first, i, args.experts) ? args.bias.at(first + i) : 0.0f;
  compute_now(at);  // an offset: see topk.cu
  wait_for_predecessor();
  release_successor();
  if (row >= args.rows) return;  // whole warps
  uint32_t bits[kPerLane];
  const T* scores = args.scores + at;
  load_lane<Tile>(scores + first, first, args.experts, bits);
  float x[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if constexpr (dtype_of<T> == DType::kF16)
      x[i] = to_float(T{static_cast<uint16_t>(bits[i] >> 16)});
    else
      x[i] = __uint_as_float(bits[i]);
  }

  Scoring scoring{args.sigmoid, 0, 1};
  if (!args.sigmoid) {
    uint32_t highest = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i)
      if (holds<Tile>(first, i, args.experts)) highest = max(highest, rank_of_bits<float>(__float_as_uint(x[i])));
    scoring.highest = score_of_rank<float>(warp_best(highest));
    float partial[2] = {};
#pragma unroll
    for (int i = 0; i < kPerLane; ++i)
      if (holds<Tile>(first, i, args.experts)) partial[i % 2] += exponential(x[i] - scoring.highest);
    scoring.sum = warp_sum(partial[0] + partial[1]);
  }
  Key keys[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i)
    keys[i] = holds<Tile>(first, i, args.experts) ? key_of(scoring(x[i]) + bias[i], first + i) : 0;
  sort_descending(keys);

  if (args.groups > 1) {
    TwoBest two{rank_of(keys[0]), rank_of(keys[1])};
    for (int step = 1; step < 1 << args.log_group_lanes; step *= 2) two.join_lane(step);
    const uint32_t mine = two.rank_of_sum();
    const int group = lane >> args.log_group_lanes;
    int better = 0;
    for (int g = 0; g < args.groups; ++g) {
      const uint32_t other = __shfl_sync(~0u, mine, g << args.log_group_lanes);
      better += other > mine || (other == mine && g < group);
    }
    if (better >= args.chosen_groups)
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) keys[i] = 0;
  }

  Key chosen = 0;
#pragma unroll 1
  for (int j = 0; j < args.k; ++j) {
    const Key best = take_best(keys);
    if (lane == j) chosen = best;
  }
  const bool inside = lane < args.k;
  const float weight = inside ? scoring(to_float(scores[index_of(chosen)])) : 0.0f;
  const float sum = warp_sum(weight);
  if (!inside) return;
  const float divisor = args.renormalize && sum != 0.0f ? sum : 1.0f;
  args.weights[row * args.weights_stride + lane] = weight / divisor * args.scale;
  args.ids[row * args.ids_stride + lane] = static_cast<int32_t>(index_of(chosen));
}

template <class T>
struct BlockArgs {
  float* weights;
  int32_t* ids;
  const T* scores;
  Bias bias;
  Rows weights_rows, ids_rows, scores_rows;
  uint32_t experts, groups, group_size, chosen_groups;
  int k;
  bool sigmoid, renormalize;
  float scale;
};

// The keys of the experts that may be chosen. With groups, a warp takes one group after the other.
template <class T>
struct ExpertKeys {
  const BlockArgs<T>& args;
  const T* scores;
  Scoring scoring;
  Key least_group;  // the last one chosen

  __device__ __forceinline__ float choice(uint32_t expert) const {
    return scoring(to_float(scores[expert])) + args.bias.at(expert);
  }
  __device__ __forceinline__ Key group_key(uint32_t group) const {
    TwoBest two{0, 0};
    const uint32_t start = group * args.group_size;
    for (uint32_t i = threadIdx.x % kWarp; i < args.group_size; i += kWarp)
      two.join(rank_of_bits<float>(__float_as_uint(choice(start + i))), 0);
    for (int step = 1; step < kWarp; step *= 2) two.join_lane(step);
    return Key{args.group_size == 1 ? two.best : two.rank_of_sum()} << 32 | ~group;
  }
  template <class F>
  __device__ __forceinline__ void each_group(const F& f) const {
    for (uint32_t g = threadIdx.x / kWarp; g < args.groups; g += blockDim.x / kWarp) f(g, group_key(g));
  }
  template <class F>
  __device__ __forceinline__ void operator()(const F& f) const {
    if (args.groups == 1) {
      for (uint32_t i = threadIdx.x; i < args.experts; i += blockDim.x) f(key_of(choice(i), i));
      return;
    }
    each_group([&](uint32_t g, Key key) {
      if (key < least_group) return;
      for (uint32_t i = threadIdx.x % kWarp; i < args.group_size; i += kWarp) {
        const uint32_t expert = g * args.group_size + i;
        f(key_of(choice(expert), expert));
      }
      __syncwarp();
    });
  }
};

template <class T>
__global__ void __launch_bounds__(kSelectThreads) topk_router_block_kernel(const __grid_constant__ BlockArgs<T> args) {
  __shared__ SelectShared<Key> shared;
  wait_for_predecessor();
  release_successor();
  const T* scores = args.scores + args.scores_rows.offset(blockIdx.x);
  Scoring scoring{args.sigmoid, 0, 1};
  if (!args.sigmoid) {
    uint32_t highest = 0;
    for (uint32_t i = threadIdx.x; i < args.experts; i += blockDim.x) highest = max(highest, rank_of_score(scores[i]));
    scoring.highest = score_of_rank<float>(block_best(highest));
    float sum = 0;
    for (uint32_t i = threadIdx.x; i < args.experts; i += blockDim.x)
      sum += exponential(to_float(scores[i]) - scoring.highest);
    scoring.sum = block_sum(sum);
  }
  ExpertKeys<T> keys{args, scores, scoring, 0};
  if (args.groups > 1)
    keys.least_group = find_bound<Key>(args.chosen_groups, args.chosen_groups, [&](Key bound) {
      unsigned reached = 0;
      keys.each_group([&](uint32_t, Key key) { reached += threadIdx.x % kWarp == 0 && key >= bound; });
      return block_total(reached);
    });
  select_best<true>(keys, args.k, shared);
  const int i = threadIdx.x;
  const bool inside = i < args.k;
  const uint32_t id = index_of(shared.best[inside ? i : 0]);
  const float weight = inside ? scoring(to_float(scores[id])) : 0.0f;
  const float sum = block_sum(weight);
  if (!inside) return;
  const float divisor = args.renormalize && sum != 0.0f ? sum : 1.0f;
  args.weights[args.weights_rows.offset(blockIdx.x) + i] = weight / divisor * args.scale;
  args.ids[args.ids_rows.offset(blockIdx.x) + i] = static_cast<int32_t>(id);
}

int log2_of(int64_t power) {
  int log = 0;
  while (int64_t{1} << log < power) ++log;
  return log;
}

template <class T>
void choose(Stream stream, const RouterArgs& a) {
  const Bias bias{a.bias ? a.bias->data : nullptr, a.bias ? a.bias->dtype : DType::kF32};
  const int64_t groups = a.chosen_groups < a.groups ? a.groups : 1, group_size = a.experts / groups;
  const auto run = [&]<class Tile>() {
    const int64_t group_lanes = group_size / Tile::kPerLane;
    if (groups > 1 && (group_size % Tile::kPerLane != 0 || (group_lanes & (group_lanes - 1)) != 0)) return false;
    const TileArgs<T> args{a.weights.ptr<float>(),
                           a.ids.ptr<int32_t>(),
                           a.scores.ptr<T>(),
                           bias,
                           a.weights_rows.inner_stride,
                           a.ids_rows.inner_stride,
                           a.scores_rows.inner_stride,
                           a.scores_rows.count,
                           static_cast<int>(a.experts),
                           static_cast<int>(a.k),
                           static_cast<int>(groups),
                           static_cast<int>(a.chosen_groups),
                           log2_of(group_lanes),
                           a.sigmoid,
                           a.renormalize,
                           a.scale};
    launch<topk_router_kernel<T, Tile>>(stream, {ceil_div(args.rows, kRowsPerBlock), kTileThreads}, args);
    return true;
  };
  const bool uniform = a.weights_rows.uniform() && a.ids_rows.uniform();
  if (uniform && choose_tile<T>(a.scores, a.scores_rows, a.experts, a.k, run)) return;
  const BlockArgs<T> args{a.weights.ptr<float>(),
                          a.ids.ptr<int32_t>(),
                          a.scores.ptr<T>(),
                          bias,
                          a.weights_rows,
                          a.ids_rows,
                          a.scores_rows,
                          static_cast<uint32_t>(a.experts),
                          static_cast<uint32_t>(groups),
                          static_cast<uint32_t>(group_size),
                          static_cast<uint32_t>(a.chosen_groups),
                          static_cast<int>(a.k),
                          a.sigmoid,
                          a.renormalize,
                          a.scale};
  launch<topk_router_block_kernel<T>>(stream, {a.scores_rows.count, select_threads(a.experts)}, args);
}

}  // namespace

void topk_router(Stream stream, const RouterArgs& args) {
  dispatch<bf16, f16, float>(args.scores.dtype, [&]<class T>() { choose<T>(stream, args); });
}

}  // namespace kestrel::cuda
