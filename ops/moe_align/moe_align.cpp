#include "ops/moe_align/moe_align.h"

#include <algorithm>
#include <limits>

#include "kestrel/contract.h"
#include "kestrel/cpu/target.h"
#include "kestrel/cuda.h"
#include "ops/moe_align/args.h"

KESTREL_CPU_TWIN(moe_align, void(const kestrel::MoeAlignArgs& args));

namespace kestrel {
namespace cuda {
void moe_align(Stream stream, const MoeAlignArgs& args);
}

namespace {

constexpr int64_t kInt32Max = std::numeric_limits<int32_t>::max();

struct Outputs {
  Tensor sorted_token_ids, expert_ids, num_tokens_post_pad;
};

void check_size(Contract& c, const char* name, const Tensor& out, int64_t needed) {
  if (out.size(-1) < needed)
    c.fail(ErrorKind::kValueError, name, "hold at least " + std::to_string(needed) + " elements",
           std::to_string(out.size(-1)));
}

void run(Contract& c, Stream stream, const Outputs& out, const std::optional<Tensor>& workspace, const Tensor& topk_ids,
         const Tensor* token_lora_mapping, int64_t num_experts, int64_t block_size,
         const std::optional<Tensor>& expert_map) {
  const bool lora = token_lora_mapping;
  const int rank = lora ? 2 : 1;
  Dim T("T"), K("K"), loras("max_loras");
  c.in("topk_ids", topk_ids).dtype({DType::kI32}).shape({T, K}).last_contiguous();
  if (lora) c.in("token_lora_mapping", *token_lora_mapping).dtype({DType::kI32}).shape({T});
  c.require(num_experts >= 1 && num_experts <= kMaxExperts, "num_experts", "from 1 to 1024", num_experts);
  c.require(block_size >= 1 && block_size <= kInt32Max, "block_size", "from 1 to 2^31 - 1", block_size);
  const int64_t assignments = topk_ids.numel();
  c.require(assignments <= kInt32Max, "topk_ids", "of less than 2^31 elements", assignments);
  const int64_t most = assignments + std::min(assignments, num_experts) * (block_size - 1);

  const Tensor &sorted = out.sorted_token_ids, &experts = out.expert_ids, &total = out.num_tokens_post_pad;
  c.out("sorted_token_ids", sorted).dtype({DType::kI32}).rank(rank, rank).last_contiguous();
  if (lora) loras.size = sorted.shape[0];
  check_size(c, "sorted_token_ids", sorted, most);
  Arg experts_arg = c.out("expert_ids", experts).dtype({DType::kI32}).rank(rank, rank).last_contiguous();
  if (lora) experts_arg.shape({loras, experts.shape[1]});
  check_size(c, "expert_ids", experts, most / block_size);
  Arg total_arg = c.out("num_tokens_post_pad", total).dtype({DType::kI32, DType::kI64});
  lora ? total_arg.shape({loras}) : total_arg.shape({1});
  if (most > kInt32Max) total_arg.dtype({DType::kI64});
  if (lora) c.require(loras <= 65535, "sorted_token_ids", "for at most 65535 LoRAs", static_cast<int64_t>(loras));

  const bool mapped = expert_map && !expert_map->empty();
  if (expert_map) {
    Arg map = c.in("expert_map", *expert_map).dtype({DType::kI32}).rank(1, 1).last_contiguous();
    if (mapped) map.shape({num_experts});
  }
  if (lora) c.indices(stream, "token_lora_mapping", *token_lora_mapping, 0, loras, true);

  MoeAlignArgs args{};
  args.loras = lora ? int64_t{loras} : 1;
  if (!c.on_cpu()) {
    constexpr const char* kLong = "moe_align_workspace_bytes() long";
    const int64_t needed = moe_align_workspace_bytes(assignments, num_experts, args.loras);
    c.require(needed == 0 || workspace, "workspace", kLong, int64_t{0});
    if (workspace) {
      c.workspace(*workspace, needed, kLong, 4);
      args.counts = workspace->ptr<uint32_t>();
    }
  }

  args.sorted = sorted.ptr<int32_t>();
  args.expert_ids = experts.ptr<int32_t>();
  args.total = total.data;
  args.ids = topk_ids.ptr<int32_t>();
  args.lora_of = lora ? token_lora_mapping->ptr<int32_t>() : nullptr;
  args.expert_map = mapped ? expert_map->ptr<int32_t>() : nullptr;
  args.sorted_stride = lora ? sorted.stride[0] : 0;
  args.expert_ids_stride = lora ? experts.stride[0] : 0;
  args.total_stride = lora ? total.stride[0] : 0;
  args.ids_stride = topk_ids.stride[0];
  args.lora_of_stride = lora ? token_lora_mapping->stride[0] : 0;
  args.sorted_size = sorted.size(-1);
  args.expert_ids_size = experts.size(-1);
  args.most = most;
  args.slots = K;
  args.assignments = assignments;
  args.experts = num_experts;
  args.block_size = block_size;
  args.wide_total = total.dtype == DType::kI64;
  if (args.loras == 0) return;
  if (c.on_cpu()) return cpu::moe_align(args);
  if constexpr (kHasCuda) {
    DeviceGuard guard(topk_ids.device);
    cuda::moe_align(stream, args);
  }
}

}  // namespace

int64_t moe_align_workspace_bytes(int64_t assignments, int64_t num_experts, int64_t max_loras) {
  if (assignments <= kAlignInOne) return 0;
  return kAlignChunks * num_experts * max_loras * static_cast<int64_t>(sizeof(uint32_t));
}

void moe_align_block_size(Stream stream, Tensor sorted_token_ids, Tensor expert_ids, Tensor num_tokens_post_pad,
                          std::optional<Tensor> workspace, Tensor topk_ids, int64_t num_experts, int64_t block_size,
                          std::optional<Tensor> expert_map) {
  Contract c("moe_align_block_size");
  run(c, stream, {sorted_token_ids, expert_ids, num_tokens_post_pad}, workspace, topk_ids, nullptr, num_experts,
      block_size, expert_map);
}

void moe_lora_align_block_size(Stream stream, Tensor sorted_token_ids, Tensor expert_ids, Tensor num_tokens_post_pad,
                               std::optional<Tensor> workspace, Tensor topk_ids, Tensor token_lora_mapping,
                               int64_t num_experts, int64_t block_size, std::optional<Tensor> expert_map) {
  Contract c("moe_lora_align_block_size");
  run(c, stream, {sorted_token_ids, expert_ids, num_tokens_post_pad}, workspace, topk_ids, &token_lora_mapping,
      num_experts, block_size, expert_map);
}

}  // namespace kestrel
