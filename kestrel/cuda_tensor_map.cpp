#include <cuda_runtime.h>

#include "kestrel/cuda_check.h"
#include "kestrel/tensor_map.h"

namespace kestrel {
namespace {

// The driver's encoder, found without linking libcuda.
decltype(&cuTensorMapEncodeTiled) encoder() {
  static const auto found = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result;
    cuda_check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result),
               "cudaGetDriverEntryPointByVersion");
    if (!entry) throw Error(ErrorKind::kRuntimeError, "cuTensorMapEncodeTiled: the CUDA driver has none");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
  }();
  return found;
}

CUtensorMapDataType driver_type(DType dtype) {
  switch (dtype) {
    case DType::kBF16: return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    case DType::kF16: return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    default: return CU_TENSOR_MAP_DATA_TYPE_UINT8;
  }
}

}  // namespace

CUtensorMap tensor_map(const TensorBox& tensor) {
  cuuint64_t size[kMostBoxDims], stride[kMostBoxDims];  // in bytes, the innermost left out
  cuuint32_t box[kMostBoxDims], every[kMostBoxDims];
  cuuint32_t dims = 0;
  for (; dims < kMostBoxDims && tensor.size[dims] != 0; ++dims) {
    size[dims] = tensor.size[dims];
    box[dims] = tensor.box[dims];
    every[dims] = 1;
    if (dims > 0) stride[dims - 1] = tensor.stride[dims] * size_of(tensor.dtype);
  }
  CUtensorMap map;
  // Without promotion in L2: to 256 bytes it costs a stream of weights 8%.
  const CUresult result = encoder()(&map, driver_type(tensor.dtype), dims, const_cast<void*>(tensor.data), size, stride,
                                    box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                    tensor.span == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
                                    CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw Error(ErrorKind::kRuntimeError, "cuTensorMapEncodeTiled: error " + std::to_string(result));
  return map;
}

}  // namespace kestrel
