// The k best of a row on the CPU. Of a long row, one vectorized scan takes the best of each chunk: the k-th best of
// those is a bound that at least k scores reach, and only the chunks that reach it are looked at again, score by score.
// Reading the row bounds it: about k chunks are read twice.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "kestrel/cpu/convert.h"
#include "ops/topk/args.h"

namespace KESTREL_CPU {

inline constexpr int32_t kLowestRank = std::numeric_limits<int32_t>::min();  // below that of any score

// The order of scores as integers: -0.0 like 0.0, NaN above all.
inline int32_t rank_by_bits(int32_t bits, int32_t magnitude, int32_t infinity) {
  const int32_t rank = bits < 0 ? -magnitude : magnitude;
  return magnitude > infinity ? std::numeric_limits<int32_t>::max() : rank;
}
inline int32_t rank_of(float x) {
  const int32_t bits = std::bit_cast<int32_t>(x);
  return rank_by_bits(bits, bits & 0x7fffffff, 0x7f800000);
}
inline int32_t rank_of(bf16 x) { return rank_by_bits(static_cast<int16_t>(x.bits), x.bits & 0x7fff, 0x7f80); }
inline int32_t rank_of(f16 x) { return rank_by_bits(static_cast<int16_t>(x.bits), x.bits & 0x7fff, 0x7c00); }
inline float score_of(int32_t rank) {  // of a float; any NaN comes back as one
  return std::bit_cast<float>(rank < 0 ? static_cast<uint32_t>(-rank) | 0x80000000u : static_cast<uint32_t>(rank));
}

// A score and its place as one integer: the better score is the larger, among equals that of the lower index.
inline int64_t candidate(int32_t rank, int64_t index) {
  return static_cast<int64_t>(rank) << 32 | static_cast<uint32_t>(~index);
}
inline int32_t rank_of(int64_t candidate) { return static_cast<int32_t>(candidate >> 32); }
inline int64_t index_of(int64_t candidate) { return static_cast<uint32_t>(~candidate); }

template <class T>
int32_t highest_rank(const T* x, int64_t count) {
  int32_t highest = kLowestRank;
#pragma omp simd reduction(max : highest)
  for (int64_t i = 0; i < count; ++i) {
    const int32_t rank = rank_of(x[i]);
    highest = highest > rank ? highest : rank;
  }
  return highest;
}

class Selection {
 public:
  // The k best of x[0, count), best first; index_of() tells where they are. Valid until the next call.
  template <class T>
  const int64_t* operator()(const T* x, int64_t count, int64_t k) {
    if (count * k <= kSmallWork) return select_small(x, count, k);
    found_ = 0;
    int64_t chunk = kLargestChunk;
    while (chunk > kSmallestChunk && count < 4 * k * chunk) chunk /= 2;
    if (count < 2 * k * chunk) {  // too few chunks for a bound that keeps much out
      bound_ = kLowestRank;
      for (int64_t i = 0; i < count; i += kLargestChunk) collect(x, i, std::min(count, i + kLargestChunk), k);
    } else {
      bound_ = bound_by_chunks(x, count, k, chunk);
      for (int64_t i = 0, c = 0; i < count; i += chunk, ++c)
        if (highest_[static_cast<size_t>(c)] > bound_) collect(x, i, std::min(count, i + chunk), k);
    }
    keep(k);
    std::sort(candidates_, candidates_ + k, std::greater<>());
    return candidates_;
  }

 private:
  static constexpr int64_t kSmallestChunk = 16, kLargestChunk = 256;
  static constexpr int64_t kSmallWork = 1024;  // count * k
  static constexpr int64_t kRoom = 1024;       // for candidates, before those behind the k-th are dropped

  // A router's rows: k vectorized scans for the best cost less than the branches of any other selection (64 experts, 8
  // chosen: 0.22 us a row against 0.64).
  template <class T>
  const int64_t* select_small(const T* x, int64_t count, int64_t k) {
    for (int64_t i = 0; i < count; ++i) candidates_[i] = candidate(rank_of(x[i]), i);
    for (int64_t j = 0; j < k; ++j) {
      int64_t best = candidates_[0];
#pragma omp simd reduction(max : best)
      for (int64_t i = 0; i < count; ++i) best = best > candidates_[i] ? best : candidates_[i];
      best_[j] = best;
      candidates_[index_of(best)] = std::numeric_limits<int64_t>::min();
    }
    return best_;
  }

  // One less than the k-th best of the chunks' highest ranks, which it leaves in highest_.
  template <class T>
  int32_t bound_by_chunks(const T* x, int64_t count, int64_t k, int64_t chunk) {
    highest_.clear();
    for (int64_t i = 0; i < count; i += chunk) highest_.push_back(highest_rank(x + i, std::min(chunk, count - i)));
    ordered_ = highest_;
    std::nth_element(ordered_.begin(), ordered_.begin() + (k - 1), ordered_.end(), std::greater<>());
    return ordered_[static_cast<size_t>(k - 1)] - 1;
  }

  // Takes up what is above bound_. No branch depends on the scores.
  template <class T>
  void collect(const T* x, int64_t first, int64_t last, int64_t k) {
    if (found_ + (last - first) > kRoom) {
      keep(k);
      bound_ = rank_of(candidates_[k - 1]);  // an equal score further on has a higher index
    }
    for (int64_t i = first; i < last; ++i) {
      const int32_t rank = rank_of(x[i]);
      candidates_[found_] = candidate(rank, i);
      found_ += rank > bound_;
    }
  }

  void keep(int64_t k) {
    if (found_ > k) std::nth_element(candidates_, candidates_ + (k - 1), candidates_ + found_, std::greater<>());
    found_ = std::min(found_, k);
  }

  static_assert(kSmallWork <= kRoom && kLargestChunk + kMaxChosen <= kRoom);

  int32_t bound_ = kLowestRank;
  int64_t found_ = 0;
  std::vector<int32_t> highest_, ordered_;
  int64_t candidates_[kRoom + 1], best_[kMaxChosen];
};

}  // namespace KESTREL_CPU
