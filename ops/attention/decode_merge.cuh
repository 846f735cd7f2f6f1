// The end of the decode kernels: what the warps found, joined in a fixed order. Each warp puts its sums into shared
// memory, a warp's lanes then take the parts of four output elements, one each. Of a cluster, each block merges its
// share of the elements, the parts of all blocks having been stored there. Splits without a cluster (kGrid) leave what
// their block found in the workspace, and the last to arrive merges: nobody waits.
#pragma once

#include <limits>

#include "kestrel/hopper/cluster.cuh"
#include "kestrel/hopper/mbarrier.cuh"
#include "kestrel/hopper/numeric.cuh"
#include "kestrel/hopper/warp.cuh"
#include "ops/attention/decode_args.h"
#include "ops/attention/device.cuh"

namespace kestrel::cuda {

__device__ __forceinline__ float base_of(float top) {  // -inf - -inf is NaN
  return top == -std::numeric_limits<float>::infinity() ? 0.0f : top;
}

// A block's work: split number `split` of the keys of a sequence, for one group of heads or rows.
struct Item {
  int batch, group, split, splits;
  int slot;  // of split 0 in the workspace
};

// threadIdx.x, of which the compiler thinks that it changes: it would keep what follows from it in registers all along.
__device__ __forceinline__ uint32_t this_thread() {
  uint32_t thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

__device__ __forceinline__ Item& shared_item() {
  __shared__ Item item;
  return item;
}

__device__ __forceinline__ int stored_length(const DecodeArgs& a, int batch) {
  return a.lengths ? __ldcg(a.lengths + batch) : a.k_len;
}
__device__ __forceinline__ int length_of(const DecodeArgs& a, int stored) { return max(min(stored, a.k_len), 0); }

// Keys of a sequence, but for those that no query sees any more.
__device__ __forceinline__ int keys_of(const DecodeArgs& a, int batch) {
  if (batch >= a.batch) return 0;
  const int length = length_of(a, stored_length(a, batch));
  return a.has(a.kWindow) && a.window_left >= 0 ? min(length, a.window_left + a.q_len) : length;
}

// Item number `index` of the plan, which every warp makes for itself: sequence after sequence, group after group. A
// share is what one block would have if all `slots` had as much. A sequence of up to 1.3 shares stays whole, so that
// equal lengths of which a few more than slots are not split; there are at most `slots` more items than groups of
// sequences.
__device__ inline bool find_planned_item(const DecodeArgs& a, int index, Item* item) {
  const int lane = threadIdx.x % kWarp;
  int total = 0;
  for (int b = 0; b < a.batch; b += kWarp) total += keys_of(a, b + lane);
  total = __reduce_add_sync(~0u, total);
  const float share = fmaxf(static_cast<float>(total) * a.groups / a.slots, a.least);
  int items_before = 0, slots_before = 0;
  for (int b = 0; b < a.batch; b += kWarp) {
    const int rounded = static_cast<int>(keys_of(a, b + lane) / share + 0.7f);
    const int splits = b + lane < a.batch ? max(min(rounded, kMostSplits), 1) : 0;
    const int items = sum_up_to_lane(splits * a.groups) + items_before;
    const int slots = sum_up_to_lane(splits > 1 ? splits * a.groups : 0) + slots_before;
    const unsigned after = __ballot_sync(~0u, items > index);
    if (after) {
      const int of = __ffs(static_cast<int>(after)) - 1;
      item->splits = __shfl_sync(~0u, splits, of);
      const int number = index - (__shfl_sync(~0u, items, of) - item->splits * a.groups);
      item->batch = b + of;
      item->group = number / item->splits;
      item->split = number - item->group * item->splits;
      item->slot = __shfl_sync(~0u, slots, of) - item->splits * (a.groups - item->group);
      return true;
    }
    items_before = __shfl_sync(~0u, items, kWarp - 1);
    slots_before = __shfl_sync(~0u, slots, kWarp - 1);
  }
  return false;
}

template <Merge kMerge>
__device__ __forceinline__ bool find_item(const DecodeArgs& a, Item* item) {
  const int index = blockIdx.x;
  if constexpr (kMerge == Merge::kBlock) {
    *item = {static_cast<int>(blockIdx.y), index, 0, 1, 0};
    return true;
  } else if constexpr (kMerge == Merge::kCluster) {
    *item = {static_cast<int>(blockIdx.y), static_cast<int>(cluster_index()), static_cast<int>(cluster_rank()),
             a.splits, 0};
    return true;
  } else {
    if (a.slots) return find_planned_item(a, index, item);
    // The first splits of all first: with a share, of the last ones there may be none.
    const int all = a.batch * a.groups;
    item->split = index / all;
    const int whole = index - item->split * all;
    item->batch = whole / a.groups;
    item->group = whole - item->batch * a.groups;
    item->slot = whole * a.splits;
    item->splits = a.splits;
    if (a.share) item->splits = max((keys_of(a, item->batch) + a.share - 1) / a.share, 1);
    return item->split < item->splits;
  }
}

// The rows of q that a block works on: one of each of kHeads key heads, or up to 8 of one key head.
template <class Tile>
struct Rows {
  uint32_t head, first;  // key head; row within its rows
  int count;

  Rows() = default;
  __device__ __forceinline__ Rows(const DecodeArgs& a, int number) {
    if constexpr (Tile::kRows) {
      head = number, first = 0;
      if constexpr (!Tile::kSimple) a.by_row_tiles(number, &head, &first);
      first *= Tile::kMostRows;
      count = Tile::kSimple ? a.rows : min(a.rows - static_cast<int>(first), Tile::kMostRows);
    } else {
      head = number * Tile::kHeads;
      first = 0;
      count = Tile::kHeads;
    }
  }
  // Query and query head of a row; past the last, of the last.
  __device__ __forceinline__ void find(const DecodeArgs& a, uint32_t row, uint32_t* query, uint32_t* q_head) const {
    if constexpr (Tile::kRows) {
      uint32_t member = min(row, count - 1u);
      *query = 0;
      if constexpr (!Tile::kSimple) a.by_group(first + member, query, &member);
      *q_head = head * a.group + member;
    } else {
      *query = 0;
      *q_head = head + row;
    }
  }
  __device__ __forceinline__ int query(const DecodeArgs& a, uint32_t row) const {
    uint32_t query, q_head;
    find(a, row, &query, &q_head);
    return static_cast<int>(query);
  }
};

struct Part {
  float top, sum;
  float4 out;
};

// Where four adjacent elements of a row of out go, and what else goes into them: found before they are there.
template <class Tile>
struct Target {
  using Q = typename Tile::Q;
  Q* out = nullptr;  // null: nowhere
  float* lse = nullptr;
  float sink = -std::numeric_limits<float>::infinity();

  Target() = default;
  __device__ __forceinline__ Target(const DecodeArgs& a, int batch, const Rows<Tile>& rows, int row, int d) {
    if (row >= rows.count || d >= a.head_size) return;
    uint32_t query, head;
    rows.find(a, row, &query, &head);
    out = static_cast<Q*>(a.out) + uint64_t{a.out_batch} * batch + uint64_t{a.out_head} * head + d;
    if (Tile::kRows && a.q_len > 1) out += uint64_t{a.out_token} * query;
    if (a.has(a.kSink)) sink = sink_of(a, static_cast<int>(head)) * 1.44269504f;
    if (a.has(a.kLse) && d == 0) lse = a.lse + a.lse_stride.at(batch, query, head);
  }
  __device__ __forceinline__ void write(const DecodeArgs& a, float v_scale, const Part& part) const {
    if (!out) return;
    float top = part.top, sum = part.sum, by = v_scale;
    if (a.has(a.kSink)) {
      top = fmaxf(top, sink);
      const float shrink = fast_exp2(part.top - base_of(top));
      sum = sum * shrink + fast_exp2(sink - base_of(top));
      by *= shrink;
    }
    by = sum == 0.0f ? 0.0f : by * fast_reciprocal(sum);
    *reinterpret_cast<uint2*>(out) = {from_float2<Q>(part.out.x * by, part.out.y * by),
                                      from_float2<Q>(part.out.z * by, part.out.w * by)};
    if (lse) *lse = sum == 0.0f ? -std::numeric_limits<float>::infinity() : (top + log2f(sum)) * 0.69314718f;
  }
};

// The sum of the parts that load(number) gives, if any, taken by 1 << log adjacent lanes, kBatch at a time each.
template <int kBatch, class Load>
__device__ __forceinline__ Part sum_parts(bool any, int parts, int log, Load load) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const int lane = threadIdx.x & ((1 << log) - 1);
  Part all{-kInfinity, 0.0f, {}};
  const auto scale = [&](float by) {
    all.sum *= by;
    all.out = {all.out.x * by, all.out.y * by, all.out.z * by, all.out.w * by};
  };
#pragma unroll 1
  for (int first = 0; first < parts; first += kBatch << log) {
    Part p[kBatch];
    float top = all.top;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int number = first + (i << log) + lane;
      p[i] = {-kInfinity, 0.0f, {}};
      if (any && number < parts) p[i] = load(number);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) top = fmaxf(top, p[i].top);
    const float base = base_of(top);
    if (first > 0) scale(fast_exp2(all.top - base));
    all.top = top;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const float weight = fast_exp2(p[i].top - base);
      all.sum = fmaf(p[i].sum, weight, all.sum);
      all.out.x = fmaf(p[i].out.x, weight, all.out.x);
      all.out.y = fmaf(p[i].out.y, weight, all.out.y);
      all.out.z = fmaf(p[i].out.z, weight, all.out.z);
      all.out.w = fmaf(p[i].out.w, weight, all.out.w);
    }
  }
  if (log == 0) return all;
  float top = all.top;
  for (int lanes = 1 << log >> 1; lanes > 0; lanes >>= 1) top = fmaxf(top, shuffle_xor(top, lanes));
  scale(fast_exp2(all.top - base_of(top)));
  all.top = top;
  for (int lanes = 1 << log >> 1; lanes > 0; lanes >>= 1) {
    all.sum += shuffle_xor(all.sum, lanes);
    all.out.x += shuffle_xor(all.out.x, lanes);
    all.out.y += shuffle_xor(all.out.y, lanes);
    all.out.z += shuffle_xor(all.out.z, lanes);
    all.out.w += shuffle_xor(all.out.w, lanes);
  }
  return all;
}

// atom.add.acq_rel.gpu, atom.cas.acq_rel.gpu
__device__ __forceinline__ uint64_t add_one(uint64_t* counter) {
  uint64_t old;
  asm volatile("atom.add.acq_rel.gpu.global.u64 %0, [%1], 1;" : "=l"(old) : "l"(counter) : "memory");
  return old;
}
__device__ __forceinline__ uint64_t exchange_if(uint64_t* counter, uint64_t expected, uint64_t value) {
  uint64_t old;
  asm volatile("atom.cas.acq_rel.gpu.global.b64 %0, [%1], %2, %3;"
               : "=l"(old)
               : "l"(counter), "l"(expected), "l"(value)
               : "memory");
  return old;
}

// Is this the last of `count` arrivals? Nobody has set the counter to zero before: its upper half says whether it
// counts (a NaN that no kernel makes), and whoever finds it does not begins the count. The last one leaves zero.
__device__ inline bool arrives_last(uint64_t* counter, uint32_t count) {
  constexpr uint64_t kCounts = uint64_t{0x7fc5a3d1} << 32;
  const auto counts = [](uint64_t value) { return value >> 32 == kCounts >> 32; };
  come_late();
  uint64_t old = add_one(counter);
  if (!counts(old)) {
    uint64_t expected = old + 1;
    for (;;) {
      old = exchange_if(counter, expected, kCounts | 1);
      if (old == expected) {
        old = kCounts;
        break;
      }
      if (counts(old)) {
        old = add_one(counter);
        break;
      }
      expected = old;
    }
  }
  if (static_cast<uint32_t>(old) + 1 != count) return false;
  *counter = kCounts;
  return true;
}

// The workspace's float4s for a split of a block.
template <class Tile>
constexpr int kSlotUnits = Tile::kMostRows* Tile::kSize / 4 + (Tile::kMostRows + 1) / 2;

template <class Tile>
__device__ __forceinline__ void merge_block(const DecodeArgs& a, float (&out)[Tile::kSize / 16][4],
                                            float (&top)[Tile::kColumns], float (&sum)[Tile::kColumns]) {
  constexpr bool kCluster = Tile::kMerge == Merge::kCluster, kGrid = Tile::kMerge == Merge::kGrid;
  constexpr int kRowUnits = Tile::kSize / 4;
  extern __shared__ float4 shared_parts[];  // decode_shared_bytes() of plan.h
  const uint32_t thread = this_thread(), lane = thread % kWarp, g = lane / 4, t = lane % 4;
  const int warp = static_cast<int>(thread / kWarp), warps = static_cast<int>(blockDim.x / kWarp);
  const float v_scale = a.has(a.kScales) && a.v_scale_at ? *a.v_scale_at : a.v_scale;
  const int blocks = kCluster ? a.splits : 1, rank = kCluster ? static_cast<int>(cluster_rank()) : 0;
  // A unit is four adjacent elements of a row; number u lies in block u % blocks of the cluster, at u / blocks.
  const auto place_of = [&](uint32_t unit, uint32_t* block = nullptr) {
    uint32_t place = unit, its_block = 0;
    if constexpr (kCluster) a.by_splits(unit, &place, &its_block);
    if (block) *block = its_block;
    return place;
  };
  const int parts = warps * blocks, count = Tile::kRows ? min(a.rows, Tile::kMostRows) : Tile::kHeads;
  const int units = count * kRowUnits, pitch = static_cast<int>(place_of(units + blocks - 1)) | 1;
  const int tops_pitch = count | 1;
  float4* outs = shared_parts;
  float2* tops = reinterpret_cast<float2*>(shared_parts + parts * pitch);
  const int me = rank * warps + warp;
  if constexpr (kCluster) cluster_begun_wait();
#pragma unroll
  for (int u = 0; u < 2; ++u) {
    const uint32_t row = 2 * t + u;
    if (row >= static_cast<uint32_t>(count)) continue;
#pragma unroll
    for (int j = 0; j < Tile::kSize / 16; j += 2) {
      constexpr int kPiece = Tile::kPiece;
      const uint32_t unit = row * kRowUnits + 2 * j / kPiece * 2 * kPiece + g * (kPiece / 4) + 2 * j % kPiece / 4;
      const float4 value = {out[j][u], out[j][2 + u], out[j + 1][u], out[j + 1][2 + u]};
      uint32_t block;
      float4* to = outs + me * pitch + place_of(unit, &block);
      if constexpr (kCluster)
        store_in_cluster(address_in(shared_address(to), block), value);
      else
        *to = value;
    }
  }
#pragma unroll 1
  for (uint32_t first = lane; first - lane < static_cast<uint32_t>(count * blocks); first += kWarp) {
    uint32_t block;
    const uint32_t row = place_of(first, &block);
    float row_top, row_sum;
    if constexpr (Tile::kRows) {
      const float top0 = __shfl_sync(~0u, top[0], row / 2 % 4), top1 = __shfl_sync(~0u, top[1], row / 2 % 4);
      const float sum0 = __shfl_sync(~0u, sum[0], row / 2 % 4), sum1 = __shfl_sync(~0u, sum[1], row / 2 % 4);
      row_top = row % 2 ? top1 : top0;
      row_sum = row % 2 ? sum1 : sum0;
    } else {
      const uint32_t from = (row % 2 * 4 + row / 2) % kWarp;
      row_top = __shfl_sync(~0u, top[0], from);
      row_sum = __shfl_sync(~0u, sum[0], from);
    }
    if (row >= static_cast<uint32_t>(count)) continue;
    float2* to = tops + me * tops_pitch + row;
    if constexpr (kCluster)
      store_in_cluster(address_in(shared_address(to), block), make_float2(row_top, row_sum));
    else
      *to = {row_top, row_sum};
  }

  // 1 << part_log adjacent lanes work on a unit.
  const int mine = static_cast<int>(place_of(units - rank + blocks - 1)), warp_units = kWarp >> a.part_log;
  const bool writes = (lane & ((1 << a.part_log) - 1)) == 0;
  int first = warp * warp_units, unit = first + static_cast<int>(lane >> a.part_log);
  const auto load = [&](int number) {
    const float2 ends = tops[number * tops_pitch + static_cast<uint32_t>(unit * blocks + rank) / kRowUnits];
    return Part{ends.x, ends.y, outs[number * pitch + unit]};
  };
  if constexpr (!kGrid) {
    Item item;
    find_item<Tile::kMerge>(a, &item);
    const Rows<Tile> rows(a, item.group);
    const auto target_of = [&] {
      const uint32_t whole = unit * blocks + rank;
      return Target<Tile>(a, item.batch, rows, writes && unit < mine ? int(whole / kRowUnits) : Tile::kMostRows,
                          whole % kRowUnits * 4);
    };
    Target<Tile> target = target_of();
    if constexpr (kCluster)
      cluster_sync();
    else
      __syncthreads();
    while (first < mine) {
      target.write(a, v_scale, sum_parts<4>(unit < mine, parts, a.part_log, load));
      first += warps * warp_units;
      unit += warps * warp_units;
      if (first < mine) target = target_of();
    }
  } else {
    __syncthreads();
    const Item item = shared_item();
    const Rows<Tile> rows(a, item.group);
    constexpr int kSlot = kSlotUnits<Tile>;
    float4* slots = a.partials + int64_t{item.slot} * kSlot;
    for (; first < units; first += warps * warp_units, unit += warps * warp_units) {
      const Part part = sum_parts<4>(unit < units, parts, a.part_log, load);
      if (!writes || unit >= units) continue;
      if (item.splits == 1) {
        Target<Tile>(a, item.batch, rows, unit / kRowUnits, unit % kRowUnits * 4).write(a, v_scale, part);
        continue;
      }
      float4* slot = slots + item.split * kSlot;
      slot[unit] = part.out;
      if (unit % kRowUnits == 0)
        reinterpret_cast<float2*>(slot + Tile::kMostRows * kRowUnits)[unit / kRowUnits] = {part.top, part.sum};
    }
    if (item.splits == 1) return;
    // The last block's work, found while the parts are on their way.
    const int split_units = kWarp >> a.split_log;
    const bool ends = (lane & ((1 << a.split_log) - 1)) == 0;
    int from = warp * split_units, u = from + static_cast<int>(lane >> a.split_log);
    const auto target_of = [&] {
      return Target<Tile>(a, item.batch, rows, ends && u < units ? u / kRowUnits : Tile::kMostRows, u % kRowUnits * 4);
    };
    Target<Tile> target = target_of();
    __shared__ bool last;
    __syncthreads();
    if (thread == 0) last = arrives_last(a.counters + item.slot, item.splits);
    __syncthreads();
    if (!last) return;
    // The latency of the workspace counts: many loads at once.
    const auto load_left = [&](int number) {
      const float4* slot = slots + number * kSlot;
      const float2 top_sum =
          __ldcg(reinterpret_cast<const float2*>(slot + Tile::kMostRows * kRowUnits) + u / kRowUnits);
      return Part{top_sum.x, top_sum.y, __ldcg(slot + u)};
    };
    while (from < units) {
      target.write(a, v_scale, sum_parts<8>(u < units, item.splits, a.split_log, load_left));
      from += warps * split_units;
      u += warps * split_units;
      if (from < units) target = target_of();
    }
  }
}

}  // namespace kestrel::cuda
