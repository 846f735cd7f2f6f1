// cuBLASLt, loaded on first use and never linked: libcublasLt.so.13 or .12, the first one found
//   1. in the process already (PyTorch brings one),
//   2. in the nvidia-cublas wheel: nvidia/cu13/lib or nvidia/cublas/lib beside the package or in a folder told below,
//   3. in the toolkit: wherever the loader looks, then /usr/local/cuda/lib64.
// Needs no CUDA header, and loading needs no GPU. Where there is none, an Error names all that was looked for.
#pragma once

#include <string>
#include <string_view>

#include <kestrel/error.h>

namespace kestrel {

struct CublasLt {
  void* handle = nullptr;
  std::string path;
  int version = 0;  // 130100 is 13.1.0
};

// Folders named `nvidia` (colon between) that may hold the wheel's libraries; for the search that comes after.
KESTREL_API void set_nvidia_folders(std::string_view folders);

KESTREL_API const CublasLt& cublaslt();

// The search itself, for libraries of the names given.
KESTREL_API CublasLt find_cublaslt(std::initializer_list<std::string> names);

// auto matmul = cublaslt_function<decltype(&cublasLtMatmul)>("cublasLtMatmul");
KESTREL_API void* cublaslt_symbol(const char* name);
template <class Function>
Function cublaslt_function(const char* name) {
  return reinterpret_cast<Function>(cublaslt_symbol(name));
}

}  // namespace kestrel
