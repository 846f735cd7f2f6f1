// What the rules choose for a problem: a kernel's tile among those compiled (tiles.json, of which
// tools/attention_tiles.py writes the C++ tables) and how a launch of it is spread. Host code alone: builds without
// CUDA can plan, too, and `kestrel-kernels info attention` shows plans.
#pragma once

#include <cstdint>
#include <optional>

#include "ops/attention/problem.h"

namespace kestrel {

// How keys and values come into shared memory: in boxes of the copy engine; or row by row, as they are or converted.
enum class KeySource { kBoxes, kRows, kE4m3Rows };

struct PrefillRow {
  int head_size;  // and smaller ones
  KeySource keys;
  int groups;       // the most in a block, of 64 queries each
  int stages;       // of the rings of keys and values
  int query_slots;  // blocks' worth of queries in shared memory
  int shared_bytes, registers, loader_registers;
};

// How a launch spreads its work.
struct PrefillShape {
  int groups;       // of 64 queries in a block
  bool paired;      // see PrefillArgs
  bool turns;       // likewise
  bool persistent;  // a block on each SM takes several tiles of work; otherwise there is a block for each
};

struct PrefillPlan {
  int tile;  // of kPrefillRows
  PrefillShape shape;
};

// Blocks' worth of work for each head: of one sequence, or of all packed ones, each of which may end with a part.
int64_t row_tiles_of(const AttentionProblem& problem, int groups);
KESTREL_API int64_t prefill_blocks(const AttentionProblem& problem, const PrefillShape& shape, int64_t sms);

// Where the kernel serves the problem.
std::optional<PrefillPlan> prefill_plan(const AttentionProblem& problem, int64_t sms);
KESTREL_API const PrefillRow& prefill_row(int tile);

struct DecodeHints {
  int64_t most_keys;       // the host's bound on the lengths
  int64_t num_splits = 0;  // 0: chosen here
  std::optional<int64_t> fresh_tokens = {};
  bool batch_invariant = false;
  void* workspace = nullptr;  // of kAttentionWorkspaceBytes, with anything in it; without one, only clusters split
};

constexpr int64_t kAttentionWorkspaceBytes = 8 << 20;

// Who joins the parts of a row: the block that has them all, the blocks of a cluster, or the last block to arrive.
enum class Merge { kBlock, kCluster, kGrid };
constexpr int kMerges = 3;
constexpr int kMostSplits = 64;

struct DecodeRow {
  int size;     // head size, rounded up
  bool whole;   // it is the head size
  int heads;    // key heads in a block, with one row each; 0: one, with several rows
  int batches;  // of 16 keys, in a warp's step
  int most_threads;
  unsigned keys, merges;    // bits: 1 for 16-bit keys, 2 for e4m3; 1 << Merge
  int64_t above, up_to;     // keys of a sequence; up_to 0: any number
  int64_t least_keys;       // of all heads of all sequences together
  int least_blocks_per_sm;  // of unsplit ones
  int warps;                // where the block merges; 0: by the rule

  constexpr int tokens() const { return batches * 16 / (heads > 1 ? heads : 1); }  // of a warp's step
};

constexpr const char* kDecodeKernel = "FlashAttentionDecodeSm90";
constexpr const char* kSplitKernel = "FlashAttentionDecodeSm90PersistentSplitFused";
constexpr const char* kPrefillKernel = "FlashAttentionFwd";
constexpr const char* kPlainKernel = "FlashAttentionPlain";

struct DecodePlan {
  int tile;  // of kDecodeRows
  Merge merge = Merge::kBlock;
  int warps = 4;
  int splits = 0, share = 0, slots = 0;  // as in DecodeArgs; a cluster is as large as its splits

  constexpr const char* kernel() const { return merge == Merge::kBlock ? kDecodeKernel : kSplitKernel; }
};

// Where the kernels can take the problem.
std::optional<DecodePlan> decode_plan(const AttentionProblem& problem, const DecodeHints& hints, int64_t sms);
KESTREL_API const DecodeRow& decode_row(int tile);

// Of a launch. rows: query heads of a key head times queries; groups: blocks of one sequence, were it not split.
KESTREL_API int64_t decode_groups(const DecodeRow& tile, int64_t k_heads, int64_t rows);
KESTREL_API int64_t decode_blocks(const DecodePlan& plan, int64_t groups, int64_t batch);
// Of sequences of so many keys each, all alike; the device plans by the lengths there.
KESTREL_API int64_t decode_splits(const DecodePlan& plan, int64_t groups, int64_t batch, int64_t keys);
KESTREL_API int64_t decode_shared_bytes(const DecodePlan& plan, int64_t rows);
int64_t decode_split_bytes(const DecodePlan& plan);  // that a split of a group leaves in the workspace

// One of the two, or the plain kernel.
struct AttentionPlan {
  std::optional<DecodePlan> decode;
  std::optional<PrefillPlan> prefill;
};
KESTREL_API AttentionPlan attention_plan(const AttentionProblem& problem, const DecodeHints& hints, int64_t sms);

}  // namespace kestrel
