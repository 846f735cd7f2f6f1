#include "ops/topk/topk.h"

#include <cmath>
#include <limits>

#include "kestrel/contract.h"
#include "kestrel/cpu/target.h"
#include "kestrel/cuda.h"
#include "ops/topk/args.h"

KESTREL_CPU_TWIN(topk_fwd, void(const kestrel::TopkArgs& args));
KESTREL_CPU_TWIN(topk_router, void(const kestrel::RouterArgs& args));
KESTREL_CPU_TWIN(sample_top_k, void(const kestrel::SampleArgs& args));

namespace kestrel {
namespace cuda {
void topk_fwd(Stream stream, const TopkArgs& args);
void topk_router(Stream stream, const RouterArgs& args);
void sample_top_k(Stream stream, const SampleArgs& args);
}  // namespace cuda

namespace {

void check_scores(Contract& c, const char* name, const Tensor& scores, Rows* rows) {
  c.in(name, scores).dtype({DType::kBF16, DType::kF16, DType::kF32}).rank(2, 2).rows(rows);
  c.require(scores.size(1) <= std::numeric_limits<int32_t>::max(), name, "less than 2^31 wide", scores.size(1));
}

void check_k(Contract& c, int64_t k, int64_t width) {
  c.require(k >= 1 && k <= kMaxChosen, "k", "from 1 to 128", k);
  if (k > width)
    c.fail(ErrorKind::kValueError, "k", "be at most the " + std::to_string(width) + " scores of a row",
           std::to_string(k));
}

template <class T>
void check_value(Contract& c, const char* name, const Value<T>& value) {
  if (!value.tensor) return;
  c.in(name, *value.tensor).dtype({dtype_of<T>});
  c.require(value.tensor->numel() == 1, name, "a number or hold one element, not several", value.tensor->numel());
}

}  // namespace

void topk_fwd(Stream stream, Tensor values, Tensor indices, Tensor scores, bool softmax) {
  Contract c("topk_fwd");
  TopkArgs args{values, indices, scores, {}, {}, {}, 0, 0, softmax};
  Dim k("k");
  check_scores(c, "scores", scores, &args.scores_rows);
  c.out("values", values).dtype_like(scores).shape({scores.size(0), k}).rows(&args.values_rows);
  c.out("indices", indices).dtype({DType::kI32}).shape({scores.size(0), k}).rows(&args.indices_rows);
  check_k(c, k, scores.size(1));
  args.width = scores.size(1);
  args.k = k;
  if (scores.empty()) return;
  if (c.on_cpu()) return cpu::topk_fwd(args);
  if constexpr (kHasCuda) {
    DeviceGuard guard(scores.device);
    cuda::topk_fwd(stream, args);
  }
}

void topk_router(Stream stream, Tensor weights, Tensor ids, Tensor scores, std::string_view scoring,
                 std::optional<Tensor> bias, bool renormalize, int64_t num_groups, int64_t topk_groups, float scale) {
  Contract c("topk_router");
  RouterArgs args{weights,     ids,        scores,      bias, {}, {}, {}, 0, 0, scoring == "sigmoid",
                  renormalize, num_groups, topk_groups, scale};
  Dim k("k");
  check_scores(c, "scores", scores, &args.scores_rows);
  c.out("weights", weights).dtype({DType::kF32}).shape({scores.size(0), k}).rows(&args.weights_rows);
  c.out("ids", ids).dtype({DType::kI32}).shape({scores.size(0), k}).rows(&args.ids_rows);
  check_k(c, k, scores.size(1));
  c.require(scoring == "softmax" || scoring == "sigmoid", "scoring", "\"softmax\" or \"sigmoid\"",
            '"' + std::string(scoring) + '"');
  if (bias)
    c.in("bias", *bias).dtype({DType::kBF16, DType::kF16, DType::kF32}).shape({scores.size(1)}).last_contiguous();
  c.require(num_groups >= 1 && scores.size(1) % num_groups == 0, "num_groups", "a divisor of the number of experts",
            num_groups);
  c.require(topk_groups >= 1 && topk_groups <= num_groups, "topk_groups", "from 1 to num_groups", topk_groups);
  c.require(k <= scores.size(1) / num_groups * topk_groups, "k", "at most the experts of topk_groups groups",
            static_cast<int64_t>(k));
  args.experts = scores.size(1);
  args.k = k;
  if (scores.empty()) return;
  if (c.on_cpu()) return cpu::topk_router(args);
  if constexpr (kHasCuda) {
    DeviceGuard guard(scores.device);
    cuda::topk_router(stream, args);
  }
}

void sample_top_k(Stream stream, Tensor ids, Tensor logits, int64_t k, Value<float> temperature, Value<int64_t> seed,
                  Value<int64_t> offset) {
  Contract c("sample_top_k");
  SampleArgs args{ids, logits, {}, 0, k, temperature, seed, offset};
  check_scores(c, "logits", logits, &args.logits_rows);
  c.out("ids", ids).dtype({DType::kI32}).shape({logits.size(0)}).last_contiguous();
  check_k(c, k, logits.size(1));
  check_value(c, "temperature", temperature);
  check_value(c, "seed", seed);
  check_value(c, "offset", offset);
  if (c.on_cpu() && temperature.tensor) args.temperature = *temperature.tensor->ptr<float>();
  if (c.on_cpu() && seed.tensor) args.seed = *seed.tensor->ptr<int64_t>();
  if (c.on_cpu() && offset.tensor) args.offset = *offset.tensor->ptr<int64_t>();
  if (!args.temperature.tensor)
    c.require(args.temperature.host >= 0 && std::isfinite(args.temperature.host), "temperature",
              "finite and not negative", static_cast<double>(args.temperature.host));
  args.width = logits.size(1);
  if (logits.empty()) return;
  if (c.on_cpu()) return cpu::sample_top_k(args);
  if constexpr (kHasCuda) {
    DeviceGuard guard(logits.device);
    cuda::sample_top_k(stream, args);
  }
}

}  // namespace kestrel
