#include "ops/moe/wgmma.cuh"

template void kestrel::cuda::launch_moe_wgmma<kestrel::f16>(Stream, const MoeArgs&, WgmmaTile);
