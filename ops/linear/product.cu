// cuBLASLt counts columns first, so out^T = w x^T is what it is asked for: w and x as [K, N] and [K, M] in its order, w
// transposed, and the bias runs along the columns of out. The algorithm is the first of those that the heuristic names
// for the exact problem, of those that round once, or the one of kPreferences; it is kept per device and problem, so
// eager calls and captured graphs give the same bits. Descriptors are made on the stack: five calls that allocate
// nothing, and threads share none.
#include "ops/linear/product.h"

#include <cublasLt.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <mutex>
#include <shared_mutex>
#include <span>
#include <string>
#include <unordered_map>

#include "kestrel/cublaslt.h"
#include "kestrel/cuda.h"
#include "kestrel/cuda_check.h"

namespace kestrel::cuda {
namespace {

#define KESTREL_CUBLASLT(member, name) decltype(&name) member = cublaslt_function<decltype(&name)>(#name)
struct Library {
  KESTREL_CUBLASLT(create, cublasLtCreate);
  KESTREL_CUBLASLT(status_name, cublasLtGetStatusName);
  KESTREL_CUBLASLT(init_operation, cublasLtMatmulDescInit_internal);
  KESTREL_CUBLASLT(set_operation, cublasLtMatmulDescSetAttribute);
  KESTREL_CUBLASLT(init_layout, cublasLtMatrixLayoutInit_internal);
  KESTREL_CUBLASLT(init_preference, cublasLtMatmulPreferenceInit_internal);
  KESTREL_CUBLASLT(set_preference, cublasLtMatmulPreferenceSetAttribute);
  KESTREL_CUBLASLT(heuristic, cublasLtMatmulAlgoGetHeuristic);
  KESTREL_CUBLASLT(get_config, cublasLtMatmulAlgoConfigGetAttribute);
  KESTREL_CUBLASLT(matmul, cublasLtMatmul);
};
#undef KESTREL_CUBLASLT

const Library& library() {
  static const Library found;
  return found;
}

void check(cublasStatus_t status, const char* call) {
  if (status != CUBLAS_STATUS_SUCCESS)
    throw Error(ErrorKind::kRuntimeError, std::string(call) + ": " + library().status_name(status));
}

// A graph being captured forbids calls that might synchronize; making a handle adds nothing to the graph.
class CapturePaused {
 public:
  CapturePaused() { cuda_check(cudaThreadExchangeStreamCaptureMode(&mode_), "cudaThreadExchangeStreamCaptureMode"); }
  ~CapturePaused() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  CapturePaused(const CapturePaused&) = delete;
  CapturePaused& operator=(const CapturePaused&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// One for each device, kept to the end of the process: the driver may be gone before static objects are.
cublasLtHandle_t handle_of(int device) {
  static std::array<std::atomic<cublasLtHandle_t>, kMaxDevices> handles;
  static std::mutex mutex;
  std::atomic<cublasLtHandle_t>& handle = handles.at(device);
  if (cublasLtHandle_t made = handle.load(std::memory_order_acquire)) return made;
  std::lock_guard lock(mutex);
  cublasLtHandle_t made = handle.load(std::memory_order_relaxed);
  if (!made) {
    CapturePaused paused;
    check(library().create(&made), "cublasLtCreate");
    handle.store(made, std::memory_order_release);
  }
  return made;
}

cudaDataType_t cuda_type(DType dtype) {
  return dtype == DType::kBF16 ? CUDA_R_16BF : dtype == DType::kF16 ? CUDA_R_16F : CUDA_R_32F;
}

cublasLtEpilogue_t epilogue_of(const Product& p) {
  if (!p.bias) return CUBLASLT_EPILOGUE_DEFAULT;
  return p.gelu ? CUBLASLT_EPILOGUE_GELU_BIAS : CUBLASLT_EPILOGUE_BIAS;
}

// What cuBLASLt asks about: up to 256 bytes.
int64_t alignment(const void* p) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  return std::min<int64_t>(address & -address, 256);
}

// The problem as cuBLASLt sees it.
struct Descriptors {
  cublasLtMatmulDescOpaque_t operation;
  cublasLtMatrixLayoutOpaque_t w, x, residual, out;

  explicit Descriptors(const Product& p) {
    const Library& lt = library();
    check(lt.init_operation(&operation, sizeof operation, CUBLAS_COMPUTE_32F, CUDA_R_32F), "cublasLtMatmulDescInit");
    set(CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
    if (const cublasLtEpilogue_t epilogue = epilogue_of(p); epilogue != CUBLASLT_EPILOGUE_DEFAULT)
      set(CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue);
    if (p.bias) set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, p.bias);
    init(&w, p.dtype, p.depth, p.columns, p.w_stride);
    init(&x, p.dtype, p.depth, p.rows, p.x_stride);
    init(&residual, p.out_dtype, p.columns, p.rows, p.residual ? p.residual_stride : p.out_stride);
    init(&out, p.out_dtype, p.columns, p.rows, p.out_stride);
  }

 private:
  template <class T>
  void set(cublasLtMatmulDescAttributes_t attribute, const T& value) {
    check(library().set_operation(&operation, attribute, &value, sizeof value), "cublasLtMatmulDescSetAttribute");
  }
  static void init(cublasLtMatrixLayoutOpaque_t* layout, DType dtype, int64_t rows, int64_t columns, int64_t stride) {
    check(library().init_layout(layout, sizeof *layout, cuda_type(dtype), rows, columns, stride),
          "cublasLtMatrixLayoutInit");
  }
};

struct Algorithm {
  bool found = false;
  cublasLtMatmulAlgo_t algorithm{};
};

// Where a later candidate of the heuristic beat its first on an H200 (us in the comments). It thinks of the product
// alone, while an epilogue that reads a residual or computes prefers smaller tiles.
struct Preference {
  int64_t least_rows, most_rows, columns, depth;
  bool residual, gelu;
  uint32_t tile;
  uint16_t cluster;
};
constexpr int64_t kAnyMore = INT64_MAX;
constexpr Preference kPreferences[] = {
    // 729 rows: 7.5 instead of 8.0
    {256, 1000, 1152, 1152, true, false, CUBLASLT_MATMUL_TILE_128x64, CUBLASLT_CLUSTER_SHAPE_2x4x1},
    // 9477 rows: 129 instead of 139 (2916 rows: alone 43.0 instead of 45.5, but behind the first product 8 more)
    {8000, kAnyMore, 1152, 4304, true, false, CUBLASLT_MATMUL_TILE_192x144, CUBLASLT_CLUSTER_SHAPE_1x2x1},
    // 9477 rows: 146 instead of 159
    {8000, kAnyMore, 4304, 1152, false, true, CUBLASLT_MATMUL_TILE_128x288, CUBLASLT_CLUSTER_SHAPE_2x1x1},
};

template <class Value>
Value config(const cublasLtMatmulAlgo_t& algorithm, cublasLtMatmulAlgoConfigAttributes_t attribute) {
  Value value{};
  check(library().get_config(&algorithm, attribute, &value, sizeof value, nullptr),
        "cublasLtMatmulAlgoConfigGetAttribute");
  return value;
}

// Kernels for older GPUs, which it also offers, round the sum to 16 bits before they add a bias.
bool rounds_once(const Product& p, const cublasLtMatmulAlgo_t& algorithm) {
  constexpr int32_t kHopperKernels = 66;
  return !p.bias || p.dtype == DType::kF32 || config<int32_t>(algorithm, CUBLASLT_ALGO_CONFIG_ID) == kHopperKernels;
}

bool preferred(const Product& p, const cublasLtMatmulAlgo_t& algorithm) {
  const auto tile = config<uint32_t>(algorithm, CUBLASLT_ALGO_CONFIG_TILE_ID);
  const auto cluster = config<uint16_t>(algorithm, CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID);
  for (const Preference& one : kPreferences)
    if (one.least_rows <= p.rows && p.rows <= one.most_rows && one.columns == p.columns && one.depth == p.depth &&
        one.residual == (p.residual != nullptr) && one.gelu == p.gelu && one.tile == tile && one.cluster == cluster)
      return true;
  return false;
}

// Partial sums of a split depth are joined in fp32: the default would also allow them to be rounded to 16 bits.
Algorithm ask(cublasLtHandle_t handle, const Product& p, Descriptors* d, int64_t workspace_bytes) {
  const Library& lt = library();
  cublasLtMatmulPreferenceOpaque_t preference;
  check(lt.init_preference(&preference, sizeof preference), "cublasLtMatmulPreferenceInit");
  const auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
    check(lt.set_preference(&preference, attribute, &value, sizeof value), "cublasLtMatmulPreferenceSetAttribute");
  };
  set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<uint64_t>(workspace_bytes));
  set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, static_cast<uint32_t>(alignment(p.w)));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, static_cast<uint32_t>(alignment(p.x)));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, static_cast<uint32_t>(alignment(p.residual ? p.residual : p.out)));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, static_cast<uint32_t>(alignment(p.out)));
  CapturePaused paused;
  constexpr int kCandidates = 8;
  cublasLtMatmulHeuristicResult_t candidates[kCandidates]{};
  int count = 0;
  const cublasStatus_t status = lt.heuristic(handle, &d->operation, &d->w, &d->x, &d->residual, &d->out, &preference,
                                             kCandidates, candidates, &count);
  if (status == CUBLAS_STATUS_NOT_SUPPORTED || (status == CUBLAS_STATUS_SUCCESS && count == 0)) return {};
  check(status, "cublasLtMatmulAlgoGetHeuristic");
  const cublasLtMatmulAlgo_t* chosen = nullptr;
  for (const cublasLtMatmulHeuristicResult_t& c : std::span(candidates, count)) {
    if (c.state != CUBLAS_STATUS_SUCCESS || !rounds_once(p, c.algo)) continue;
    if (preferred(p, c.algo)) return {true, c.algo};
    if (!chosen) chosen = &c.algo;
  }
  return chosen ? Algorithm{true, *chosen} : Algorithm{};
}

// All that the choice may depend on.
using Key = std::array<int64_t, 16>;

struct KeyHash {
  size_t operator()(const Key& key) const {
    uint64_t hash = 0;
    for (const int64_t word : key)
      hash = (hash ^ static_cast<uint64_t>(word)) * 0x9e3779b97f4a7c15u, hash ^= hash >> 32;
    return hash;
  }
};

Algorithm algorithm_for(cublasLtHandle_t handle, const Product& p, Descriptors* d, int64_t workspace_bytes) {
  constexpr size_t kMost = 4096;  // then the map starts anew: asking again gives the same answers
  static std::unordered_map<Key, Algorithm, KeyHash> known;
  static std::shared_mutex mutex;
  const Key key{p.device.device_id,
                static_cast<int64_t>(p.dtype),
                static_cast<int64_t>(p.out_dtype),
                static_cast<int64_t>(epilogue_of(p)),
                p.rows,
                p.columns,
                p.depth,
                p.x_stride,
                p.w_stride,
                p.out_stride,
                p.residual ? p.residual_stride : -1,
                alignment(p.x),
                alignment(p.w),
                alignment(p.out),
                p.residual ? alignment(p.residual) : 0,
                workspace_bytes};
  {
    std::shared_lock lock(mutex);
    if (const auto found = known.find(key); found != known.end()) return found->second;
  }
  const Algorithm chosen = ask(handle, p, d, workspace_bytes);
  std::lock_guard lock(mutex);
  if (known.size() >= kMost) known.clear();
  known.emplace(key, chosen);
  return chosen;
}

}  // namespace

bool multiply(Stream stream, const Product& p, Memory workspace) {
  const cublasLtHandle_t handle = handle_of(p.device.device_id);
  Descriptors d(p);
  const Algorithm chosen = algorithm_for(handle, p, &d, workspace.bytes);
  if (!chosen.found) return false;
  const float one = 1, residual_factor = p.residual ? 1 : 0;
  check(library().matmul(handle, &d.operation, &one, p.w, &d.w, p.x, &d.x, &residual_factor,
                         p.residual ? p.residual : p.out, &d.residual, p.out, &d.out, &chosen.algorithm, workspace.data,
                         static_cast<size_t>(workspace.bytes), static_cast<cudaStream_t>(stream.handle)),
        "cublasLtMatmul");
  return true;
}

}  // namespace kestrel::cuda
