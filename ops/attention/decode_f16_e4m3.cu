#include "ops/attention/decode_tiles.cuh"

namespace kestrel::cuda {

template bool launch_decode<f16, e4m3>(Stream, DecodeArgs&, const DecodePlan&);

}  // namespace kestrel::cuda
