// The products of the decode kernels, by mma.sync: S^T = K Q^T and O^T = V^T P^T of a warp's step, 16 keys on M of the
// one and in the depth of the other, up to 8 query rows on N. e4m3 widens to f16 on the way.
#pragma once

#include <type_traits>

#include "kestrel/hopper/mbarrier.cuh"
#include "kestrel/hopper/mma.cuh"
#include "kestrel/hopper/numeric.cuh"
#include "ops/attention/decode_merge.cuh"

namespace kestrel::cuda {

// The pieces of a row of q that K's in the same thread meet.
template <class Tile>
__device__ __forceinline__ void load_q(uint32_t (&words)[Tile::kSize / 8], const typename Tile::Q* row, uint32_t t,
                                       int head_size) {
  constexpr int kAhead = sizeof(typename Tile::KV) == 1 ? 16 : 8;  // elements of a 16-byte piece of K
#pragma unroll
  for (int i = 0; i < Tile::kSize / 32; ++i) {
    const int at = i * 8 / kAhead * 4 * kAhead + kAhead * static_cast<int>(t) + i * 8 % kAhead;
    uint4 piece{};
    if (Tile::kWhole || at < head_size) piece = *reinterpret_cast<const uint4*>(row + at);
    words[4 * i] = piece.x, words[4 * i + 1] = piece.y, words[4 * i + 2] = piece.z, words[4 * i + 3] = piece.w;
  }
}

// B of S^T, two words for each product: in registers or in shared memory, where each thread has its own.
template <class Tile>
class Query {
 public:
  __device__ __forceinline__ Query() {
    if constexpr (Tile::kSharedQ) own_ = shared_address(&places()[0][this_thread()]);
  }
  __device__ __forceinline__ void set(int i, uint2 pair) {
    if constexpr (Tile::kSharedQ)
      places()[i][this_thread()] = pair;
    else
      pairs_[i] = pair;
  }
  __device__ __forceinline__ uint2 get(int i) const {
    if constexpr (Tile::kSharedQ) return load_shared_pair(own_ + i * Tile::kMostThreads * sizeof(uint2));
    return pairs_[i];
  }

 private:
  using Places = uint2[Tile::kQWords / 2][Tile::kMostThreads];
  static __device__ __forceinline__ Places& places() {
    __shared__ Places places;
    return places;
  }
  uint32_t own_;
  uint2 pairs_[Tile::kQWords / 2];
};

// It, out of these pieces.
template <class Tile>
__device__ __forceinline__ void convert_q(Query<Tile>& q, uint32_t (&words)[Tile::kSize / 8], bool odd_column) {
  if constexpr (!std::is_same_v<typename Tile::Q, typename Tile::Operand>) {
#pragma unroll
    for (uint32_t& word : words) {
      const float2 pair = to_float2<typename Tile::Q>(word);
      word = from_float2<typename Tile::Operand>(pair.x, pair.y);
    }
  }
#pragma unroll
  for (int i = 0; i < Tile::kQWords / 2; ++i) {
    if constexpr (Tile::kOneRow) {  // words next to each other in K
      constexpr int kNext = sizeof(typename Tile::KV) == 1 ? 2 : 1;
      const uint32_t* four = words + 4 * i;
      q.set(i, {odd_column ? four[kNext] : four[0], odd_column ? four[3] : four[3 - kNext]});
    } else {
      q.set(i, {words[2 * i], words[2 * i + 1]});
    }
  }
}

// A of S^T from a piece of K, and A of O^T from four rows of V: sums += both 16 columns of a word pair.
template <class Tile>
__device__ __forceinline__ void multiply_k(float (&sums)[4], const uint32_t* low, const uint32_t* high,
                                           const Query<Tile>& q) {
  using T = typename Tile::Operand;
#pragma unroll
  for (int w = 0; w < Tile::kKWords; w += sizeof(typename Tile::KV)) {
    const uint2 b = q.get(w / sizeof(typename Tile::KV));
    if constexpr (sizeof(typename Tile::KV) == 1) {
      uint32_t a[4];
      widen(low[w], &a[0], &a[2]);
      widen(high[w], &a[1], &a[3]);
      mma<T>(sums, a[0], a[1], a[2], a[3], b.x, b.y);
    } else {
      mma<T>(sums, low[w], high[w], low[w + 1], high[w + 1], b.x, b.y);
    }
  }
}
// The same of one row: 8 keys, whose words fill a fragment as they lie. Its rows g and g + 8 hold words next to each
// other of key g, which meet theirs of Q in the even and in the odd columns.
template <class Tile>
__device__ __forceinline__ float multiply_k(const uint32_t (&k)[Tile::kKWords], const Query<Tile>& q) {
  using T = typename Tile::Operand;
  float sums[4] = {};
#pragma unroll
  for (int i = 0; i < Tile::kQWords / 2; ++i) {
    const uint2 b = q.get(i);
    if constexpr (sizeof(typename Tile::KV) == 1) {
      uint32_t a[4];
      widen(k[2 * i], &a[0], &a[2]);
      widen(k[2 * i + 1], &a[1], &a[3]);
      mma<T>(sums, a[0], a[1], a[2], a[3], b.x, b.y);
    } else {
      mma<T>(sums, k[4 * i], k[4 * i + 1], k[4 * i + 2], k[4 * i + 3], b.x, b.y);
    }
  }
  return sums[0] + sums[3];
}
template <class Tile>
__device__ __forceinline__ void multiply_v(float (&out)[Tile::kSize / 16][4], const uint32_t (&v)[4][Tile::kVWords],
                                           const uint32_t (&p)[2], const uint32_t (&rest)[2]) {
  using T = typename Tile::Operand;
  constexpr bool kRest = Tile::kTwoParts && !Tile::kOneRow;
#pragma unroll
  for (int w = 0; w < Tile::kVWords; ++w) {
    uint32_t a[4];
    if constexpr (sizeof(typename Tile::KV) == 1) {
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const uint32_t select = pair ? 0x7362 : 0x5140;
        widen(__byte_perm(v[0][w], v[1][w], select), &a[0], &a[1]);
        widen(__byte_perm(v[2][w], v[3][w], select), &a[2], &a[3]);
        mma<T>(out[2 * w + pair], a[0], a[1], a[2], a[3], p[0], p[1]);
        if constexpr (kRest) mma<T>(out[2 * w + pair], a[0], a[1], a[2], a[3], rest[0], rest[1]);
      }
    } else {
#pragma unroll
      for (int part = 0; part < 4; ++part)
        a[part] = __byte_perm(v[part / 2 * 2][w], v[part / 2 * 2 + 1][w], part % 2 ? 0x7632 : 0x5410);
      mma<T>(out[w], a[0], a[1], a[2], a[3], p[0], p[1]);
      if constexpr (kRest) mma<T>(out[w], a[0], a[1], a[2], a[3], rest[0], rest[1]);
    }
  }
}

}  // namespace kestrel::cuda
