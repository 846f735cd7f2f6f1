#include "ops/attention/prefill.h"
#include "ops/attention/prefill_launch.cuh"

namespace kestrel::cuda {

void prefill_64(Stream stream, const AttentionProblem& p, KeySource source, const PrefillShape& shape) {
  launch_prefill<64, 4, 8, 2, 3, 3>(stream, p, source, shape);
}

}  // namespace kestrel::cuda
