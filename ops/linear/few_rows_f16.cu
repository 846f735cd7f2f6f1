#include "ops/linear/few_rows.cuh"
#include "ops/linear/held_weights.cuh"

template void kestrel::cuda::launch_few_rows<kestrel::f16>(Stream, const LinearArgs&, const FewRowsPlan&);
template void kestrel::cuda::launch_held_weights<kestrel::f16>(Stream, const LinearArgs&, const HeldWeightsPlan&);
