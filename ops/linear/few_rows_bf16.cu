#include "ops/linear/few_rows.cuh"
#include "ops/linear/held_weights.cuh"

template void kestrel::cuda::launch_few_rows<kestrel::bf16>(Stream, const LinearArgs&, const FewRowsPlan&);
template void kestrel::cuda::launch_held_weights<kestrel::bf16>(Stream, const LinearArgs&, const HeldWeightsPlan&);
