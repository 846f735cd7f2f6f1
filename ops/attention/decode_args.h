// What the decode kernels are told. The cache is addressed in units of 16 bytes: 32 bits reach 64 GB.
#pragma once

#include "kestrel/hopper/divide.cuh"
#include "ops/attention/plan.h"

namespace kestrel::cuda {

// Constant memory comes in lines of 64 bytes, cold at every launch: what a plain decode needs stands first, and
// `features` says what else to look at.
struct DecodeArgs {
  const char *k, *v;
  const int32_t *table, *lengths;  // or null
  const void* q;
  void* out;
  uint32_t page, token, head;  // strides of k and v, in units of 16 bytes; without pages, a page is a sequence
  uint32_t table_stride;
  uint32_t q_batch, q_head, out_batch, out_head;  // strides in elements
  Divider<uint32_t> by_page_size;
  int pages, k_len, q_len;
  int group, rows;             // query heads per key head; their number times the queries
  float score_scale, v_scale;  // score_scale in units of log 2, but for a softcap, which comes first
  int fresh;                   // keys that the predecessor may be writing; -1: all
  uint32_t features;
  // Splits of a sequence: `splits` of them, or, with a share, one per so many keys, up to `splits`; or, with slots, as
  // many as fill so many blocks evenly, none of fewer than `least` keys.
  int splits;
  int part_log, split_log;  // lanes that join the parts of a block or cluster, and those of the splits: powers of two
  int head_size;

  enum Feature : uint32_t { kCausal = 1, kWindow = 2, kPrefix = 4, kSoftcap = 8, kSink = 16, kLse = 32, kScales = 64 };
  __device__ __forceinline__ bool has(uint32_t of) const { return features & of; }
  __device__ __forceinline__ bool splits_vary() const { return slots || share; }  // with the lengths

  int batch, groups;  // groups: the blocks of one sequence, if it is not split
  int share, slots, least;
  Divider<uint32_t> by_splits;  // of a cluster
  float4* partials;             // of the splits, in the workspace
  uint64_t* counters;
  Divider<uint32_t> by_row_tiles, by_group;
  uint32_t q_token, out_token;
  int window_left, window_right, prefix_len;  // -1: none
  float softcap;
  const int32_t* prefix_lens;  // or null
  const float *k_scale_at, *v_scale_at;
  const void* sink;
  float* lse;
  AttentionStrides lse_stride;
  DType sink_dtype;
};

// The launch of a compiled tile: compiled_decode.h lists them.
template <class Q, class KV, int kSize, int kHeads, int kBatches, Merge kMerge, bool kWhole, int kMostThreads>
struct DecodeTile;
template <class Tile>
void launch_decode(Stream stream, DecodeArgs& args, const DecodePlan& plan);

}  // namespace kestrel::cuda
