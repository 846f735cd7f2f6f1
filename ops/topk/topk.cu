// Rows of up to 512 scores, k <= 32: a warp per row, each lane's scores in registers and in order, and k rounds that
// take the best of the lanes' first ones: a maximum over the warp, of score and index in one word for 16-bit scores.
// Lane j keeps round j's; every lane adds up the softmax as it goes, so nothing is exchanged at the end.
// Bound by latency: 740 x 64 are 95 KB. Other rows: a block each (select.cuh).
#include "kestrel/hopper/pdl.cuh"
#include "ops/topk/select.cuh"
#include "ops/topk/tile.cuh"

namespace kestrel::cuda {
namespace {

constexpr float kLog2e = 1.44269504f;

template <class T>
struct TileArgs {
  T* values;
  int32_t* indices;
  const T* scores;
  int64_t values_stride, indices_stride, scores_stride, rows;
  int width, k;
};

template <class T, class Tile, bool kSoftmax>
__global__ void __launch_bounds__(kTileThreads) topk_kernel(const __grid_constant__ TileArgs<T> args) {
  using Key = std::conditional_t<sizeof(T) == 2, uint32_t, uint64_t>;
  constexpr int kPerLane = Tile::kPerLane, kUnroll = Tile::kChosen ? Tile::kChosen : 1;
  const int lane = threadIdx.x % kWarp, first = lane * kPerLane;
  const int64_t row = blockIdx.x * int64_t{kRowsPerBlock} + threadIdx.x / kWarp;
  // Offsets, not pointers: through compute_now a pointer would lose that it is one into global memory.
  int64_t at = row * args.scores_stride, value_at = row * args.values_stride + lane;
  int64_t index_at = row * args.indices_stride + lane;
  compute_now(at);
  compute_now(value_at);
  compute_now(index_at);
  wait_for_predecessor();
  release_successor();
  if (row >= args.rows) return;  // whole warps
  uint32_t bits[kPerLane];
  const T* scores = args.scores + at;
  load_lane<Tile>(scores + first, first, args.width, bits);
  Key keys[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i)
    keys[i] = holds<Tile>(first, i, args.width) ? key_of_bits<Key, T>(bits[i], first + i) : 0;
  sort_descending(keys);

  const int k = Tile::kChosen ? Tile::kChosen : args.k;
  Key chosen = 0;
  float highest = 0, sum = 0, weight = 0;
#pragma unroll kUnroll
  for (int j = 0; j < k; ++j) {
    const Key best = take_best(keys);
    if (lane == j) chosen = best;
    if constexpr (kSoftmax) {
      const float score = score_of_rank<T>(rank_of(best));
      if (j == 0) highest = score;
      const float w = fast_exp2((score - highest) * kLog2e);
      sum += w;
      if (lane == j) weight = w;
    }
  }
  if (lane >= k) return;
  args.indices[index_at] = static_cast<int32_t>(index_of(chosen));
  if constexpr (kSoftmax)
    args.values[value_at] = from_float<T>(weight * fast_reciprocal(sum));
  else
    args.values[value_at] = scores[index_of(chosen)];  // bit for bit: a key knows neither -0.0 nor a NaN's bits
}

template <class T>
struct BlockArgs {
  T* values;
  int32_t* indices;
  const T* scores;
  Rows values_rows, indices_rows, scores_rows;
  uint32_t width;
  int k;
  bool softmax;
};

template <class T, class Key, int kVec>
__global__ void __launch_bounds__(kSelectThreads) topk_block_kernel(const __grid_constant__ BlockArgs<T> args) {
  __shared__ SelectShared<Key> shared;
  wait_for_predecessor();
  release_successor();
  const T* scores = args.scores + args.scores_rows.offset(blockIdx.x);
  T* values = args.values + args.values_rows.offset(blockIdx.x);
  int32_t* indices = args.indices + args.indices_rows.offset(blockIdx.x);
  select_best<false>(RowKeys<Key, kVec, T>{scores, args.width}, args.k, shared);
  const int i = threadIdx.x;
  const bool inside = i < args.k;
  const Key chosen = shared.best[inside ? i : 0];
  if (inside) indices[i] = static_cast<int32_t>(index_of(chosen));
  if (!args.softmax) {
    if (inside) values[i] = scores[index_of(chosen)];
    return;
  }
  const float highest = score_of_rank<T>(rank_of(shared.best[0]));
  const float weight = inside ? fast_exp2((score_of_rank<T>(rank_of(chosen)) - highest) * kLog2e) : 0.0f;
  const float sum = block_sum(weight);
  if (inside) values[i] = from_float<T>(weight / sum);
}

template <class T, class Tile>
void run_tile(Stream stream, const TopkArgs& a) {
  const TileArgs<T> args{a.values.ptr<T>(),          a.indices.ptr<int32_t>(),    a.scores.ptr<T>(),
                         a.values_rows.inner_stride, a.indices_rows.inner_stride, a.scores_rows.inner_stride,
                         a.scores_rows.count,        static_cast<int>(a.width),   static_cast<int>(a.k)};
  const LaunchShape shape{ceil_div(args.rows, kRowsPerBlock), kTileThreads};
  if (a.softmax)
    launch<topk_kernel<T, Tile, true>>(stream, shape, args);
  else
    launch<topk_kernel<T, Tile, false>>(stream, shape, args);
}

template <class T>
void choose(Stream stream, const TopkArgs& a) {
  const bool uniform = a.values_rows.uniform() && a.indices_rows.uniform();
  const auto run = [&]<class Tile>() {
    if constexpr (Tile::kPerLane == 2) {
      if (a.k == 8 && a.width == 2 * kWarp) {
        run_tile<T, LaneTile<2, 2, 8>>(stream, a);
        return true;
      }
    }
    run_tile<T, Tile>(stream, a);
    return true;
  };
  if (uniform && choose_tile<T>(a.scores, a.scores_rows, a.width, a.k, run)) return;
  const BlockArgs<T> args{
      a.values.ptr<T>(), a.indices.ptr<int32_t>(),       a.scores.ptr<T>(),     a.values_rows, a.indices_rows,
      a.scores_rows,     static_cast<uint32_t>(a.width), static_cast<int>(a.k), a.softmax};
  choose_keys<T>(a.scores, a.scores_rows, a.width, [&]<class Key, int kVec>() {
    launch<topk_block_kernel<T, Key, kVec>>(stream, {a.scores_rows.count, select_threads(a.width)}, args);
  });
}

}  // namespace

void topk_fwd(Stream stream, const TopkArgs& args) {
  dispatch<bf16, f16, float>(args.scores.dtype, [&]<class T>() { choose<T>(stream, args); });
}

}  // namespace kestrel::cuda
