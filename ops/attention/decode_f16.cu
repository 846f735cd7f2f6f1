#include "ops/attention/decode_tiles.cuh"

namespace kestrel::cuda {

template bool launch_decode<f16, f16>(Stream, DecodeArgs&, const DecodePlan&);

}  // namespace kestrel::cuda
