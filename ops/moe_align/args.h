// What both devices' moe_align works on. Strides are in elements; one without LoRAs has loras = 1 and no lora_of.
#pragma once

#include <kestrel/tensor.h>

namespace kestrel {

inline constexpr int64_t kMaxExperts = 1024;
inline constexpr int64_t kAlignInOne = 8192;  // assignments that one kernel sorts, without a workspace
inline constexpr int64_t kAlignChunks = 128;  // above: pieces of them, each counted, then placed, by a block

struct MoeAlignArgs {
  int32_t* sorted;
  int32_t* expert_ids;
  void* total;
  uint32_t* counts;  // [loras, chunks, experts], the workspace
  const int32_t* ids;
  const int32_t* lora_of;
  const int32_t* expert_map;
  int64_t sorted_stride, expert_ids_stride, total_stride;  // from one LoRA to the next
  int64_t ids_stride, lora_of_stride;                      // from one token to the next
  int64_t sorted_size, expert_ids_size;                    // of one LoRA
  int64_t most;                                            // places that groups with their padding can take
  int64_t slots, assignments, experts, block_size, loras;
  bool wide_total;
};

}  // namespace kestrel
