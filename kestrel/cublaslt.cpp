#include "kestrel/cublaslt.h"

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <mutex>
#include <vector>

namespace kestrel {
namespace {

constexpr int kOldest = 120000;
constexpr char kToolkit[] = "/usr/local/cuda/lib64";

std::mutex folders_mutex;
std::string nvidia_folders;

std::string parent(const std::string& path) { return path.substr(0, path.find_last_of('/')); }

// The file that holds an address.
std::string file_of(const void* address) {
  Dl_info info;
  return dladdr(address, &info) && info.dli_fname ? info.dli_fname : "";
}

std::vector<std::string> wheel_folders() {
  // This library is <site-packages>/kestrel_kernels/lib/libkestrel.so.
  std::string all = parent(parent(parent(file_of(reinterpret_cast<const void*>(&set_nvidia_folders))))) + "/nvidia";
  {
    std::lock_guard lock(folders_mutex);
    if (!nvidia_folders.empty()) all += ":" + nvidia_folders;
  }
  std::vector<std::string> folders;
  for (size_t begin = 0; begin < all.size();) {
    const size_t end = std::min(all.find(':', begin), all.size());
    const std::string folder = all.substr(begin, end - begin);
    folders.push_back(folder + "/cu13/lib");
    folders.push_back(folder + "/cublas/lib");
    begin = end + 1;
  }
  return folders;
}

// Collects what was tried, for the message where nothing is found.
class Search {
 public:
  bool open(const std::string& file, int flags, const char* where) {
    if (file[0] == '/' && access(file.c_str(), F_OK) != 0) return failed(where + file, "no such file");
    void* handle = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL | flags);
    if (!handle) {
      const char* reason = dlerror();
      return failed(where + file, flags & RTLD_NOLOAD ? "not loaded" : reason ? reason : "cannot be loaded");
    }
    void* get_version = dlsym(handle, "cublasLtGetVersion");
    const int version = get_version ? static_cast<int>(reinterpret_cast<size_t (*)()>(get_version)()) : 0;
    if (version < kOldest) {
      dlclose(handle);
      return failed(where + file, "version " + std::to_string(version) + " is below " + std::to_string(kOldest));
    }
    found = {handle, file_of(get_version), version};
    return true;
  }

  CublasLt found;
  std::string tried;

 private:
  bool failed(const std::string& file, const std::string& reason) {
    tried += (tried.empty() ? "" : "; ") + file + " (" + reason + ")";
    return false;
  }
};

}  // namespace

void set_nvidia_folders(std::string_view folders) {
  std::lock_guard lock(folders_mutex);
  nvidia_folders = folders;
}

CublasLt find_cublaslt(std::initializer_list<std::string> names) {
  Search search;
  for (const std::string& name : names)
    if (search.open(name, RTLD_NOLOAD, "in the process ")) return search.found;
  for (const std::string& folder : wheel_folders())
    for (const std::string& name : names)
      if (search.open(folder + "/" + name, 0, "")) return search.found;
  for (const std::string& name : names)
    if (search.open(name, 0, "by the loader ")) return search.found;
  for (const std::string& name : names)
    if (search.open(std::string(kToolkit) + "/" + name, 0, "")) return search.found;
  throw Error(
      ErrorKind::kRuntimeError,
      "cuBLASLt 12 or newer was not found: install nvidia-cublas or the CUDA toolkit; looked for " + search.tried);
}

const CublasLt& cublaslt() {
  static const CublasLt loaded = find_cublaslt({"libcublasLt.so.13", "libcublasLt.so.12"});
  return loaded;
}

void* cublaslt_symbol(const char* name) {
  if (void* symbol = dlsym(cublaslt().handle, name)) return symbol;
  throw Error(ErrorKind::kRuntimeError, cublaslt().path + " has no function " + name);
}

}  // namespace kestrel
