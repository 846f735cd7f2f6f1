// Attention of few query rows for each key head, over keys in a cache: decoding, speculative decoding. decode.cu
// chooses the kernel, decode_<types>.cu hold them.
#pragma once

#include <cstdint>
#include <optional>

#include "ops/attention/problem.h"

namespace kestrel::cuda {

struct DecodeHints {
  int64_t most_keys;       // the host's bound on the lengths
  int64_t num_splits = 0;  // 0: chosen here
  std::optional<int64_t> fresh_tokens = {};
  bool batch_invariant = false;
  void* workspace = nullptr;  // of kAttentionWorkspaceBytes, with anything in it; without one, only clusters split
};

constexpr int64_t kAttentionWorkspaceBytes = 8 << 20;

// Launches the kernel that suits and returns its name; null, and nothing launched, where none does.
const char* attention_decode(Stream stream, const AttentionProblem& problem, const DecodeHints& hints);

}  // namespace kestrel::cuda
