#include "ops/moe/warp_sum.cuh"

namespace kestrel::cuda {
template void launch_moe_warp<bf16>(Stream, const MoeArgs&, const MoeWarpPlan&);
template void launch_moe_warp_sum<bf16>(Stream, const MoeArgs&, const MoeWarpPlan&);
}  // namespace kestrel::cuda
