// The loader of the prefill kernel, one thread: boxes by the copy engine (TMA), into a ring of stages that every group
// releases. A stage takes a tile of keys and the values of the tile before it, which are needed together: n tiles pass
// through n + 1 stages.
#pragma once

#include <bit>

#include "kestrel/hopper/mbarrier.cuh"
#include "kestrel/hopper/pdl.cuh"
#include "kestrel/hopper/tma.cuh"
#include "ops/attention/prefill_schedule.cuh"

namespace kestrel::cuda {

// A use of a ring's stages: which one, and the parity of the phase in which it is full.
template <int kStages>
struct Place {
  static constexpr uint32_t kPhase = std::bit_ceil(static_cast<uint32_t>(kStages));
  uint32_t n = 0;
  __device__ __forceinline__ uint32_t stage() const { return n % kPhase; }
  __device__ __forceinline__ uint32_t parity() const { return n / kPhase % 2; }
  __device__ __forceinline__ Place next() const {
    return {n + 1 + (kStages < kPhase && stage() + 1 == kStages ? kPhase - kStages : 0)};
  }
};

template <class Tile>
struct PrefillShared {
  uint32_t base;

  __device__ __forceinline__ char* at(uint32_t offset) const {
    return static_cast<char*>(__cvta_shared_to_generic(base + offset));
  }
  __device__ __forceinline__ Plan* plan(uint32_t slot) const {
    static_assert(sizeof(Plan) <= kPlanBytes);
    return reinterpret_cast<Plan*>(at(Tile::kPlansAt + slot * kPlanBytes));
  }

  __device__ __forceinline__ uint32_t query(uint32_t slot, int group) const {
    return base + slot * Tile::kQueryBytes + group * Tile::kTileBytes;
  }
  __device__ __forceinline__ uint32_t keys(uint32_t stage) const {
    return base + Tile::kKeysAt + stage * Tile::kTileBytes;
  }
  __device__ __forceinline__ uint32_t values(uint32_t stage) const {
    return base + Tile::kValuesAt + stage * Tile::kTileBytes;
  }
  // A bit for each row of keys that lies in no page there is.
  __device__ __forceinline__ uint16_t* missing(uint32_t stage) const {
    return reinterpret_cast<uint16_t*>(at(Tile::kMissingAt)) + stage * 4;
  }
  __device__ __forceinline__ uint64_t* row_address() const { return reinterpret_cast<uint64_t*>(at(Tile::kRowsAt)); }
  __device__ __forceinline__ uint32_t page(uint32_t i) const { return base + Tile::kPagesAt + i * Tile::kPageBytes; }
  __device__ __forceinline__ uint32_t raw(uint32_t i) const { return base + Tile::kRawAt + i * Tile::kRawBytes; }
  __device__ __forceinline__ uint16_t* raw_missing(uint32_t i) const {
    return reinterpret_cast<uint16_t*>(at(Tile::kRawMissingAt)) + i * 4;
  }
  __device__ __forceinline__ uint32_t ones() const { return base + Tile::kOnesAt; }
  __device__ __forceinline__ uint32_t barrier(uint32_t i) const { return base + Tile::kBarriersAt + 8 * i; }
  __device__ __forceinline__ uint32_t full(uint32_t stage) const { return barrier(stage); }
  __device__ __forceinline__ uint32_t empty(uint32_t stage) const { return barrier(Tile::kStages + stage); }
  __device__ __forceinline__ uint32_t query_full(uint32_t slot) const { return barrier(2 * Tile::kStages + slot); }
  __device__ __forceinline__ uint32_t query_empty(uint32_t slot) const {
    return barrier(2 * Tile::kStages + Tile::kQuerySlots + slot);
  }
  __device__ __forceinline__ uint32_t plan_full(uint32_t slot) const {
    return barrier(2 * Tile::kStages + 2 * Tile::kQuerySlots + slot);
  }
};

// Where 8 columns of a row lie in a tile: see tensor_map.h.
template <class Tile>
__device__ __forceinline__ uint32_t tile_offset(int row, int chunk) {
  constexpr int kChunks = Tile::kSpan / 16;
  return chunk / kChunks * Tile::kPanelBytes + row * Tile::kSpan +
         (chunk % kChunks ^ row * Tile::kSpan / 128 % kChunks) * 16;
}

// Rows from `row` on of one head, as panels; what lies past the tensor comes as zeros.
template <class Tile>
__device__ __forceinline__ void load_tile(uint32_t to, const CUtensorMap* map, const CUtensorMap* last, int row,
                                          int head, int batch, uint32_t barrier) {
  constexpr int kLast = Tile::kPanels - 1;
  if constexpr (Tile::kNarrow) {
    copy_box(to, map, 0, row, 0, head, batch, barrier);
  } else {
#pragma unroll
    for (int panel = 0; panel < kLast; ++panel)
      copy_box(to + panel * Tile::kPanelBytes, map, panel * Tile::kPanelColumns, row, head, batch, barrier);
  }
  copy_box(to + kLast * Tile::kPanelBytes, last, kLast * Tile::kPanelColumns, row, head, batch, barrier);
}

// Hands the block's next plan, in the n-th use of a slot, to the groups, and their queries where the copy engine can
// bring them. By the whole warp, a lane for each group. A plan without head says that there is no more work.
template <class Tile>
__device__ __forceinline__ const Plan& next_plan(const PrefillArgs& a, const PrefillShared<Tile>& shared,
                                                 Place<Tile::kQuerySlots> slot, Planner& planner) {
  const int lane = threadIdx.x % 32;
  Plan& plan = *shared.plan(slot.stage());
  const uint32_t q_full = shared.query_full(slot.stage());
  wait_barrier(shared.query_empty(slot.stage()), slot.parity() ^ 1);
  Work w;
  const bool more = planner.next(a, &w, &plan);
  if (more) write_plan(a, w, &plan);
  __syncwarp();
  if (!more && lane == 0) plan.head = -1;
  __syncwarp();
  const bool boxes = Tile::kSource != KeySource::kE4m3Rows && more && plan.first < plan.last;
  if (lane == 0) {
    if (!boxes) arrive(q_full);
    arrive(shared.plan_full(slot.stage()));
  }
  wait_for_predecessor();
  if (lane == 0 && boxes) arrive_expecting(q_full, a.groups * (Tile::kHead / 8 * 16 * kTileRows));
  if (lane < a.groups && boxes)
    load_tile<Tile>(shared.query(slot.stage(), lane), &a.q, &a.q_last, plan.s.q_first + plan.row[lane], plan.head,
                    plan.q_batch, q_full);
  return plan;
}

template <class Tile>
__device__ __forceinline__ void load_by_boxes(const PrefillArgs& a, const PrefillShared<Tile>& shared) {
  constexpr uint32_t kBytes = Tile::kHead / 8 * 16 * kTileRows;
  const bool leader = threadIdx.x % 32 == 0;
  prefetch_map(&a.q_last);
  prefetch_map(&a.k_last);
  prefetch_map(&a.v_last);
  Planner planner;
  Place<Tile::kStages> place;
#pragma unroll 1
  for (Place<Tile::kQuerySlots> slot;; slot = slot.next()) {
    const Plan& plan = next_plan<Tile>(a, shared, slot, planner);
    if (slot.n == 0) release_successor();
    if (plan.head < 0) return;
    const int last = plan.last, count = last - plan.first;
    if (leader && count > 0) {
#pragma unroll 1
      for (int i = 0; i <= count; ++i, place = place.next()) {
        const uint32_t full = shared.full(place.stage());
        wait_barrier(shared.empty(place.stage()), place.parity() ^ 1);
        arrive_expecting(full, i == 0 || i == count ? kBytes : 2 * kBytes);
        const int row = plan.s.k_first + (last - 1 - i) * kTileRows;
        if (i < count)
          load_tile<Tile>(shared.keys(place.stage()), &a.k, &a.k_last, row, plan.k_head, plan.k_batch, full);
        if (i > 0)
          load_tile<Tile>(shared.values(place.stage()), &a.v, &a.v_last, row + kTileRows, plan.k_head, plan.k_batch,
                          full);
      }
    }
    __syncwarp();
    if (a.once) return;
  }
}

}  // namespace kestrel::cuda
