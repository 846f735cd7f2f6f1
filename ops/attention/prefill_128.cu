#include "ops/attention/prefill.h"
#include "ops/attention/prefill_launch.cuh"

namespace kestrel::cuda {

void prefill_128(Stream stream, const AttentionProblem& p, KeySource source, const PrefillShape& shape) {
  launch_prefill<128, 3, 4, 2, 3, 2>(stream, p, source, shape);
}

}  // namespace kestrel::cuda
