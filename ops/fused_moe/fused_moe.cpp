// The chain: alignment, quantization of x, up with its gate, quantization of the gated values, down, sum. At few tokens
// the products list the experts themselves, and up quantizes x.
// What binds where a target is missed (H200, fp8, E64 H2048 I1024 k8). At one token (18.4 us, target 16) memory is idle
// from the last weights of up, 9.5 us after its wait, to the first of down, at 13.8. At 740 and 2048 tokens (146 and
// 309, targets 110 and 215) the steps around the products take: alignment and x 6 and 10, the gated values, which are
// fp32, 7 and 23, the sum 5.4 and 18. A warpgroup for the last two inside the products lost (740: 247, 186 without).
#include "ops/fused_moe/fused_moe.h"

#include <algorithm>
#include <limits>
#include <memory>

#include "kestrel/contract.h"
#include "kestrel/cpu/target.h"
#include "kestrel/cuda.h"
#include "ops/fp8_quant/args.h"
#include "ops/moe/moe.h"
#include "ops/moe/operands.h"
#include "ops/moe_align/args.h"
#include "ops/moe_align/moe_align.h"

KESTREL_CPU_TWIN(moe_align, void(const kestrel::MoeAlignArgs& args));
KESTREL_CPU_TWIN(fp8_quant, void(const kestrel::Fp8QuantArgs& args));
KESTREL_CPU_TWIN(moe, void(const kestrel::MoeArgs& args));

namespace kestrel {
namespace cuda {
void moe_align(Stream stream, const MoeAlignArgs& args);
void fp8_quant(Stream stream, const Fp8QuantArgs& args);
void moe(Stream stream, const MoeArgs& args);
bool moe_warp_takes(const MoeArgs& args);
}  // namespace cuda

namespace {

constexpr int64_t kInt32Max = std::numeric_limits<int32_t>::max();

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

struct Sizes {
  int64_t tokens, slots, experts, hidden, inner, block_m;  // experts: of the routing
  bool fp8;
  int64_t assignments() const { return tokens * slots; }
  int64_t places() const { return assignments() + std::min(assignments(), experts) * (block_m - 1); }
};

// Where in the workspace things lie, in bytes. `work` holds the gated values in fp32, and once they are quantized, the
// parts of down's sum.
struct Layout {
  int64_t x_stride, mid_stride, gated_stride;  // elements
  int64_t sorted, expert_ids, total, counts, x, x_scale, mid, mid_scale, work;
  int64_t gated_bytes, parts_bytes;
  int64_t bytes;
};

Layout layout_of(const Sizes& s) {
  constexpr int64_t kAlign = 128;  // as TMA wants it
  Layout l{};
  const auto take = [&](int64_t bytes) {
    const int64_t start = l.bytes;
    l.bytes += round_up(bytes, kAlign);
    return start;
  };
  const int64_t assignments = s.assignments();
  l.x_stride = round_up(s.hidden, 16);
  l.mid_stride = round_up(s.inner, 16);
  l.gated_stride = round_up(s.inner, 4);
  l.sorted = take(4 * s.places());
  l.expert_ids = take(4 * (s.places() / s.block_m));
  l.total = take(4);
  l.counts = take(moe_align_workspace_bytes(assignments, s.experts));
  l.mid = take(assignments * l.mid_stride * (s.fp8 ? 1 : 2));
  if (s.fp8) {
    l.mid_scale = take(4 * assignments);
    l.x = take(s.tokens * l.x_stride);
    l.x_scale = take(4 * s.tokens);
    l.gated_bytes = 4 * assignments * l.gated_stride;
  }
  l.parts_bytes = moe_down_workspace_bytes(s.tokens, s.slots, s.hidden);
  l.work = take(std::max(l.gated_bytes, l.parts_bytes));
  return l;
}

// The steps of the chain on either device.
struct Steps {
  bool on_cpu;
  Stream stream;

  void operator()(const MoeAlignArgs& args) const {
    if (on_cpu) return cpu::moe_align(args);
    if constexpr (kHasCuda) cuda::moe_align(stream, args);
  }
  void operator()(const Fp8QuantArgs& args) const {
    if (on_cpu) return cpu::fp8_quant(args);
    if constexpr (kHasCuda) cuda::fp8_quant(stream, args);
  }
  void operator()(const MoeArgs& args) const {
    if (args.out.empty()) return;
    if (on_cpu) return cpu::moe(args);
    if constexpr (kHasCuda) cuda::moe(stream, args);
  }
  bool takes_few(const MoeArgs& args) const {
    if constexpr (kHasCuda) return !on_cpu && cuda::moe_warp_takes(args);
    return false;
  }
};

struct Layer {
  Sizes sizes;
  Tensor out, x, topk_ids;
  Rows out_rows, x_rows;
  const int32_t* expert_map = nullptr;
  ExpertWeights up[2], down;
  DType dtype{};  // of the weights
  int64_t experts = 0;
  Gate gate{};
  const float* topk_weights = nullptr;
  int64_t topk_weights_stride = 0;
  int up_tile = -1, down_tile = -1;
};

void run(const Steps& step, const Layer& layer, char* memory) {
  const Sizes& s = layer.sizes;
  const Layout l = layout_of(s);
  const DLDevice device = layer.out.device;
  const int64_t assignments = s.assignments();

  MoeAlignArgs align{};
  align.sorted = reinterpret_cast<int32_t*>(memory + l.sorted);
  align.expert_ids = reinterpret_cast<int32_t*>(memory + l.expert_ids);
  align.total = memory + l.total;
  align.counts = reinterpret_cast<uint32_t*>(memory + l.counts);
  align.ids = layer.topk_ids.ptr<int32_t>();
  align.expert_map = layer.expert_map;
  align.ids_stride = layer.topk_ids.stride[0];
  align.sorted_size = align.most = s.places();
  align.expert_ids_size = s.places() / s.block_m;
  align.slots = s.slots;
  align.assignments = assignments;
  align.experts = s.experts;
  align.block_size = s.block_m;
  align.loras = 1;

  // What both products share.
  MoeArgs args;
  args.dtype = layer.dtype;
  args.tokens = s.tokens;
  args.slots = s.slots;
  args.experts = layer.experts;
  args.sorted_token_ids = align.sorted;
  args.expert_ids = align.expert_ids;
  args.num_tokens_post_pad = static_cast<const int32_t*>(align.total);
  args.block_m = s.block_m;
  args.positions = std::min(align.sorted_size, align.expert_ids_size * s.block_m);
  args.ids = align.ids;
  args.ids_stride = align.ids_stride;
  args.expert_map = align.expert_map;
  args.routed = s.experts;

  MoeArgs up = args;
  up.x = layer.x.data;
  up.x_rows = layer.x_rows;
  up.slots_per_row = s.slots;
  up.panels = 2;
  up.panel[0] = layer.up[0];
  up.panel[1] = layer.up[1];
  up.gate = layer.gate;
  up.width = s.inner;
  up.depth = s.hidden;
  up.tile = layer.up_tile;

  MoeArgs down = args;
  down.out = layer.out;
  down.out_rows = layer.out_rows;
  down.panel[0] = layer.down;
  down.topk_weights = layer.topk_weights;
  down.topk_weights_stride = layer.topk_weights_stride;
  down.reduce = true;
  down.parts = layer.out.dtype;
  down.workspace = Tensor(memory + l.work, DType::kU8, {std::max(l.gated_bytes, l.parts_bytes)}, device);
  down.width = s.hidden;
  down.depth = s.inner;
  down.tile = layer.down_tile;

  // The rows of `x` as e4m3 in the workspace, which `product` then takes.
  const auto quantized = [&](const Tensor& x, int64_t stride, int64_t bits, int64_t scale, MoeArgs* product) {
    const Tensor scales(memory + scale, DType::kF32, {x.shape[0]}, device);
    Fp8QuantArgs q{
        Fp8Scale::kRow, Tensor(memory + bits, DType::kE4M3, {x.shape[0], x.shape[1]}, device), x, scales, {}};
    q.out_bits.stride[0] = stride;
    product->x = q.out_bits.data;
    product->x_rows = {x.shape[0], x.shape[0], stride, 0};
    product->x_scale = scales.ptr<float>();
    return q;
  };
  Fp8QuantArgs quantize{}, requantize{};
  if (s.fp8) {
    up.out = Tensor(memory + l.work, DType::kF32, {assignments, s.inner}, device);
    up.out.stride[0] = l.gated_stride;
    quantize = quantized(layer.x, l.x_stride, l.x, l.x_scale, &up);
    requantize = quantized(up.out, l.mid_stride, l.mid, l.mid_scale, &down);
  } else {
    up.out = Tensor(memory + l.mid, layer.dtype, {assignments, s.inner}, device);
    up.out.stride[0] = l.mid_stride;
    down.x = up.out.data;
    down.x_rows = {assignments, assignments, l.mid_stride, 0};
  }
  up.out_rows = {assignments, assignments, up.out.stride[0], 0};

  // At few tokens the products list the experts themselves, from the routing, and at very few, up quantizes x. Up
  // triggers after its wait: when down starts, the routing is complete and is read before down's own wait.
  MoeArgs few_up = up, few_down = down;
  few_up.sorted_token_ids = few_down.sorted_token_ids = nullptr;
  few_up.settled = s.fp8;  // the quantization has triggered after its wait
  few_down.settled = true;
  if (step.takes_few(few_up) && step.takes_few(few_down)) {
    up = few_up;
    down = few_down;
    few_up.settled = false;
    few_up.x = layer.x.data;
    few_up.x_rows = layer.x_rows;
    few_up.x_scale = nullptr;
    few_up.quantize_from = layer.x.dtype;
    if (s.fp8 && step.takes_few(few_up)) up = few_up;
  } else {
    step(align);
    quantize.settled = true;  // the alignment has triggered after its wait
    down.settled = true;      // and so has up, whose own wait the alignment was before
  }
  if (up.x_scale && assignments > 0) step(quantize);
  step(up);
  if (s.fp8) step(requantize);
  step(down);
}

}  // namespace

int64_t fused_moe_workspace_bytes(int64_t tokens, int64_t slots, int64_t experts, int64_t hidden, int64_t inner,
                                  int64_t block_m, bool fp8) {
  return layout_of({tokens, slots, experts, hidden, inner, block_m, fp8}).bytes;
}

void fused_moe(Stream stream, Tensor out, std::optional<Tensor> workspace, Tensor x, Tensor w_up,
               std::optional<Tensor> w_up_scale, Tensor w_down, std::optional<Tensor> w_down_scale, Tensor topk_weights,
               Tensor topk_ids, std::optional<Tensor> expert_map, int64_t block_m, int64_t tile,
               std::string_view activation) {
  Contract c("fused_moe");
  Layer layer;
  layer.out = out;
  layer.x = x;
  layer.topk_ids = topk_ids;
  layer.gate = *gate_named(c, activation, false);
  c.require(w_up_scale.has_value() == w_down_scale.has_value(), "w_up_scale and w_down_scale must be given together");
  const bool fp8 = w_up_scale.has_value();

  Dim T("T"), H("H"), E("E"), rows("2I"), K("K");
  c.in("x", x).dtype({DType::kBF16, DType::kF16}).shape({T, H}).rows(&layer.x_rows);
  layer.dtype = fp8 ? DType::kE4M3 : x.dtype;
  MoeArgs weights;  // what check_weights() wants to know
  weights.dtype = layer.dtype;
  weights.depth = H;
  layer.up[0] = check_weights(c, {"w_up", w_up, "w_up_scale", fp8 ? &*w_up_scale : nullptr}, weights, &E, &rows);
  c.require(rows % 2 == 0, "w_up", "two halves high: an even number of rows", rows);
  const int64_t inner = rows / 2;
  layer.up[1] = from_row(layer.up[0], inner, layer.dtype);
  weights.depth = inner;
  layer.down = check_weights(c, {"w_down", w_down, "w_down_scale", fp8 ? &*w_down_scale : nullptr}, weights, &E, &H);
  layer.experts = E;

  c.in("topk_weights", topk_weights).dtype({DType::kF32}).shape({T, K}).last_contiguous();
  c.in("topk_ids", topk_ids).dtype({DType::kI32}).shape({T, K}).last_contiguous();
  layer.topk_weights = topk_weights.ptr<float>();
  layer.topk_weights_stride = topk_weights.stride[0];
  int64_t experts = E;
  const bool mapped = expert_map && !expert_map->empty();
  if (expert_map) c.in("expert_map", *expert_map).dtype({DType::kI32}).rank(1, 1).last_contiguous();
  if (mapped) {
    layer.expert_map = expert_map->ptr<int32_t>();
    experts = expert_map->shape[0];
  }
  c.require(experts >= 1 && experts <= kMaxExperts, mapped ? "expert_map" : "w_up", "of 1 to 1024 experts", experts);
  c.require(block_m >= 1 && block_m <= kInt32Max, "block_m", "from 1 to 2^31 - 1", block_m);
  MoeArgs tiled;  // what check_tile() wants to know
  tiled.dtype = layer.dtype;
  tiled.tokens = T;
  tiled.block_m = block_m;
  for (const bool is_down : {false, true}) {
    check_tile(c, tile, {E, H, inner, layer.dtype}, is_down, &tiled);
    (is_down ? layer.down_tile : layer.up_tile) = tiled.tile;
  }
  layer.sizes = {T, K, experts, H, inner, block_m, fp8};
  c.require(T * K <= kInt32Max && layer.sizes.places() <= kInt32Max, "topk_ids",
            "of less than 2^31 elements, padded to whole blocks", layer.sizes.places());
  c.out("out", out).dtype({fp8 ? DType::kBF16 : x.dtype}).shape({T, H}).rows(&layer.out_rows);

  const Layout layout = layout_of(layer.sizes);
  if (workspace) {
    c.workspace(*workspace, layout.bytes, "fused_moe_workspace_bytes() long", 16);
  } else {
    c.require(c.on_cpu() || out.empty(), "workspace", "given on CUDA", std::string("none"));
  }
  if (mapped) c.indices(stream, "expert_map", *expert_map, 0, E, true);

  if (out.empty()) return;
  if (c.on_cpu()) {
    if (workspace) return run({true, stream}, layer, workspace->ptr<char>());
    const std::unique_ptr<char[]> memory(new char[static_cast<size_t>(layout.work + layout.gated_bytes)]);
    return run({true, stream}, layer, memory.get());
  }
  if constexpr (kHasCuda) {
    DeviceGuard guard(out.device);
    run({false, stream}, layer, workspace->ptr<char>());
  }
}

}  // namespace kestrel
