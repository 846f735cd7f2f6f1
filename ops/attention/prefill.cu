#include "ops/attention/compiled_prefill.h"

namespace kestrel::cuda {

void attention_prefill(Stream stream, const AttentionProblem& p, const PrefillPlan& plan) {
  kPrefillLaunches[plan.tile](stream, p, plan.shape);
}

}  // namespace kestrel::cuda
