#include "ops/linear/few_rows.cuh"

template void kestrel::cuda::launch_few_rows<kestrel::bf16>(Stream, const LinearArgs&, const FewRowsPlan&);
