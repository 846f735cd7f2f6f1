// Both products by wgmma, out^T = w x^T: weights are a (64 rows to a wgmma, by TMA), rows of x its b (in steps of 16,
// as many as the tile has; gathered with cp.async), so that padding costs next to nothing. Persistent blocks; a stage
// of the ring is 128 bytes of depth of both. One warp streams weights and does not stop between tiles, three gather x,
// a consumer warpgroup has 128 rows of weights or, under a gate, 64 of either panel: both of a pair in one thread. e4m3
// is added up in fp32 after 128 of depth: the tensor core keeps 13 bits. Where experts have several tiles, pairs of
// blocks (clusters) share their weights. Bound by the weights' bytes to about 1000 tokens; then by shared memory (a
// stage of 144 rows is read and written in 1232 clocks, wgmma needs 1152; bf16 takes 1280, e4m3 1400), by finish(),
// 3900 to 4700 clocks a tile, and by power (1.5 to 1.75 GHz): benchmarks/README.md.
#pragma once

#include <algorithm>
#include <type_traits>

#include "kestrel/hopper/cluster.cuh"
#include "kestrel/hopper/divide.cuh"
#include "kestrel/hopper/mma.cuh"
#include "kestrel/hopper/pdl.cuh"
#include "kestrel/hopper/vec.cuh"
#include "kestrel/hopper/weight_stream.cuh"
#include "kestrel/hopper/wgmma.cuh"
#include "kestrel/launch.h"
#include "kestrel/tensor_map.h"
#include "ops/activation/gate.cuh"
#include "ops/moe/wgmma.h"
#include "ops/moe/wgmma_runs.cuh"

namespace kestrel::cuda {

enum class Finish { kPlain, kErfGate, kSigmoidGate };

// Rows of 16 bytes' multiples.
struct ChunkRows {
  Divider<uint32_t> inner;
  int64_t inner_stride = 0, outer_stride = 0;  // in chunks of 16 bytes

  __device__ __forceinline__ uint32_t chunk(uint32_t row) const {
    uint32_t outer, rest;
    inner(row, &outer, &rest);
    return static_cast<uint32_t>(outer * outer_stride + rest * inner_stride);
  }
};

template <class T, class Out>
struct WgmmaArgs {
  CUtensorMap map[2];
  Out* out;
  const T* x;
  const float *x_scale, *scale[2], *topk_weights;
  int64_t scale_stride[2], topk_weights_stride;
  ChunkRows out_rows, x_rows;
  Divider<uint32_t> slots, slots_per_row;
  List list;
  int32_t width, depth, panels, blocks_per_panel;
  float residual;  // what a gate adds to its second factor
  bool tanh;
  Pairing pairing;
  bool several;                        // tiles of an expert, most likely; or
  bool one;                            // for each
  bool settled;                        // the list is older than the predecessor
  uint64_t weight_policy, out_policy;  // in L2
};

constexpr int kProducerThreads = 128, kGatherThreads = 96, kInfos = 2;
constexpr int kUnitBytes = 64 * 128;  // of a stage: 64 rows of weights
constexpr uint32_t kNone = ~0u;

template <class Tile>
struct Shape {
  static constexpr int kThreads = kProducerThreads + 128 * Tile::kGroups, kUnits = 2 * Tile::kGroups;
  static constexpr int kWeightBytes = kUnits * kUnitBytes, kStageBytes = kWeightBytes + Tile::kTokens * 128;

  // What a tile and its rows are, from the gathering warps to the consumers.
  struct Info {
    uint32_t x[Tile::kTokens], out[Tile::kTokens];  // in 16 bytes; kNone: not a row
    float factor[(Tile::kTokens + 31) / 32 * 32];
    int32_t expert, panel_block;  // < 0: no tile, nothing follows
    int32_t rows[3 + 1];          // the last row that is one, plus 1, for each gathering warp
  };
  struct Shared {
    unsigned char ring[Tile::kStages * kStageBytes];
    unsigned char staged[Tile::kGroups][2 * 4096];
    uint64_t barriers[2 * (Tile::kStages + kInfos)];
    Info info[kInfos];
    Runs<Tile::kRuns, Tile::kTokens> runs;
  };
  static constexpr size_t kSharedBytes = sizeof(Shared);
  static_assert((kSharedBytes + 1024) * Tile::kBlocks <= 228 * 1024, "as many blocks on an SM");
};

template <class Tile>
struct Rings {
  Ring stages, infos;
  __device__ __forceinline__ explicit Rings(typename Shape<Tile>::Shared* shared)
      : stages{shared_address(shared->ring), shared_address(shared->barriers), Tile::kStages, Shape<Tile>::kStageBytes},
        infos{0, shared_address(shared->barriers + 2 * Tile::kStages), kInfos, 0} {}
  __device__ __forceinline__ void init(Pairing pairing) const {
    for (int i = 0; i < Tile::kStages; ++i) {
      init_barrier(stages.barriers + i * 16, 1 + kGatherThreads);
      init_barrier(stages.barriers + i * 16 + 8, 4 * Tile::kGroups << pairing.paired);
    }
    for (int i = 0; i < kInfos; ++i) {
      init_barrier(infos.barriers + i * 16, kGatherThreads);
      init_barrier(infos.barriers + i * 16 + 8, 128 * Tile::kGroups);
    }
    fence_init_barrier();
  }
};

// Where a block of weights stands: panel and row, of a gate in both panels.
template <class Tile, Finish kFinish, class Args>
__device__ __forceinline__ void locate(const Args& args, int32_t panel_block, int32_t* panel, int32_t* row) {
  constexpr int kRows = (kFinish == Finish::kPlain ? 128 : 64) * Tile::kGroups;
  *panel = kFinish == Finish::kPlain && panel_block >= args.blocks_per_panel ? 1 : 0;
  *row = (panel_block - *panel * args.blocks_per_panel) * kRows;
}

// One thread. Each block of a pair copies half of a stage's weights, to both: it must be free in both. The first rows
// of x and their scales, which are asked for later, are not to queue behind the weights of a whole ring.
template <class Tile, Finish kFinish, class T, class Out>
__device__ __forceinline__ void stream_weights(const WgmmaArgs<T, Out>& args, const auto& runs, Ring& ring,
                                               uint32_t first_info) {
  constexpr bool kPlain = kFinish == Finish::kPlain;
  constexpr int kDepth = 128 / sizeof(T), kUnits = Shape<Tile>::kUnits;
  const int32_t steps = (args.depth + kDepth - 1) / kDepth;
  int run = 0;
  TileWork work;
  for (uint32_t round = 0; runs.get(args.list, args.pairing, round, &run, &work); ++round) {
    int32_t panel, row;
    locate<Tile, kFinish>(args, work.panel_block, &panel, &row);
    for (int32_t step = 0; step < steps; ++step) {
      if (round == 0 && step == 2 && !args.settled) wait_barrier(first_info, 0);
      wait_barrier(ring.empty(), ring.parity ^ 1);
      arrive_expecting(ring.full(), Shape<Tile>::kWeightBytes);
#pragma unroll
      for (int unit = 0; unit < kUnits; ++unit) {
        const CUtensorMap* const map = &args.map[kPlain ? panel : unit % 2];
        const uint32_t to = ring.address() + unit * kUnitBytes;
        const int column = step * kDepth, from = row + (kPlain ? unit : unit / 2) * 64;
        if (!args.pairing.paired)
          copy_box_kept(to, map, column, from, work.expert, 0, ring.full(), args.weight_policy);
        else if (unit % 2 == args.pairing.rank())
          copy_box_to(3, to, map, column, from, work.expert, 0, ring.full(), args.weight_policy);
      }
      ring.advance();
    }
  }
}

// Before the wait: the first weights of this block on their way to L2, if each expert has one tile as most have with
// many tokens. If not, they are read for nothing, a few of them.
template <class Tile, Finish kFinish, class T, class Out>
__device__ __forceinline__ void prefetch_weights(const WgmmaArgs<T, Out>& args, int32_t panel_blocks) {
  constexpr bool kPlain = kFinish == Finish::kPlain;
  constexpr int kDepth = 128 / sizeof(T), kUnits = Shape<Tile>::kUnits;
  const int32_t expert = static_cast<int32_t>(blockIdx.x) / panel_blocks;
  if (expert >= args.list.experts) return;
  int32_t panel, row;
  locate<Tile, kFinish>(args, static_cast<int32_t>(blockIdx.x) % panel_blocks, &panel, &row);
  for (int step = 0; step < Tile::kStages && step * kDepth < args.depth; ++step)
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit)
      prefetch_box(&args.map[kPlain ? panel : unit % 2], step * kDepth, row + (kPlain ? unit : unit / 2) * 64, expert,
                   0);
}

// Three warps. Lanes 8i to 8i + 7 copy the 128 bytes of a row.
template <class Tile, class T, class Out>
__device__ __forceinline__ void gather_rows(const WgmmaArgs<T, Out>& args, const auto& runs,
                                            typename Shape<Tile>::Info* infos, Ring& ring, uint32_t info_barriers) {
  constexpr int kDepth = 128 / sizeof(T), kVec = kVec16<T>;
  constexpr int kOwn = (Tile::kTokens + kGatherThreads - 1) / kGatherThreads;
  constexpr int kRowsAtOnce = kGatherThreads / 8, kPasses = (Tile::kTokens + kRowsAtOnce - 1) / kRowsAtOnce;
  int thread = threadIdx.x - kWarp;
  compute_now(thread);
  const int lane = thread % kWarp;
  const int32_t steps = (args.depth + kDepth - 1) / kDepth;
  const uint32_t row0 = thread / 8, chunk = thread % 8;
  // Rows go by 12, so that the swizzle of every other pass differs in bit 2 alone.
  const uint32_t to = Shape<Tile>::kWeightBytes + row0 * 128 + ((chunk ^ (row0 & 7)) << 4);

  // Of what tile number `round` is: full, and 8 bytes on, empty.
  const auto info_barrier = [&](uint32_t round) { return info_barriers + round % kInfos * 16; };
  const auto wait_for_info = [&](uint32_t round) { wait_barrier(info_barrier(round) + 8, round / kInfos % 2 ^ 1); };
  uint32_t round = 0;
  int run = 0;
  for (TileWork work; runs.get(args.list, args.pairing, round, &run, &work); ++round) {
    int32_t ids[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int32_t row = thread + i * kGatherThreads;
      ids[i] = row < work.rows ? args.list.sorted_token_ids[work.first + row] : -1;
    }
    auto& info = infos[round % kInfos];
    wait_for_info(round);
    float factor[kOwn], weight[kOwn];
    int32_t last = 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int32_t row = thread + i * kGatherThreads;
      const bool valid = ids[i] >= 0 && ids[i] < args.list.assignments;
      const uint32_t found = __ballot_sync(~0u, valid);
      if (found) last = row - lane + kWarp - __clz(found);
      uint32_t x_row, slot;
      args.slots_per_row(ids[i], &x_row, &slot);
      factor[i] = weight[i] = 1;
      if (valid) {
        if constexpr (sizeof(T) == 1) factor[i] = args.x_scale[x_row];
        if (args.topk_weights) {
          uint32_t token;
          args.slots(ids[i], &token, &slot);
          weight[i] = args.topk_weights[token * args.topk_weights_stride + slot];
        }
      }
      if (row < Tile::kTokens) {
        info.x[row] = valid ? args.x_rows.chunk(x_row) : kNone;
        info.out[row] = valid ? args.out_rows.chunk(ids[i]) : kNone;
      }
    }
    if (lane == 0) info.rows[thread / kWarp] = last;
    if (thread == 0) {
      info.expert = work.expert;
      info.panel_block = work.panel_block;
    }
    sync_threads(2, kGatherThreads);
    uint32_t from[kPasses];
#pragma unroll
    for (int p = 0; p < kPasses; ++p) {
      const uint32_t row = row0 + p * kRowsAtOnce;
      from[p] = row < Tile::kTokens ? info.x[row] : kNone;
    }
    for (int32_t step = 0; step < steps; ++step) {
      const bool inside = step * kDepth + static_cast<int32_t>(chunk) * kVec < args.depth;
      const char* x = reinterpret_cast<const char*>(args.x) + (inside ? step * 128 + chunk * 16 : 0);
      compute_now(x);  // here, not once for each row
      wait_barrier(ring.empty(), ring.parity ^ 1);
      const uint32_t address = ring.address() + to;
#pragma unroll
      for (int p = 0; p < kPasses; ++p)
        if (from[p] != kNone)
          copy_async((p % 2 ? address ^ 64 : address) + p * kRowsAtOnce * 128, x + uint64_t{from[p]} * 16,
                     inside ? 16 : 0);
      arrive_after_copies(ring.full());
      ring.advance();
      if (step == 0) {
#pragma unroll
        for (int i = 0; i < kOwn; ++i)
          if (thread + i * kGatherThreads < Tile::kTokens)
            info.factor[thread + i * kGatherThreads] = factor[i] * weight[i];
        arrive(info_barrier(round));
      }
    }
  }
  wait_for_info(round);
  if (thread == 0) infos[round % kInfos].expert = -1;
  arrive(info_barrier(round));
}

template <int kN, int kMost>
__device__ __forceinline__ float (&first_of(float (&sums)[kMost]))[kN] {
  return reinterpret_cast<float(&)[kN]>(sums);
}

// sums[t] = weights of unit t of this group times kN rows of x, over the whole depth. Each stage is waited for: the
// other group keeps the tensor cores busy, and the stage is free as soon as it can be.
template <class T, int kN, int kMost>
__device__ __forceinline__ void multiply(float (&sums)[2][kMost], int group, uint32_t weight_bytes, int32_t steps,
                                         Pairing pairing, uint32_t peer, Ring& ring) {
  const auto release = [&] {
    if (threadIdx.x % kWarp <= pairing.paired) arrive_in_cluster(ring.empty() + peer);
  };
#pragma unroll
  for (int t = 0; t < 2; ++t)
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) sums[t][i] = 0;
  for (int32_t step = 0; step < steps; ++step) {
    wait_barrier(ring.full(), ring.parity);
    const uint64_t a = k_major(ring.address() + group * 2 * kUnitBytes), b = k_major(ring.address() + weight_bytes);
    if constexpr (sizeof(T) == 1) {
      // Where the registers hold two parts, one product runs while the one before it is added up; where not, the other
      // group's do. (Halves of the rows would leave more registers, but read weights from shared memory twice.)
      constexpr int kBuffers = kN <= 64 ? 2 : 1;
      float part[kBuffers][kN / 2];
      const auto add = [&](int t) {
#pragma unroll
        for (int i = 0; i < kN / 2; ++i) sums[t][i] += part[t % kBuffers][i];
      };
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k)
          wgmma<T, kN>(part[t % kBuffers], advance(a, t * kUnitBytes + k * 32), advance(b, k * 32), k > 0);
        wgmma_commit();
        if (kBuffers == 1 && t == 0) {
          wgmma_wait<0>();
          add(0);
        }
      }
      if constexpr (kBuffers == 2) {
        wgmma_wait<1>();
        add(0);
      }
      wgmma_wait<0>();
      release();
      add(1);
    } else {
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int t = 0; t < 2; ++t)
          wgmma<T, kN>(first_of<kN / 2>(sums[t]), advance(a, t * kUnitBytes + k * 32), advance(b, k * 32), true);
      wgmma_commit();
      wgmma_wait<0>();
      release();
    }
    ring.advance();
  }
}

// A gate's first factor, x / (1 + 2^-y). For x times the normal distribution function y is an odd polynomial of x, our
// own fit. Its error is at most 6e-5; of the result, 7e-4 from -3 on (a third of what rounding to bf16 may cost) and 1%
// at -4, where that is 1e-4. The gelu of gate.cuh, right in the tail too, has twice the instructions.
template <Finish kFinish>
__device__ __forceinline__ float activate(const auto& args, float x) {
  float slope = args.tanh ? -2.30220820f * fmaf(0.044715f * x, x, 1.0f) : -1.44269504f;
  if constexpr (kFinish == Finish::kErfGate) {
    const float s = fminf(x * x, 36.0f);
    slope = fmaf(fmaf(1.12140897e-3f, s, -0.107494490f), s, -2.30047792f);
  }
  return x * fast_reciprocal(1.0f + fast_exp2(slope * x));
}

// The 16 values that a thread has of 32 rows from `base` on.
template <int kFrom = 0, int kMost>
__device__ __forceinline__ void take_rows(float (&values)[2][16], const float (&sums)[2][kMost], int base) {
  if constexpr (kFrom + 16 < kMost)
    if (base != 2 * kFrom) return take_rows<kFrom + 16>(values, sums, base);
  if constexpr (kMost > 32) compute_now(base);  // a jump: without it each value is selected
#pragma unroll
  for (int t = 0; t < 2; ++t)
#pragma unroll
    for (int i = 0; i < 16; ++i) values[t][i] = kFrom + i < kMost ? sums[t][min(kFrom + i, kMost - 1)] : 0;
}

// To out: two sums of their own, or one of both, 128 or 64 columns of the group. Its values are turned round by way of
// shared memory, some rows at a time, and leave in whole lines; 32 bytes at a time they took as long as the products.
// A loop over 32 rows at a time, not unrolled: straight code for 128 rows is read from memory for every tile.
template <Finish kFinish, int kMost, class T, class Out>
__device__ __forceinline__ void finish(const WgmmaArgs<T, Out>& args, const float (&sums)[2][kMost],
                                       const float (&scale)[2][2], const auto& info, int32_t rows, uint32_t staged,
                                       int group, int32_t panel, int32_t column, uint32_t* buffer) {
  constexpr bool kPlain = kFinish == Finish::kPlain, kScaled = sizeof(T) == 1, kShort = sizeof(Out) == 2;
  constexpr int kResults = kPlain ? 2 : 1, kRowBytes = kResults * 64 * sizeof(Out), kRows = 4096 / kRowBytes;
  constexpr uint32_t kChunks = kRowBytes / 16;
  uint32_t thread = threadIdx.x % 128;
  compute_now(thread);  // what follows from it is not kept in registers while products run
  const uint32_t lane = thread % kWarp, warp = thread / kWarp, g = lane / 4, q = lane % 4;
  // Chunk c of row r lies at chunk c ^ turn(r).
  const auto turn = [](uint32_t row) { return kShort ? row % 8 : row / 2 % 4 * 2; };
  const uint32_t write_row = lane / 16 * 8 + lane % 8, write_chunk = warp * 2 + lane / 8 % 2;
  const uint32_t write = staged + write_row * kRowBytes + ((write_chunk ^ turn(write_row)) << 4);
  const uint32_t read_row = thread / kChunks, read_chunk = thread % kChunks;
  char* const out = reinterpret_cast<char*>(args.out + int64_t{panel} * args.width + column) + read_chunk * 16;
  const bool inside = column + static_cast<int32_t>(read_chunk * (16 / sizeof(Out))) < args.width;

#pragma unroll 1
  for (int base = 0; base < rows; base += 32) {
    float values[2][16];  // of rows 8 (i / 4) + 2 q + i % 2, columns g + 8 (i / 2 % 2)
    take_rows(values, sums, base);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int h = i / 2 % 2;
      float a = values[0][i], b = values[1][i];
      if constexpr (kScaled || kPlain) {
        const float factor = info.factor[base + i / 4 * 8 + q * 2 + i % 2];
        a *= factor;
        b *= factor;
      }
      if constexpr (kPlain) {
        values[0][i] = kScaled ? a * scale[0][h] : a;
        values[1][i] = kScaled ? b * scale[1][h] : b;
      } else {
        b = kScaled ? fmaf(b, scale[1][h], args.residual) : b + args.residual;
        values[0][i] = activate<kFinish>(args, kScaled ? a * scale[0][h] : a) * b;
      }
    }
#pragma unroll
    for (int some = 0; some < 32; some += kRows) {
      if (base + some >= rows) break;  // the same for the whole group
      const uint32_t to = *buffer * 4096;
      *buffer ^= 1;
#pragma unroll
      for (int result = 0; result < kResults; ++result) {
        const float* const v = &values[result][some / 2];
        if constexpr (kShort) {
#pragma unroll
          for (int i = 0; i < kRows / 2; i += 8)
            store_transposed(write + to + i * 2 * kRowBytes + result * 128, from_float2<Out>(v[i], v[i + 1]),
                             from_float2<Out>(v[i + 2], v[i + 3]), from_float2<Out>(v[i + 4], v[i + 5]),
                             from_float2<Out>(v[i + 6], v[i + 7]));
        } else {
#pragma unroll
          for (int i = 0; i < kRows / 2; ++i) {
            const uint32_t row = i / 4 * 8 + q * 2 + i % 2, chunk = result * 16 + warp * 4 + i / 2 % 2 * 2 + g / 4;
            store_shared(staged + to + row * kRowBytes + ((chunk ^ turn(row)) << 4) + g % 4 * 4, v[i]);
          }
        }
      }
      sync_threads(4 + group, 128);
#pragma unroll
      for (uint32_t i = 0; i < kRows * kChunks / 128; ++i) {
        const uint32_t row = read_row + i * (128 / kChunks), at = base + some + row;
        const uint4 chunk = load_shared(staged + to + row * kRowBytes + ((read_chunk ^ turn(row)) << 4));
        const uint32_t place = at < static_cast<uint32_t>(rows) ? info.out[at] : kNone;
        if (place != kNone && inside) store_global(out + uint64_t{place} * 16, chunk, args.out_policy);
      }
    }
  }
}

template <class Tile, Finish kFinish, class T, class Out>
__device__ __forceinline__ void consume(const WgmmaArgs<T, Out>& args, typename Shape<Tile>::Shared* shared, Ring& ring,
                                        Ring& info_ring) {
  constexpr bool kPlain = kFinish == Finish::kPlain;
  const int warp = threadIdx.x / kWarp - kProducerThreads / kWarp, lane = threadIdx.x % kWarp;
  const int group = Tile::kGroups == 1 ? 0 : __shfl_sync(~0u, warp / 4, 0);  // the same for a warp, it shows
  const int32_t steps = (args.depth + 128 / sizeof(T) - 1) / (128 / sizeof(T));
  const uint32_t staged = shared_address(shared->staged[group]);
  const uint32_t own = shared_address(shared);
  const uint32_t peer = lane == 0 ? 0 : address_in(own, args.pairing.rank() ^ args.pairing.paired) - own;
  uint32_t buffer = 0;
  for (bool more = true; more;) {
    const auto& info = shared->info[info_ring.stage];
    wait_barrier(info_ring.full(), info_ring.parity);
    const int32_t expert = info.expert, rows = max(info.rows[0], max(info.rows[1], info.rows[2]));
    more = expert >= 0;
    if (more) {
      int32_t panel, row;
      locate<Tile, kFinish>(args, info.panel_block, &panel, &row);
      const int32_t column = row + group * (kPlain ? 128 : 64);
      float scale[2][2];
      if constexpr (sizeof(T) == 1) {
#pragma unroll
        for (int t = 0; t < 2; ++t)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int from = kPlain ? panel : t;
            const int32_t c = min(column + (kPlain ? t * 64 : 0) + warp % 4 * 16 + h * 8 + lane / 4, args.width - 1);
            scale[t][h] = args.scale[from][expert * args.scale_stride[from] + c];
          }
      }
      float sums[2][Tile::kTokens / 2];
      const auto multiply_by = [&]<int kN>() {
        multiply<T, kN>(sums, group, Shape<Tile>::kWeightBytes, steps, args.pairing, peer, ring);
      };
      const int sixteens = max((rows + 15) / 16, 1);
      [&]<int... i>(std::integer_sequence<int, i...>) {
        ((sixteens == i + 1 ? (multiply_by.template operator()<16 * (i + 1)>(), true) : false) || ...);
      }
      (std::make_integer_sequence<int, Tile::kTokens / 16>());
      finish<kFinish>(args, sums, scale, info, rows, staged, group, panel, column, &buffer);
    }
    arrive(info_ring.empty());  // each thread for what it has read
    info_ring.advance();
  }
}

template <class T, class Out, class Tile, Finish kFinish>
__global__ void __launch_bounds__(Shape<Tile>::kThreads, Tile::kBlocks)
    moe_wgmma_kernel(const __grid_constant__ WgmmaArgs<T, Out> args) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)  // elsewhere it is never launched
  extern __shared__ __align__(1024) unsigned char memory[];
  auto* const shared = reinterpret_cast<typename Shape<Tile>::Shared*>(memory);
  Rings<Tile> rings(shared);
  const Pairing pairing = args.pairing;
  if (threadIdx.x == 0) rings.init(pairing);
  const auto panel_blocks = [&] { return args.blocks_per_panel * (kFinish == Finish::kPlain ? args.panels : 1); };
  if (args.one && threadIdx.x == kWarp) prefetch_weights<Tile, kFinish>(args, panel_blocks());
  if (pairing.paired) cluster_sync();
  __syncthreads();
  if (!args.settled) wait_for_predecessor();
  release_successor();

  shared->runs.template build<Shape<Tile>::kThreads>(args.list, panel_blocks(), pairing, args.several);
  __syncthreads();
  if (threadIdx.x < kProducerThreads) {
    if constexpr (Tile::kBlocks == 1) leave_registers<40>();
    if (threadIdx.x >= kWarp) {
      wait_for_predecessor();  // for x; consumers write nothing before the first rows are there
      gather_rows<Tile>(args, shared->runs, shared->info, rings.stages, rings.infos.barriers);
    } else if (threadIdx.x == 0) {
      stream_weights<Tile, kFinish>(args, shared->runs, rings.stages, rings.infos.barriers);
    }
  } else {
    if constexpr (Tile::kBlocks == 1) take_registers<232>();
    consume<Tile, kFinish>(args, shared, rings.stages, rings.infos);
  }
  __syncwarp();
  if (pairing.paired) cluster_sync();  // the other block's copies and arrivals come here
#endif
}

template <class T, class Out, class Tile, Finish kFinish>
void launch_finish(Stream stream, const MoeArgs& a, const WgmmaArgs<T, Out>& args) {
  const int64_t tiles = (a.positions / Tile::kTokens + a.positions / a.block_m + 1) * args.blocks_per_panel * a.panels;
  const int cluster = args.pairing.paired ? 2 : 1;
  const int64_t blocks = std::min<int64_t>(tiles * cluster, sm_count() / cluster * cluster * int64_t{Tile::kBlocks});
  launch<moe_wgmma_kernel<T, Out, Tile, kFinish>>(
      stream, {blocks, Shape<Tile>::kThreads, 1, Shape<Tile>::kSharedBytes, cluster}, args);
}

inline ChunkRows chunk_rows(const Rows& rows, int64_t size) {
  ChunkRows chunks;
  chunks.inner = Divider<uint32_t>(std::max<int64_t>(1, rows.inner));
  chunks.inner_stride = rows.inner_stride * size / 16;
  chunks.outer_stride = rows.outer_stride * size / 16;
  return chunks;
}

template <class T, class Out, class Tile>
void launch_tile(Stream stream, const MoeArgs& a) {
  WgmmaArgs<T, Out> args{};
  const int rows = (a.gate ? 64 : 128) * Tile::kGroups;
  for (int i = 0; i < 2; ++i) {
    const ExpertWeights& w = a.panel[i < a.panels ? i : 0];
    const int64_t row_stride = a.width == 1 ? a.depth : w.row_stride;
    const int64_t expert_stride = a.experts == 1 ? row_stride * a.width : w.expert_stride;
    args.map[i] = tensor_map({dtype_of<T>,
                              w.data,
                              {a.depth, a.width, a.experts, 1},
                              {1, row_stride, expert_stride, expert_stride},
                              {128 / sizeof(T), 64, 1, 1}});
    args.scale[i] = w.scale;
    args.scale_stride[i] = w.scale_stride;
  }
  args.out = a.out.ptr<Out>();
  args.x = static_cast<const T*>(a.x);
  args.x_scale = a.x_scale;
  args.topk_weights = a.topk_weights;
  args.topk_weights_stride = a.topk_weights_stride;
  args.out_rows = chunk_rows(a.out_rows, sizeof(Out));
  args.x_rows = chunk_rows(a.x_rows, sizeof(T));
  args.slots = Divider<uint32_t>(a.slots);
  args.slots_per_row = Divider<uint32_t>(a.slots_per_row);
  args.list = {a.sorted_token_ids,
               a.expert_ids,
               a.num_tokens_post_pad,
               static_cast<int32_t>(a.positions),
               static_cast<int32_t>(ceil_div(a.positions, a.block_m)),
               static_cast<int32_t>(a.block_m),
               static_cast<int32_t>(a.assignments()),
               static_cast<int32_t>(a.experts)};
  args.width = static_cast<int32_t>(a.width);
  args.depth = static_cast<int32_t>(a.depth);
  args.panels = a.panels;
  args.blocks_per_panel = static_cast<int32_t>(ceil_div(a.width, rows));
  args.residual = a.gate == Gate::kGeluResidual ? 1 : 0;
  args.tanh = a.gate == Gate::kGeluTanh;
  args.several = 4 * a.assignments() > 3 * a.experts * Tile::kTokens;
  // Two tiles of each expert at least: 1280 tokens in fp8 109 us and not 119, 740 tokens 90 and not 77.
  args.pairing.paired = Tile::kGroups == 2 && a.assignments() > a.experts * Tile::kTokens;
  args.settled = a.settled;
  args.one = !args.several && a.assignments() >= 6 * a.experts;
  // Weights that are read once do not drive out what the next kernel reads: 3% at 64 tokens.
  args.weight_policy = args.several ? kKeepAsUsual : kEvictFirst;
  args.out_policy = args.several ? kKeepAsUsual : kEvictLast;
  if constexpr (sizeof(T) == 1 || sizeof(Out) == 2) {
    if (a.gate == Gate::kGeluResidual || a.gate == Gate::kGelu)
      return launch_finish<T, Out, Tile, Finish::kErfGate>(stream, a, args);
    if (a.gate) return launch_finish<T, Out, Tile, Finish::kSigmoidGate>(stream, a, args);
  }
  launch_finish<T, Out, Tile, Finish::kPlain>(stream, a, args);
}

template <class T, class Tile>
void launch_moe_wgmma(Stream stream, const MoeArgs& a) {
  using Short = std::conditional_t<sizeof(T) == 1, bf16, T>;
  a.out.dtype == DType::kF32 ? launch_tile<T, float, Tile>(stream, a) : launch_tile<T, Short, Tile>(stream, a);
}

}  // namespace kestrel::cuda
