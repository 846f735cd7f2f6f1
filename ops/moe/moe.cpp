#include "ops/moe/moe.h"

#include <algorithm>

#include "kestrel/contract.h"
#include "kestrel/cpu/target.h"
#include "kestrel/cuda.h"
#include "kestrel/indices.h"
#include "ops/moe/operands.h"

KESTREL_CPU_TWIN(moe, void(const kestrel::MoeArgs& args));

namespace kestrel {
namespace cuda {
void moe(Stream stream, const MoeArgs& args);
}

namespace {

struct Alignment {
  Tensor topk_weights;
  std::optional<Tensor> topk_ids;
  Tensor sorted_token_ids, expert_ids, num_tokens_post_pad;
  int64_t block_m, tile;
};

void check_x(Contract& c, const Operand& x, MoeArgs* args) {
  Arg arg = c.in(x.name, x.tensor);
  if (x.scale)
    arg.dtype({DType::kE4M3, DType::kU8});
  else
    arg.dtype({DType::kBF16, DType::kF16});
  arg.rank(2, 3).rows(&args->x_rows);
  args->dtype = x.scale ? DType::kE4M3 : x.tensor.dtype;
  args->x = x.tensor.data;
  args->depth = x.tensor.size(-1);
  if (!x.scale) return;
  c.in(x.scale_name, *x.scale).dtype({DType::kF32}).contiguous();
  c.require(x.scale->numel() == args->x_rows.count, x.scale_name, "one scale for each row", x.scale->numel());
  args->x_scale = x.scale->ptr<float>();
}

void check_routing(Contract& c, const Alignment& a, MoeArgs* args) {
  Dim tokens("T"), slots("K");
  c.in("topk_weights", a.topk_weights).dtype({DType::kF32}).shape({tokens, slots}).last_contiguous();
  if (a.topk_ids) c.in("topk_ids", *a.topk_ids).dtype({DType::kI32}).shape({tokens, slots});
  args->tokens = tokens;
  args->slots = slots;
}

void check_alignment(Contract& c, const Alignment& a, MoeArgs* args) {
  c.in("sorted_token_ids", a.sorted_token_ids).dtype({DType::kI32}).rank(1, 1).contiguous();
  c.in("expert_ids", a.expert_ids).dtype({DType::kI32}).rank(1, 1).contiguous();
  c.in("num_tokens_post_pad", a.num_tokens_post_pad).dtype({DType::kI32}).shape({1});
  c.require(a.block_m > 0 && a.block_m < int64_t{1} << 31, "block_m", "a positive 32-bit number", a.block_m);
  args->sorted_token_ids = a.sorted_token_ids.ptr<int32_t>();
  args->expert_ids = a.expert_ids.ptr<int32_t>();
  args->num_tokens_post_pad = a.num_tokens_post_pad.ptr<int32_t>();
  args->block_m = a.block_m;
  args->positions = std::min(a.sorted_token_ids.shape[0], a.expert_ids.shape[0] * a.block_m);
}

// [T, K, columns], or the same with tokens and slots as one dimension; with reduce [T, columns].
void check_out(Contract& c, DType dtype, int64_t columns, MoeArgs* args) {
  Arg arg = c.out("out", args->out);
  arg.dtype({dtype});
  if (args->reduce)
    arg.shape({args->tokens, columns});
  else if (args->out.rank == 2)
    arg.shape({args->assignments(), columns});
  else
    arg.shape({args->tokens, args->slots, columns});
  arg.rows(&args->out_rows);
}

// What the list says as far as it is in use. On CUDA only where KESTREL_CHECK=1.
void check_indices(Contract& c, Stream stream, const Alignment& a, const MoeArgs& args) {
  c.indices(stream, "num_tokens_post_pad", a.num_tokens_post_pad, 0, args.positions + 1, false);
  if (!checks_indices(stream, c.on_cpu())) return;
  const int32_t used = *HostCopy(stream, a.num_tokens_post_pad).ptr<int32_t>();
  Tensor ids = a.sorted_token_ids, experts = a.expert_ids;
  ids.shape[0] = used;
  experts.shape[0] = (used + args.block_m - 1) / args.block_m;
  c.indices(stream, "sorted_token_ids", ids, 0, args.assignments() + 1, false);
  c.indices(stream, "expert_ids", experts, 0, args.experts, true);
}

void run(Stream stream, const Contract& c, const MoeArgs& args) {
  if (args.out.empty()) return;
  if (c.on_cpu()) {
    moe_note_kernel("cpu");
    return cpu::moe(args);
  }
  if constexpr (kHasCuda) {
    DeviceGuard guard(args.out.device);
    cuda::moe(stream, args);
  }
}

void up(Contract& c, Stream stream, Tensor out, const Operand& x, const Operand& w1, const std::optional<Operand>& w2,
        const Alignment& alignment, std::string_view activation) {
  MoeArgs args;
  args.out = out;
  args.gate = gate_named(c, activation, true);
  args.panels = 2;
  check_x(c, x, &args);
  check_routing(c, alignment, &args);
  c.in(x.name, x.tensor).shape({args.tokens, args.depth});
  args.slots_per_row = args.slots;
  Dim experts("E"), rows(w2 ? "I" : "2I");
  args.panel[0] = check_weights(c, w1, args, &experts, &rows);
  args.experts = experts;
  args.width = rows;
  if (w2) {
    args.panel[1] = check_weights(c, *w2, args, &experts, &rows);
  } else {
    c.require(rows % 2 == 0, w1.name, "two halves high without w2: an even number of rows", rows);
    args.width = rows / 2;
    args.panel[1] = from_row(args.panel[0], args.width, args.dtype);
  }
  check_alignment(c, alignment, &args);
  check_tile(c, alignment.tile, {args.experts, args.depth, args.width, args.dtype}, false, &args);
  check_out(c, x.scale ? DType::kBF16 : args.dtype, args.gate ? args.width : 2 * args.width, &args);
  check_indices(c, stream, alignment, args);
  run(stream, c, args);
}

void down(Contract& c, Stream stream, Tensor out, std::optional<Tensor> workspace, const Operand& x, const Operand& w3,
          const Alignment& alignment, bool reduce) {
  MoeArgs args;
  args.out = out;
  args.reduce = reduce;
  args.workspace = workspace;
  check_x(c, x, &args);
  check_routing(c, alignment, &args);
  if (x.tensor.rank == 2)
    c.in(x.name, x.tensor).shape({args.assignments(), args.depth});
  else
    c.in(x.name, x.tensor).shape({args.tokens, args.slots, args.depth});
  args.topk_weights = alignment.topk_weights.ptr<float>();
  args.topk_weights_stride = alignment.topk_weights.stride[0];
  Dim experts("E"), rows("H");
  args.panel[0] = check_weights(c, w3, args, &experts, &rows);
  args.experts = experts;
  args.width = rows;
  check_alignment(c, alignment, &args);
  check_tile(c, alignment.tile, {args.experts, args.width, args.depth, args.dtype}, true, &args);
  check_out(c, x.scale ? DType::kBF16 : args.dtype, args.width, &args);
  if (reduce && !c.on_cpu() && !out.empty()) {
    c.require(workspace.has_value(), "workspace", "given for reduce on CUDA", std::string("none"));
    c.workspace(*workspace, 4 * args.assignments(), "4 bytes or more for each assignment", 16);
  }
  check_indices(c, stream, alignment, args);
  run(stream, c, args);
}

}  // namespace

void moe_up(Stream stream, Tensor out, Tensor hidden_states, Tensor w1, std::optional<Tensor> w2, Tensor topk_weights,
            std::optional<Tensor> topk_ids, Tensor sorted_token_ids, Tensor expert_ids, Tensor num_tokens_post_pad,
            int64_t block_m, int64_t tile, std::string_view activation) {
  Contract c("moe_up");
  std::optional<Operand> second;
  if (w2) second.emplace(Operand{"w2", *w2});
  up(c, stream, out, {"hidden_states", hidden_states}, {"w1", w1}, second,
     {topk_weights, topk_ids, sorted_token_ids, expert_ids, num_tokens_post_pad, block_m, tile}, activation);
}

void moe_up_fp8(Stream stream, Tensor out, Tensor hidden, Tensor hidden_scale, Tensor w1, Tensor w1_scale,
                std::optional<Tensor> w2, std::optional<Tensor> w2_scale, Tensor topk_weights,
                std::optional<Tensor> topk_ids, Tensor sorted_token_ids, Tensor expert_ids, Tensor num_tokens_post_pad,
                int64_t block_m, int64_t tile, std::string_view activation) {
  Contract c("moe_up_fp8");
  c.require(w2.has_value() == w2_scale.has_value(), "w2 and w2_scale must be given together");
  std::optional<Operand> second;
  if (w2) second.emplace(Operand{"w2", *w2, "w2_scale", &*w2_scale});
  up(c, stream, out, {"hidden", hidden, "hidden_scale", &hidden_scale}, {"w1", w1, "w1_scale", &w1_scale}, second,
     {topk_weights, topk_ids, sorted_token_ids, expert_ids, num_tokens_post_pad, block_m, tile}, activation);
}

int64_t moe_down_workspace_bytes(int64_t tokens, int64_t slots, int64_t hidden) {
  constexpr int64_t kPlenty = 256 << 20, kLeastColumns = 32;
  const int64_t column = tokens * slots * static_cast<int64_t>(sizeof(float));
  return std::min(column * hidden, std::max(kPlenty, column * kLeastColumns));
}

void moe_down(Stream stream, Tensor out, std::optional<Tensor> workspace, Tensor moe_out, Tensor w3,
              Tensor topk_weights, std::optional<Tensor> topk_ids, Tensor sorted_token_ids, Tensor expert_ids,
              Tensor num_tokens_post_pad, int64_t block_m, int64_t tile, bool reduce) {
  Contract c("moe_down");
  down(c, stream, out, workspace, {"moe_out", moe_out}, {"w3", w3},
       {topk_weights, topk_ids, sorted_token_ids, expert_ids, num_tokens_post_pad, block_m, tile}, reduce);
}

void moe_down_fp8(Stream stream, Tensor out, std::optional<Tensor> workspace, Tensor moe_out, Tensor moe_out_scale,
                  Tensor w3, Tensor w3_scale, Tensor topk_weights, std::optional<Tensor> topk_ids,
                  Tensor sorted_token_ids, Tensor expert_ids, Tensor num_tokens_post_pad, int64_t block_m, int64_t tile,
                  bool reduce) {
  Contract c("moe_down_fp8");
  down(c, stream, out, workspace, {"moe_out", moe_out, "moe_out_scale", &moe_out_scale},
       {"w3", w3, "w3_scale", &w3_scale},
       {topk_weights, topk_ids, sorted_token_ids, expert_ids, num_tokens_post_pad, block_m, tile}, reduce);
}

}  // namespace kestrel
