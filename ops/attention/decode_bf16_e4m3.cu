#include "ops/attention/decode_tiles.cuh"

namespace kestrel::cuda {

template bool launch_decode<bf16, e4m3>(Stream, DecodeArgs&, const DecodePlan&);

}  // namespace kestrel::cuda
