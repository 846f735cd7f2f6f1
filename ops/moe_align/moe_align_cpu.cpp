#include <algorithm>

#include "kestrel/cpu/parallel.h"
#include "ops/moe_align/args.h"

namespace KESTREL_CPU {
namespace {

// body(assignment, expert), ascending, for all of this LoRA whose expert is local.
template <class Body>
void for_each_assignment(const MoeAlignArgs& a, int64_t lora, Body&& body) {
  const int64_t tokens = a.slots ? a.assignments / a.slots : 0;
  for (int64_t t = 0; t < tokens; ++t) {
    if (a.lora_of && a.lora_of[t * a.lora_of_stride] != lora) continue;
    const int32_t* ids = a.ids + t * a.ids_stride;
    for (int64_t k = 0; k < a.slots; ++k) {
      const int64_t expert = ids[k];
      if (expert < 0 || expert >= a.experts || (a.expert_map && a.expert_map[expert] < 0)) continue;
      body(t * a.slots + k, expert);
    }
  }
}

void align(const MoeAlignArgs& a, int64_t lora) {
  int32_t* sorted = a.sorted + lora * a.sorted_stride;
  int32_t* expert_ids = a.expert_ids + lora * a.expert_ids_stride;
  std::fill_n(sorted, a.sorted_size, static_cast<int32_t>(a.assignments));
  std::fill_n(expert_ids, a.expert_ids_size, 0);
  int64_t next[kMaxExperts] = {};  // counts, then the place of each expert's next assignment
  for_each_assignment(a, lora, [&](int64_t, int64_t expert) { ++next[expert]; });
  int64_t blocks = 0;
  for (int64_t e = 0; e < a.experts; ++e) {
    const int64_t count = (next[e] + a.block_size - 1) / a.block_size;
    std::fill_n(expert_ids + blocks, count, a.expert_map ? a.expert_map[e] : static_cast<int32_t>(e));
    next[e] = blocks * a.block_size;
    blocks += count;
  }
  for_each_assignment(
      a, lora, [&](int64_t assignment, int64_t expert) { sorted[next[expert]++] = static_cast<int32_t>(assignment); });
  const int64_t total = blocks * a.block_size;
  if (a.wide_total)
    static_cast<int64_t*>(a.total)[lora * a.total_stride] = total;
  else
    static_cast<int32_t*>(a.total)[lora * a.total_stride] = static_cast<int32_t>(total);
}

}  // namespace

void moe_align(const MoeAlignArgs& args) {
  parallel_for(args.loras, 1 + 16384 / (args.assignments + args.sorted_size + 1), [&](int64_t first, int64_t last) {
    for (int64_t lora = first; lora < last; ++lora) align(args, lora);
  });
}

}  // namespace KESTREL_CPU
