#include "ops/attention/decode_tiles.cuh"

namespace kestrel::cuda {

template bool launch_decode<bf16, bf16>(Stream, DecodeArgs&, const DecodePlan&);

}  // namespace kestrel::cuda
