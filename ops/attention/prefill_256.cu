#include "ops/attention/prefill.h"
#include "ops/attention/prefill_launch.cuh"

namespace kestrel::cuda {

void prefill_256(Stream stream, const AttentionProblem& p, KeySource source, const PrefillShape& shape) {
  launch_prefill<256, 2, 2, 1, 2, 0>(stream, p, source, shape);
}

}  // namespace kestrel::cuda
