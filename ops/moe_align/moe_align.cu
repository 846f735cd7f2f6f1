// Counting sort by expert, stable: an assignment's place is that of its group, plus those of its expert in warps before
// its own, plus those before it in its warp (ballots over the bits of the id). Counts are packed, two experts to a
// word; one thread adds up the warps' counts of a pair. No atomics decide a place: they only add integers. Up to 1024
// assignments one block does all, above 256 of them in shared memory first: scattered stores leave an SM one at a time.
// Up to 8192 the blocks of a cluster exchange their counts; below sm_90, and with more than 512 experts, each block of
// 512 assignments counts all of them itself. Beyond 8192 a kernel before counts 128 pieces. Few assignments are bound
// by latency, many by instructions and scattered stores. A LoRA is a row of the grid.
#include <algorithm>

#include "kestrel/hopper/cluster.cuh"
#include "kestrel/hopper/divide.cuh"
#include "kestrel/hopper/mbarrier.cuh"
#include "kestrel/hopper/pdl.cuh"
#include "kestrel/hopper/warp.cuh"
#include "kestrel/launch.h"
#include "ops/moe_align/args.h"

namespace kestrel::cuda {
namespace {

constexpr int kThreads = 1024;  // at most
constexpr uint32_t kNone = ~0u;
constexpr int64_t kInOneBlock = 1024, kUnstaged = 256;  // assignments
constexpr int64_t kStagedBytes = 128 * 1024;
constexpr int64_t kRecountChunk = 512;
constexpr uint32_t kClusterBlocks = 16;
constexpr int kClusterThreads = kAlignInOne / kClusterBlocks;  // at most, and experts: more are counted again sooner
constexpr int64_t kSpareBlock = 16384;  // elements behind the last place that one more block fills

// A group: its first block, and the id that expert_ids gets, negative where the expert lives elsewhere.
struct Group {
  uint32_t first;
  int32_t local;
};

struct Routing {
  const int32_t* ids;
  const int32_t* lora_of;
  const int32_t* expert_map;
  int64_t ids_stride, lora_of_stride;
  Divider<uint32_t> slots;
  uint32_t assignments, experts;

  __device__ __forceinline__ const int32_t* id_at(uint32_t assignment, uint32_t* token) const {
    uint32_t slot;
    slots(assignment, token, &slot);
    return ids + *token * ids_stride + slot;
  }
  __device__ __forceinline__ void prefetch_id(uint32_t assignment) const {
    uint32_t token;
    prefetch(id_at(assignment, &token));
  }
  // What stands in topk_ids, or kNone where the token is another LoRA's. kFlat: no LoRAs, and ids without gaps.
  template <bool kLora, bool kFlat = false>
  __device__ __forceinline__ uint32_t id(uint32_t assignment, uint32_t lora) const {
    if constexpr (kFlat) return ids[assignment];
    uint32_t token;
    const uint32_t id = *id_at(assignment, &token);
    if (kLora && lora_of && static_cast<uint32_t>(lora_of[token * lora_of_stride]) != lora) return kNone;
    return id;
  }
  __device__ __forceinline__ uint32_t expert(uint32_t id) const { return id < experts ? id : kNone; }
  __device__ __forceinline__ int32_t local(uint32_t expert) const {
    if (expert >= experts) return -1;
    return expert_map ? expert_map[expert] : static_cast<int32_t>(expert);
  }
};

struct Outputs {
  int32_t* sorted;
  int32_t* expert_ids;
  void* total;
  int64_t sorted_stride, expert_ids_stride, total_stride, sorted_size, expert_ids_size;
  Divider<uint32_t> block;
  uint32_t block_size;
  bool wide_total;

  __device__ __forceinline__ uint32_t blocks(uint32_t count) const {
    uint32_t whole, rest;
    block(count, &whole, &rest);
    return whole + (rest != 0);
  }
  // Of the assignment that is number `index` in its group. The first of a block names the block's expert.
  template <class T>
  __device__ __forceinline__ void place(T* list, int32_t* experts, Group group, uint32_t index,
                                        uint32_t assignment) const {
    uint32_t whole, rest;
    block(index, &whole, &rest);
    list[uint64_t{group.first} * block_size + index] = static_cast<T>(assignment);
    if (rest == 0) experts[group.first + whole] = group.local;
  }
  __device__ __forceinline__ void write_total(uint32_t lora, uint32_t all_blocks) const {
    const uint64_t places = uint64_t{all_blocks} * block_size;
    if (wide_total)
      static_cast<int64_t*>(total)[lora * total_stride] = static_cast<int64_t>(places);
    else
      static_cast<int32_t*>(total)[lora * total_stride] = static_cast<int32_t>(places);
  }
};

// The lanes that hold the same expert; all of the warp call it.
template <int kBits>
__device__ __forceinline__ uint32_t peers_of(uint32_t expert) {
  uint32_t peers = __ballot_sync(~0u, expert != kNone);
#pragma unroll
  for (int bit = 0; bit < kBits; ++bit) {
    const bool set = expert >> bit & 1;
    const uint32_t same = __ballot_sync(~0u, set);
    peers &= set ? same : ~same;
  }
  return peers;
}

__device__ __forceinline__ uint32_t lanes_before() { return (1u << threadIdx.x % kWarp) - 1; }

// column[w * stride], warp w's packed counts of a pair, becomes those of the warps before it; returns those of all.
template <int kMaxWarps>
__device__ __forceinline__ uint32_t add_up_warps(uint32_t* column, int stride, int warps) {
  constexpr int kAtOnce = kMaxWarps < 16 ? kMaxWarps : 16;
  uint32_t before = 0;
#pragma unroll
  for (int first = 0; first < kMaxWarps; first += kAtOnce) {
    uint32_t counts[kAtOnce];
#pragma unroll
    for (int w = 0; w < kAtOnce; ++w) counts[w] = first + w < warps ? column[(first + w) * stride] : 0;
#pragma unroll
    for (int w = 0; w < kAtOnce; ++w) {
      if (first + w < warps) column[(first + w) * stride] = before;
      before += counts[w];
    }
  }
  return before;
}

// By all threads of the block; consecutive ones write consecutive places. Nothing where count is negative.
__device__ __forceinline__ void fill(int32_t* out, int64_t count, int32_t value) {
  const int64_t to_16 = -(reinterpret_cast<uintptr_t>(out) / 4) & 3, head = to_16 < count ? to_16 : count;
  const int64_t vectors = (count - head) / 4;
  if (threadIdx.x < head) out[threadIdx.x] = value;
  for (int64_t i = threadIdx.x; i < vectors; i += blockDim.x)
    reinterpret_cast<int4*>(out + head)[i] = make_int4(value, value, value, value);
  if (head + vectors * 4 + threadIdx.x < count) out[head + vectors * 4 + threadIdx.x] = value;
}

// Shared memory of the kernels: a word for the sum of each warp, then groups, counts [warps, pairs], and the rest.
constexpr int kSums = 32;
struct Shared {
  uint32_t* sums;
  Group* groups;
  uint32_t* counts;
  uint32_t* rest;

  __device__ __forceinline__ Shared(uint32_t* memory, int pairs, int warps)
      : sums(memory),
        groups(reinterpret_cast<Group*>(memory + kSums)),
        counts(memory + kSums + pairs * 4),
        rest(counts + warps * pairs) {}
};
constexpr size_t shared_bytes(int pairs, int warps, int64_t rest) { return 4 * (kSums + pairs * (4 + warps) + rest); }

struct BlockArgs {
  Routing routing;
  Outputs out;
  int64_t most, own, own_blocks;  // places that may be taken; elements of the outputs that the first block fills
  int64_t share, share_blocks;    // of those behind them, for each further block
  int pairs;                      // of experts, a multiple of 4
};

// A thread has one assignment.
template <int kMaxWarps, int kBits, bool kStaged, bool kLora>
__global__ void __launch_bounds__(kMaxWarps* kWarp) align_block_kernel(const __grid_constant__ BlockArgs args) {
  extern __shared__ __align__(16) uint32_t memory[];
  const Routing& routing = args.routing;
  const Outputs& out = args.out;
  const uint32_t lora = blockIdx.y;
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const auto sentinel = static_cast<int32_t>(routing.assignments);
  int32_t* sorted = out.sorted + lora * out.sorted_stride;
  int32_t* expert_ids = out.expert_ids + lora * out.expert_ids_stride;
  if (blockIdx.x > 0) [[unlikely]] {  // outputs longer than need be: what lies behind every place that may be taken
    wait_for_predecessor();
    release_successor();
    const int64_t first = args.own + (blockIdx.x - 1) * args.share;
    fill(sorted + first, min(args.share, out.sorted_size - first), sentinel);
    const int64_t first_block = args.own_blocks + (blockIdx.x - 1) * args.share_blocks;
    fill(expert_ids + first_block, min(args.share_blocks, out.expert_ids_size - first_block), 0);
    return;
  }
  const Shared shared(memory, args.pairs, warps);
  uint32_t* counts = shared.counts + warp * args.pairs;
#pragma unroll 1
  for (int pair = lane; pair < args.pairs; pair += kWarp) counts[pair] = 0;
  auto* staged = reinterpret_cast<int32_t*>(shared.rest);
  if constexpr (kStaged) fill(staged, args.most, sentinel);
  uint32_t expert = kNone;
  const bool has_one = threadIdx.x < routing.assignments;
  if (has_one) routing.prefetch_id(threadIdx.x);
  wait_for_predecessor();
  release_successor();

  if (has_one) expert = routing.template id<kLora>(threadIdx.x, lora);
  const int pair = threadIdx.x, pair_warps = (args.pairs + kWarp - 1) / kWarp;
  int32_t locals[2] = {routing.local(2 * pair), routing.local(2 * pair + 1)};
  if constexpr (kStaged)
    fill(sorted + args.most, args.own - args.most, sentinel);
  else
    fill(sorted, args.own, sentinel);
  fill(expert_ids, args.own_blocks, 0);

  __syncwarp();
  auto* mine = reinterpret_cast<uint16_t*>(counts);  // by expert
  expert = routing.expert(expert);
  const uint32_t peers = peers_of<kBits>(expert), rank = __popc(peers & lanes_before());
  if (expert != kNone && rank == 0) mine[expert] = static_cast<uint16_t>(__popc(peers));
  __syncthreads();

  uint32_t blocks[2] = {}, up_to = 0;
  if (warp < pair_warps) {
    const uint32_t both = pair < args.pairs ? add_up_warps<kMaxWarps>(shared.counts + pair, args.pairs, warps) : 0;
    if (locals[0] >= 0) blocks[0] = out.blocks(both & 0xffff);
    if (locals[1] >= 0) blocks[1] = out.blocks(both >> 16);
    up_to = sum_up_to_lane(blocks[0] + blocks[1]);
  }
  if constexpr (kBits > 6) {  // more than a warp of pairs
    if (warp < pair_warps && lane == kWarp - 1) shared.sums[warp] = up_to;
    __syncthreads();
    if (warp < pair_warps) up_to += __reduce_add_sync(~0u, lane < warp ? shared.sums[lane] : 0);
  }
  if (warp < pair_warps) {
    const uint32_t begin = up_to - blocks[0] - blocks[1];
    if (pair < args.pairs) {
      shared.groups[2 * pair] = {begin, locals[0]};
      shared.groups[2 * pair + 1] = {begin + blocks[0], locals[1]};
    }
    if (pair == pair_warps * kWarp - 1) out.write_total(lora, up_to);
  }
  __syncthreads();

  if (expert != kNone) {
    const Group group = shared.groups[expert];
    if (group.local >= 0) out.place(kStaged ? staged : sorted, expert_ids, group, mine[expert] + rank, threadIdx.x);
  }
  if constexpr (kStaged) {
    __syncthreads();
    const auto most = static_cast<int>(args.most);
    int done = 0;
    if (reinterpret_cast<uintptr_t>(sorted) % 16 == 0) {
      done = most / 4 * 4;
      for (int i = threadIdx.x; i < most / 4; i += blockDim.x)
        reinterpret_cast<int4*>(sorted)[i] = reinterpret_cast<const int4*>(staged)[i];
    }
    for (int i = done + threadIdx.x; i < most; i += blockDim.x) sorted[i] = staged[i];
  }
}

struct ChunkArgs {
  Routing routing;
  Outputs out;
  uint32_t* counts;  // [loras, chunks, experts]
  uint32_t chunk;    // assignments of a block of threads
  uint32_t pairs;    // of experts, a multiple of 4
};

__global__ void __launch_bounds__(kThreads) align_count_kernel(const __grid_constant__ ChunkArgs args) {
  __shared__ uint32_t counts[kMaxExperts];
  const uint32_t lora = blockIdx.y, experts = args.routing.experts;
  counts[threadIdx.x] = 0;
  const uint32_t first = blockIdx.x * args.chunk;
  const uint32_t last = min(first + args.chunk, args.routing.assignments);
  __syncthreads();
  wait_for_predecessor();
  release_successor();
  for (uint32_t i = first + threadIdx.x; i < last; i += kThreads) {
    const uint32_t expert = args.routing.expert(args.routing.id<true>(i, lora));
    if (expert != kNone) atomicAdd(&counts[expert], 1);
  }
  __syncthreads();
  if (threadIdx.x < experts)
    args.counts[(uint64_t{lora} * gridDim.x + blockIdx.x) * experts + threadIdx.x] = counts[threadIdx.x];
}

// Padding of the groups and what lies behind the last one, shared out among the blocks.
__device__ __forceinline__ void fill_rest(const ChunkArgs& args, const Group* groups, const uint32_t* totals,
                                          uint32_t all_blocks, int32_t* sorted, int32_t* expert_ids) {
  const Outputs& out = args.out;
  const uint32_t chunk = blockIdx.x, chunks = gridDim.x, warps = blockDim.x / kWarp;
  const auto sentinel = static_cast<int32_t>(args.routing.assignments);
  for (uint32_t e = chunk + threadIdx.x / kWarp * chunks; e < args.routing.experts; e += chunks * warps) {
    const Group group = groups[e];
    if (group.local < 0) continue;
    const int64_t start = int64_t{group.first} * out.block_size;
    const int64_t end = start + int64_t{out.blocks(totals[e])} * out.block_size;
#pragma unroll 1
    for (int64_t i = start + totals[e] + threadIdx.x % kWarp; i < end; i += kWarp) sorted[i] = sentinel;
  }
  const int64_t thread = int64_t{chunk} * blockDim.x + threadIdx.x, threads = int64_t{chunks} * blockDim.x;
#pragma unroll 1
  for (int64_t i = int64_t{all_blocks} * out.block_size + thread; i < out.sorted_size; i += threads)
    sorted[i] = sentinel;
#pragma unroll 1
  for (int64_t i = all_blocks + thread; i < out.expert_ids_size; i += threads) expert_ids[i] = 0;
}

// A cluster of kClusterBlocks. A thread has one assignment, in order one of the same block's.
template <int kBits>
__global__ void __launch_bounds__(kClusterThreads) align_cluster_kernel(const __grid_constant__ ChunkArgs args) {
  extern __shared__ __align__(16) uint32_t memory[];
  const Routing& routing = args.routing;
  const Outputs& out = args.out;
  const uint32_t lora = blockIdx.y, chunk = blockIdx.x, experts = routing.experts;
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int expert_warps = (experts + kWarp - 1) / kWarp;
  int32_t* sorted = out.sorted + lora * out.sorted_stride;
  int32_t* expert_ids = out.expert_ids + lora * out.expert_ids_stride;
  const Shared shared(memory, args.pairs, warps);
  uint32_t* chunk_counts = shared.rest;                            // [chunks, pairs]
  uint32_t* earlier = chunk_counts + kClusterBlocks * args.pairs;  // by expert: assignments in chunks before this one
  uint32_t* totals = earlier + 2 * args.pairs;                     // by expert
  uint32_t* starts = totals + 2 * args.pairs;                      // by expert: of its own in order
  uint32_t* ordered = starts + 2 * args.pairs;  // the chunk's assignments by expert: the expert above, below which one
  uint32_t* counts = shared.counts + warp * args.pairs;
  cluster_begun_arrive();
#pragma unroll 1
  for (uint32_t pair = lane; pair < args.pairs; pair += kWarp) counts[pair] = 0;
  const uint32_t assignment = chunk * args.chunk + threadIdx.x;
  const bool has_one = threadIdx.x < args.chunk && assignment < routing.assignments;
  if (has_one) routing.prefetch_id(assignment);
  __syncwarp();
  wait_for_predecessor();
  release_successor();

  const uint32_t expert = has_one ? routing.expert(routing.template id<true>(assignment, lora)) : kNone;
  const int32_t local = routing.local(threadIdx.x);
  auto* mine = reinterpret_cast<uint16_t*>(counts);
  const uint32_t peers = peers_of<kBits>(expert), rank = __popc(peers & lanes_before());
  if (expert != kNone && rank == 0) mine[expert] = static_cast<uint16_t>(__popc(peers));
  cluster_begun_wait();
  __syncthreads();
  if (threadIdx.x < args.pairs) {
    const uint32_t both = add_up_warps<kClusterThreads / kWarp>(shared.counts + threadIdx.x, args.pairs, warps);
    const uint32_t to = shared_address(chunk_counts + chunk * args.pairs + threadIdx.x);
#pragma unroll
    for (uint32_t block = 0; block < kClusterBlocks; ++block) store_in_cluster(address_in(to, block), both);
  }
  cluster_sync();

  uint32_t blocks = 0, own = 0, up_to = 0;  // up_to: blocks above, below them the chunk's own
  if (warp < expert_warps) {
    if (threadIdx.x < experts) {
      const auto* count = reinterpret_cast<const uint16_t*>(chunk_counts) + threadIdx.x;
      uint32_t before = 0, total = 0;
#pragma unroll
      for (uint32_t c = 0; c < kClusterBlocks; ++c, count += 2 * args.pairs) {
        if (c == chunk) {
          before = total;
          own = *count;
        }
        total += *count;
      }
      earlier[threadIdx.x] = before;
      totals[threadIdx.x] = total;
      if (local >= 0) blocks = out.blocks(total);
    }
    up_to = sum_up_to_lane(blocks << 16 | own);
    if (lane == kWarp - 1) shared.sums[warp] = up_to;
  }
  __syncthreads();
  const uint32_t sums = lane < expert_warps ? shared.sums[lane] : 0, all = __reduce_add_sync(~0u, sums);
  up_to += __reduce_add_sync(~0u, lane < warp ? sums : 0);
  if (threadIdx.x < experts) {
    shared.groups[threadIdx.x] = {(up_to >> 16) - blocks, local};
    starts[threadIdx.x] = (up_to & 0xffff) - own;
  }
  if (chunk == 0 && threadIdx.x == 0) out.write_total(lora, all >> 16);
  __syncthreads();

  if (expert != kNone) ordered[starts[expert] + mine[expert] + rank] = expert << 16 | assignment;
  __syncthreads();
  if (threadIdx.x < (all & 0xffff)) {
    const uint32_t entry = ordered[threadIdx.x], of = entry >> 16;
    const Group group = shared.groups[of];
    if (group.local >= 0) out.place(sorted, expert_ids, group, earlier[of] + threadIdx.x - starts[of], entry & 0xffff);
  }
  fill_rest(args, shared.groups, totals, all >> 16, sorted, expert_ids);
}

// Each block adds up the counts of all chunks itself, or (kRecount) counts all assignments; then it places its chunk,
// 1024 of them at a time.
template <bool kRecount, bool kFlat>
__global__ void __launch_bounds__(kThreads) align_place_kernel(const __grid_constant__ ChunkArgs args) {
  constexpr int kWarps = kThreads / kWarp;
  extern __shared__ __align__(16) uint32_t memory[];
  const Routing& routing = args.routing;
  const Outputs& out = args.out;
  const uint32_t lora = blockIdx.y, chunk = blockIdx.x, chunks = gridDim.x, experts = routing.experts;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, expert_warps = (experts + kWarp - 1) / kWarp;
  int32_t* sorted = out.sorted + lora * out.sorted_stride;
  int32_t* expert_ids = out.expert_ids + lora * out.expert_ids_stride;
  const Shared shared(memory, args.pairs, kWarps);
  uint32_t* earlier = shared.rest;              // by expert: assignments in chunks and tiles before this one
  uint32_t* totals = earlier + 2 * args.pairs;  // by expert: first those of this chunk and later ones, then all
  uint32_t* counts = shared.counts + warp * args.pairs;
#pragma unroll 1
  for (uint32_t pair = lane; pair < args.pairs; pair += kWarp) counts[pair] = 0;
  if (threadIdx.x < 2 * args.pairs) {
    earlier[threadIdx.x] = 0;
    totals[threadIdx.x] = 0;
  }
  const uint32_t begin = chunk * args.chunk, last = min(begin + args.chunk, routing.assignments);
  __syncthreads();
  wait_for_predecessor();
  release_successor();

  const int32_t local = routing.local(threadIdx.x);
  if constexpr (kRecount) {
    constexpr int kEach = kAlignInOne / kThreads;
    uint32_t ids[kEach];
#pragma unroll
    for (int r = 0; r < kEach; ++r) {
      const uint32_t assignment = threadIdx.x + r * kThreads;
      ids[r] = assignment < routing.assignments ? routing.template id<true, kFlat>(assignment, lora) : kNone;
    }
#pragma unroll
    for (int r = 0; r < kEach; ++r)
      if (routing.expert(ids[r]) != kNone)
        atomicAdd((threadIdx.x + r * kThreads < begin ? earlier : totals) + ids[r], 1);
  } else {
    uint32_t width = kWarp;  // threads side by side on the experts of a chunk
    while (width < experts) width *= 2;
    const uint32_t column = threadIdx.x & (width - 1);
    if (column < experts) {
      const uint32_t* of_lora = args.counts + uint64_t{lora} * chunks * experts + column;
      uint32_t before = 0, after = 0;
#pragma unroll 8
      for (uint32_t c = threadIdx.x / width; c < chunks; c += kThreads / width) {
        const uint32_t count = of_lora[c * experts];
        before += c < chunk ? count : 0;
        after += c < chunk ? 0 : count;
      }
      atomicAdd(&earlier[column], before);
      atomicAdd(&totals[column], after);
    }
  }
  __syncthreads();
  uint32_t blocks = 0, up_to = 0;
  if (warp < expert_warps) {
    if (threadIdx.x < experts) {
      totals[threadIdx.x] += earlier[threadIdx.x];
      if (local >= 0) blocks = out.blocks(totals[threadIdx.x]);
    }
    up_to = sum_up_to_lane(blocks);
    if (lane == kWarp - 1) shared.sums[warp] = up_to;
  }
  __syncthreads();
  const uint32_t sums = lane < expert_warps ? shared.sums[lane] : 0, all_blocks = __reduce_add_sync(~0u, sums);
  up_to += __reduce_add_sync(~0u, lane < warp ? sums : 0);
  if (threadIdx.x < experts) shared.groups[threadIdx.x] = {up_to - blocks, local};
  if (chunk == 0 && threadIdx.x == 0) out.write_total(lora, all_blocks);
  __syncthreads();

  fill_rest(args, shared.groups, totals, all_blocks, sorted, expert_ids);

  auto* mine = reinterpret_cast<uint16_t*>(counts);
  for (uint32_t tile = begin; tile < last; tile += kThreads) {
    const uint32_t assignment = tile + threadIdx.x;
    const uint32_t expert =
        assignment < last ? routing.expert(routing.template id<true, kFlat>(assignment, lora)) : kNone;
    const uint32_t peers = peers_of<10>(expert), rank = __popc(peers & lanes_before());
    if (expert != kNone && rank == 0) mine[expert] = static_cast<uint16_t>(__popc(peers));
    __syncthreads();
    uint32_t both = 0;
    if (threadIdx.x < args.pairs)
      both = add_up_warps<kWarps>(shared.counts + threadIdx.x, static_cast<int>(args.pairs), kWarps);
    __syncthreads();
    if (expert != kNone) {
      const Group group = shared.groups[expert];
      if (group.local >= 0) out.place(sorted, expert_ids, group, earlier[expert] + mine[expert] + rank, assignment);
    }
    __syncthreads();
    if (threadIdx.x < args.pairs) {
      earlier[2 * threadIdx.x] += both & 0xffff;
      earlier[2 * threadIdx.x + 1] += both >> 16;
    }
#pragma unroll 1
    for (uint32_t pair = lane; pair < args.pairs; pair += kWarp) counts[pair] = 0;
    __syncwarp();
  }
}

int pairs_of(int64_t experts) { return static_cast<int>(ceil_div(experts, 8) * 4); }

void align_in_block(Stream stream, const MoeAlignArgs& a, const Routing& routing, const Outputs& out) {
  const int pairs = pairs_of(a.experts);
  BlockArgs args{routing, out, a.most, a.sorted_size, a.expert_ids_size, 0, 0, pairs};
  LaunchShape shape{1, 0, static_cast<int>(a.loras)};
  const int64_t most_blocks = a.most / a.block_size;
  const int64_t spare = a.sorted_size - a.most, spare_blocks = a.expert_ids_size - most_blocks;
  if (const int64_t further = std::min<int64_t>((spare + spare_blocks) / kSpareBlock, 128); further > 0) {
    shape.blocks += further;
    args.own = a.most;
    args.own_blocks = most_blocks;
    args.share = ceil_div(spare, further);
    args.share_blocks = ceil_div(spare_blocks, further);
  }
  const int64_t wanted = std::max({a.assignments, int64_t{pairs}, int64_t{128}});
  shape.threads = static_cast<int>(ceil_div(wanted, kWarp) * kWarp);
  const bool staged = a.assignments > kUnstaged || shape.threads > 256 || a.lora_of;
  shape.shared_bytes = shared_bytes(pairs, shape.threads / kWarp, staged ? a.most : 0);
  if (a.lora_of)
    launch<align_block_kernel<32, 10, true, true>>(stream, shape, args);
  else if (staged)
    a.experts <= 64 ? launch<align_block_kernel<32, 6, true, false>>(stream, shape, args)
                    : launch<align_block_kernel<32, 10, true, false>>(stream, shape, args);
  else
    a.experts <= 64 ? launch<align_block_kernel<8, 6, false, false>>(stream, shape, args)
                    : launch<align_block_kernel<8, 10, false, false>>(stream, shape, args);
}

}  // namespace

void moe_align(Stream stream, const MoeAlignArgs& a) {
  const Routing routing{a.ids,
                        a.lora_of,
                        a.expert_map,
                        a.ids_stride,
                        a.lora_of_stride,
                        Divider<uint32_t>(std::max<int64_t>(a.slots, 1)),
                        static_cast<uint32_t>(a.assignments),
                        static_cast<uint32_t>(a.experts)};
  const Outputs out{a.sorted,
                    a.expert_ids,
                    a.total,
                    a.sorted_stride,
                    a.expert_ids_stride,
                    a.total_stride,
                    a.sorted_size,
                    a.expert_ids_size,
                    Divider<uint32_t>(a.block_size),
                    static_cast<uint32_t>(a.block_size),
                    a.wide_total};
  if (a.assignments <= kInOneBlock && a.most <= kStagedBytes / 4) return align_in_block(stream, a, routing, out);
  const int pairs = pairs_of(a.experts), loras = static_cast<int>(a.loras);
  const bool in_one = a.assignments <= kAlignInOne;
  if (in_one && a.experts <= kClusterThreads && compute_capability() >= 90) {
    const int64_t chunk = ceil_div(a.assignments, kClusterBlocks);
    const int threads = static_cast<int>(ceil_div(std::max(chunk, a.experts), kWarp) * kWarp);
    const size_t bytes = shared_bytes(pairs, threads / kWarp, (kClusterBlocks + 6) * pairs + threads);
    const ChunkArgs args{routing, out, nullptr, static_cast<uint32_t>(chunk), static_cast<uint32_t>(pairs)};
    const LaunchShape shape{kClusterBlocks, threads, loras, bytes, kClusterBlocks};
    return a.experts <= 64 ? launch<align_cluster_kernel<6>>(stream, shape, args)
                           : launch<align_cluster_kernel<9>>(stream, shape, args);
  }
  const int64_t chunk = in_one ? kRecountChunk : ceil_div(ceil_div(a.assignments, kAlignChunks), kThreads) * kThreads;
  const ChunkArgs args{routing, out, a.counts, static_cast<uint32_t>(chunk), static_cast<uint32_t>(pairs)};
  LaunchShape shape{ceil_div(a.assignments, chunk), kThreads, loras};
  if (!in_one) launch<align_count_kernel>(stream, shape, args);
  shape.shared_bytes = shared_bytes(pairs, kThreads / kWarp, 4 * pairs);
  const bool flat = !a.lora_of && (a.ids_stride == a.slots || a.assignments == a.slots);
  if (!in_one)
    launch<align_place_kernel<false, false>>(stream, shape, args);
  else
    flat ? launch<align_place_kernel<true, true>>(stream, shape, args)
         : launch<align_place_kernel<true, false>>(stream, shape, args);
}

}  // namespace kestrel::cuda
