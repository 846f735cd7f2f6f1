#include "ops/attention/prefill.h"
#include "ops/attention/prefill_launch.cuh"

namespace kestrel::cuda {

void prefill_72(Stream stream, const AttentionProblem& p, KeySource source, const PrefillShape& shape) {
  launch_prefill<72, 3, 4, 2, 3, 3>(stream, p, source, shape);
}

}  // namespace kestrel::cuda
