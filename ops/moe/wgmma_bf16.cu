#include "ops/moe/wgmma.cuh"

template void kestrel::cuda::launch_moe_wgmma<kestrel::bf16>(Stream, const MoeArgs&, WgmmaTile);
