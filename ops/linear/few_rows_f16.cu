#include "ops/linear/few_rows.cuh"

template void kestrel::cuda::launch_few_rows<kestrel::f16>(Stream, const LinearArgs&, const FewRowsPlan&);
