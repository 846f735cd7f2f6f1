#include "ops/moe/warp_sum.cuh"

template void kestrel::cuda::launch_moe_warp<kestrel::f16>(Stream, const MoeArgs&, const MoeWarpPlan&);
template void kestrel::cuda::launch_moe_warp_sum<kestrel::f16>(Stream, const MoeArgs&, const MoeWarpPlan&);
