#include "ops/attention/prefill.h"
#include "ops/attention/prefill_launch.cuh"

namespace kestrel::cuda {

void prefill_96(Stream stream, const AttentionProblem& p, KeySource source, const PrefillShape& shape) {
  launch_prefill<96, 3, 4, 2, 3, 2>(stream, p, source, shape);
}

}  // namespace kestrel::cuda
