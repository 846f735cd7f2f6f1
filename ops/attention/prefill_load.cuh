// The loader of the prefill kernel, one thread: boxes by the copy engine (TMA), into rings of stages that every group
// releases.
#pragma once

#include "kestrel/hopper/mbarrier.cuh"
#include "kestrel/hopper/pdl.cuh"
#include "kestrel/hopper/tma.cuh"
#include "ops/attention/prefill_schedule.cuh"

namespace kestrel::cuda {

// The n-th use of a ring's stages: which one, and the parity of the phase in which it is full.
template <int kStages>
struct Place {
  static_assert((kStages & (kStages - 1)) == 0);
  uint32_t n;
  __device__ __forceinline__ uint32_t stage() const { return n % kStages; }
  __device__ __forceinline__ uint32_t parity() const { return n / kStages % 2; }
};

template <class Tile>
struct PrefillShared {
  char* memory;
  uint32_t base;

  __device__ __forceinline__ Plan* plan(uint32_t slot) const {
    static_assert(sizeof(Plan) <= kPlanBytes);
    return reinterpret_cast<Plan*>(memory + Tile::kPlansAt + slot * kPlanBytes);
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
  __device__ __forceinline__ uint32_t ones() const { return base + Tile::kOnesAt; }
  __device__ __forceinline__ uint32_t barrier(uint32_t i) const { return base + Tile::kBarriersAt + 8 * i; }
  __device__ __forceinline__ uint32_t keys_full(uint32_t stage) const { return barrier(stage); }
  __device__ __forceinline__ uint32_t keys_empty(uint32_t stage) const { return barrier(Tile::kStages + stage); }
  __device__ __forceinline__ uint32_t values_full(uint32_t stage) const { return barrier(2 * Tile::kStages + stage); }
  __device__ __forceinline__ uint32_t values_empty(uint32_t stage) const { return barrier(3 * Tile::kStages + stage); }
  __device__ __forceinline__ uint32_t query_full(uint32_t slot) const { return barrier(4 * Tile::kStages + slot); }
  __device__ __forceinline__ uint32_t query_empty(uint32_t slot) const {
    return barrier(4 * Tile::kStages + Tile::kQuerySlots + slot);
  }
};

// Rows from `row` on of one head, as panels; what lies past the tensor comes as zeros.
template <class Tile>
__device__ __forceinline__ void load_tile(uint32_t to, const CUtensorMap* map, const CUtensorMap* last, int row,
                                          int head, int batch, uint32_t barrier) {
#pragma unroll
  for (int panel = 0; panel < Tile::kPanels; ++panel)
    copy_box(to + panel * kPanelBytes,
             panel + 1 < Tile::kPanels || Tile::kLastColumns == kPanelColumns ? map : last, panel * kPanelColumns, row,
             head, batch, barrier);
}

template <class Tile>
__device__ __forceinline__ void load_by_boxes(const PrefillArgs& a, const PrefillShared<Tile>& shared) {
  constexpr uint32_t kBytes = Tile::kHead / 8 * 16 * kTileRows;
  const bool leader = threadIdx.x % 32 == 0;
  uint32_t next = 0, plans = 0;  // tiles of keys, and of work, that are under way
  prefetch_map(&a.q);
  prefetch_map(&a.k);
  prefetch_map(&a.v);
  wait_for_predecessor();
  release_successor();
  // Blocks take tiles back and forth, so that long and short ones come together: block i of G has i, 2 G - 1 - i, ...
  uint32_t step = 2 * (a.blocks - blockIdx.x) - 1;
#pragma unroll 1
  for (uint32_t index = blockIdx.x; index < a.tiles; index += step, step = 2 * a.blocks - step) {
    const Work w = work_of(a, index);
    if (w.tiles == 0) continue;
    const Place<Tile::kQuerySlots> slot{plans++};
    wait_barrier(shared.query_empty(slot.stage()), slot.parity() ^ 1);
    const Plan& plan = *shared.plan(slot.stage());
    write_plan(a, w, shared.plan(slot.stage()));
    if (leader) {
      const uint32_t q_full = shared.query_full(slot.stage());
      const int last = plan.last, count = last - plan.first;
      if (count == 0) arrive(q_full);
      const auto load_keys = [&](int i) {
        const Place<Tile::kStages> place{next + i};
        const uint32_t full = shared.keys_full(place.stage());
        wait_barrier(shared.keys_empty(place.stage()), place.parity() ^ 1);
        arrive_expecting(full, kBytes);
        load_tile<Tile>(shared.keys(place.stage()), &a.k, &a.k_last, plan.s.k_first + (last - 1 - i) * kTileRows,
                        plan.k_head, plan.k_batch, full);
      };
      if (count > 0) {
        arrive_expecting(q_full, a.groups * kBytes);
        load_keys(0);
      }
#pragma unroll 1
      for (int group = 0; count > 0 && group < a.groups; ++group)
        load_tile<Tile>(shared.query(slot.stage(), group), &a.q, &a.q_last, plan.s.q_first + plan.row[group], plan.head,
                        plan.q_batch, q_full);
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        if (i + 1 < count) load_keys(i + 1);
        const Place<Tile::kStages> place{next + i};
        const uint32_t full = shared.values_full(place.stage());
        wait_barrier(shared.values_empty(place.stage()), place.parity() ^ 1);
        arrive_expecting(full, kBytes);
        load_tile<Tile>(shared.values(place.stage()), &a.v, &a.v_last, plan.s.k_first + (last - 1 - i) * kTileRows,
                        plan.k_head, plan.k_batch, full);
      }
      next += count;
    }
    __syncwarp();
  }
  const Place<Tile::kQuerySlots> slot{plans};
  wait_barrier(shared.query_empty(slot.stage()), slot.parity() ^ 1);
  if (leader) {
    shared.plan(slot.stage())->head = -1;
    arrive(shared.query_full(slot.stage()));
  }
}

}  // namespace kestrel::cuda
