#include "ops/moe/wgmma.cuh"

template void kestrel::cuda::launch_moe_wgmma<kestrel::e4m3>(Stream, const MoeArgs&, WgmmaTile);
