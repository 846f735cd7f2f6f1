// Rows of up to 512 scores, one to a warp: lane l has the kPerLane scores from l * kPerLane on, in registers.
#pragma once

#include "kestrel/hopper/vec.cuh"
#include "kestrel/hopper/warp.cuh"
#include "kestrel/launch.h"
#include "ops/topk/args.h"
#include "ops/topk/keys.cuh"

namespace kestrel {

// kVec: adjacent scores of a load. kChosen: k, where it is known and rows are 32 * kPerLane wide; else 0.
template <int per_lane, int vec, int chosen = 0>
struct LaneTile {
  static constexpr int kPerLane = per_lane, kVec = vec, kChosen = chosen;
  // Rows as wide as a multiple of a lane's scores have full or empty lanes alone.
  static constexpr bool kWholeLanes = vec > 1;
};

constexpr int kTileThreads = 64;
constexpr int kRowsPerBlock = kTileThreads / kWarp;
constexpr int64_t kTileWidth = 512, kTileChosen = kWarp;

template <class Tile>
__device__ __forceinline__ bool holds(int first, int i, int width) {
  if constexpr (Tile::kChosen > 0) return true;
  return Tile::kWholeLanes ? first < width : first + i < width;
}

// The bits of the lane's scores (see bits_at), of those the row has.
template <class Tile, class T>
__device__ __forceinline__ void load_lane(const T* scores, int first, int width, uint32_t (&bits)[Tile::kPerLane]) {
  constexpr int kVec = Tile::kVec;
  Vec<T, kVec> vectors[Tile::kPerLane / kVec];
#pragma unroll
  for (int v = 0; v < Tile::kPerLane / kVec; ++v)
    vectors[v] = holds<Tile>(first, v * kVec, width) ? load<kVec>(scores + v * kVec) : Vec<T, kVec>{};
#pragma unroll
  for (int i = 0; i < Tile::kPerLane; ++i) bits[i] = bits_at(vectors[i / kVec], i % kVec);
}

// The tile for a layout, as body.template operator()<Tile>(); false where there is none.
template <class T, class Body>
bool choose_tile(const Tensor& scores, const Rows& rows, int64_t width, int64_t k, Body&& body) {
  if (width > kTileWidth || k > kTileChosen || !rows.uniform()) return false;
  bool found = false;
  const auto attempt = [&]<int kPerLane>() {
    constexpr int kVec = kPerLane < kVec16<T> ? kPerLane : kVec16<T>;
    if (found || width > kPerLane * kWarp || width % kPerLane != 0 || !vectors_fit<T, kVec>(scores, rows)) return;
    found = body.template operator()<LaneTile<kPerLane, kVec>>();
  };
  attempt.template operator()<2>();
  attempt.template operator()<4>();
  attempt.template operator()<8>();
  attempt.template operator()<16>();
  return found || body.template operator()<LaneTile<kTileWidth / kWarp, 1>>();
}

}  // namespace kestrel
