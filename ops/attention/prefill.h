// FlashAttentionFwd: the kernel for many queries. See prefill_kernel.cuh.
#pragma once

#include "ops/attention/plan.h"

namespace kestrel::cuda {

// The launch of a compiled tile: compiled_prefill.h lists them.
template <int kHead, KeySource kKeys, int kGroups, int kStages, int kSlots>
void launch_prefill(Stream stream, const AttentionProblem& problem, const PrefillShape& shape);

}  // namespace kestrel::cuda
