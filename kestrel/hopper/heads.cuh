// The heads of tokens over warps. A load of a warp takes whole heads of one token, as many as its lanes hold, adjacent
// lanes adjacent vectors, so that it asks for whole lines; kLoads loads take the heads that follow. What a head has of
// its own (a factor, a scale) one lane works out and tells the others.
#pragma once

#include "kestrel/hopper/divide.cuh"
#include "kestrel/hopper/vec.cuh"
#include "kestrel/hopper/warp.cuh"
#include "kestrel/launch.h"
#include "kestrel/tokens.h"

namespace kestrel {

// One tensor's heads: a range of blocks of kHeadThreads threads.
constexpr int kHeadThreads = 128;
template <class T>
struct HeadSide {
  T* x;
  int64_t token, head;  // strides
  Divider<uint32_t> warps_per_token, vectors_per_head;
  uint32_t heads, heads_per_load, warps, first_block;

  HeadSide() : x(nullptr), token(0), head(0), heads(0), heads_per_load(0), warps(0), first_block(0) {}
  // x [tokens..., heads, size] of uniform rows, of which a head's first `vectors` are taken; the grid grows by its
  // blocks.
  HeadSide(const Tensor& t, int64_t vectors, int loads, int64_t* blocks)
      : x(t.ptr<T>()),
        token(token_rows(t, 2).inner_stride),
        head(t.stride[t.rank - 2]),
        heads(static_cast<uint32_t>(t.size(-2))),
        heads_per_load(0),
        warps(0),
        first_block(static_cast<uint32_t>(*blocks)) {
    const int64_t tokens = token_rows(t, 2).count;
    if (tokens * vectors * heads == 0) return;
    heads_per_load = static_cast<uint32_t>(kWarp / vectors);
    const int64_t per_token = ceil_div(heads, int64_t{loads} * heads_per_load);
    warps_per_token = Divider<uint32_t>(per_token);
    vectors_per_head = Divider<uint32_t>(vectors);
    warps = static_cast<uint32_t>(tokens * per_token);
    *blocks += ceil_div(warps, kHeadThreads / kWarp);
  }
  static bool fits(const Tensor& t, int64_t vectors) {
    const Rows rows = token_rows(t, 2);
    return rows.uniform() && vectors_fit<T, kVec16<T>>(t, rows) && t.stride[t.rank - 2] % kVec16<T> == 0 &&
           vectors <= kWarp && fits_32_bits(rows.count * t.size(-2) * kWarp);
  }
};

// One lane's vectors: number `vector` of several heads of a token. Lanes behind the last whole head and heads behind
// the last one are not inside.
template <int kLoads>
class HeadLane {
 public:
  uint32_t token, vector, first_head;
  bool any;  // else the whole warp has nothing to do

  template <class T>
  __device__ __forceinline__ explicit HeadLane(const HeadSide<T>& side)
      : heads_(side.heads), per_load_(side.heads_per_load) {
    const uint32_t warp = (blockIdx.x - side.first_block) * (kHeadThreads / kWarp) + threadIdx.x / kWarp;
    uint32_t group;
    side.warps_per_token(warp, &token, &group);
    side.vectors_per_head(threadIdx.x % kWarp, &slot_, &vector);
    base_ = group * (kLoads * per_load_);
    first_head = base_ + slot_;
    any = warp < side.warps;
  }
  __device__ __forceinline__ bool inside(int i) const {
    return slot_ < per_load_ && first_head + i * per_load_ < heads_;
  }
  // The head whose own value this lane works out, and that value for load number i. For all lanes together.
  __device__ __forceinline__ uint32_t own_head() const { return min(base_ + threadIdx.x % kWarp, heads_ - 1); }
  __device__ __forceinline__ float of_head(int i, float own) const {
    return __shfl_sync(~0u, own, i * per_load_ + slot_);
  }

 private:
  uint32_t heads_, per_load_, slot_, base_;
};

// Is there work for all SMs with several loads a lane? If not, few heads are spread over many warps, a load in each. A
// warp's heads must not be more than its lanes.
inline bool many_heads(int loads, int64_t vectors_per_head, int64_t vectors) {
  return vectors_per_head >= loads && vectors > 65536;
}

}  // namespace kestrel
