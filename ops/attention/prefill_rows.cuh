// The loader of the prefill kernel for keys and values that lie row by row: paged, or e4m3 to be converted to f16
// (which holds every e4m3 exactly) on the way. A warpgroup: each warp brings 16 rows of a step's keys and of its
// values, 8 or 4 lanes to a row, and a lane works out one row's address for the others. All comes by asynchronous
// copies, which no register waits for: entries of the page table kAhead steps ahead of the rows, 16-bit rows straight
// into the ring, e4m3 rows into one of their own, kAhead steps before they are converted. What binds it is the length
// of a warp's own code, and of e4m3 the start: the first tile of a prefix of 730 is there 4 us after the kernel's.
#pragma once

#include "kestrel/hopper/mma.cuh"
#include "kestrel/hopper/numeric.cuh"
#include "kestrel/hopper/vec.cuh"
#include "ops/attention/prefill_load.cuh"

namespace kestrel::cuda {

constexpr int kLoaderBarrier = 12;

template <class Tile>
class RowLoader {
 public:
  __device__ __forceinline__ RowLoader(const PrefillArgs& a, const PrefillShared<Tile>& shared)
      : a_(a), shared_(shared), warp_(threadIdx.x % kGroupThreads / 32), lane_(threadIdx.x % 32) {}

  // A tile of work. Tiles are counted from the last downwards.
  __device__ __forceinline__ void load(const Plan& plan) {
    const AttentionProblem& p = a_.problem;
    const int count = plan.last - plan.first;
    if (count == 0) return;
    const AttentionStrides& stride = lane_ < 16 ? p.k_stride : p.v_stride;
    const int64_t first = p.page_table ? 0 : plan.k_batch * stride.batch + plan.s.k_first * stride.token;
    base_ = reinterpret_cast<uint64_t>(lane_ < 16 ? p.k : p.v) + (first + plan.k_head * stride.head) * kSize;
    page_bytes_ = stride.batch * kSize, token_bytes_ = stride.token * kSize;
    table_ = p.page_table ? p.page_table + plan.k_batch * p.page_table_stride : nullptr;
    pages_ = static_cast<uint32_t>(min(p.pages, int64_t{1} << 31));  // a negative entry is one past them
    top_ = (plan.last - (lane_ < 16 ? 1 : 0)) * kTileRows + 16 * warp_ + lane_ % 16;
    first_key_ = plan.first_key, last_key_ = plan.last_key;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      copy_page(i);
      commit_copies();
    }
    // What waits for a group that is kAhead old finds that step's pages, or its e4m3 rows and the pages of a later one.
    if constexpr (Tile::kSource == KeySource::kRows) {
#pragma unroll 1
      for (int i = 0; i <= count; ++i) {
        wait_copy_groups<kAhead - 1>();
        copy_rows(i, count);
      }
    } else {
#pragma unroll 1
      for (int i = 0; i <= count + kAhead; ++i) {
        wait_copy_groups<kAhead - 1>();
        if (i >= kAhead) convert(i - kAhead);
        copy_raw(i, count);
      }
    }
  }

 private:
  static constexpr int kAhead = Tile::kAhead;
  static constexpr int kChunks = Tile::kHead / 8;  // of a row, 8 elements each
  static constexpr int kPasses = (kChunks + 7) / 8, kRounds = 4;
  static constexpr int kUnrolled = kPasses > 2 ? 1 : kPasses;              // registers are scarce at 256 columns
  static constexpr int kSize = Tile::kSource == KeySource::kRows ? 2 : 1;  // of an element

  // Lanes 0 to 15 look after the rows of a step's keys, 16 to 31 after those of its values.
  __device__ __forceinline__ int key_of(int i) const { return top_ - i * kTileRows; }
  __device__ __forceinline__ bool seen(int key) const { return key >= first_key_ && key < last_key_; }
  // Where this lane keeps the page of its row of a step, in shared memory.
  __device__ __forceinline__ uint32_t page_at(int i) const {
    return shared_.page(i % kAhead) + (32 * warp_ + lane_) * 4;
  }
  __device__ __forceinline__ void copy_page(int i) const {
    const int key = key_of(i);
    if (!table_ || !seen(key)) return;
    uint32_t entry, slot;
    a_.by_page_size(key, &entry, &slot);
    copy_async<4>(page_at(i), table_ + entry);
  }

  // Puts the addresses of the warp's rows of a step where its lanes find them. A one in the lowest bit says that the
  // row is to be read. Rows that no query sees, or of a page that is none, are not touched, as NaN may lie there, or
  // nothing: zeros stand for them. Returns which are of no page.
  __device__ __forceinline__ uint32_t place_rows(int i) const {
    const int key = key_of(i);
    bool wanted = seen(key), missing = false;
    uint64_t address = base_;
    if (!table_) {
      if (wanted) address += static_cast<uint32_t>(key) * token_bytes_;
    } else if (wanted) {
      uint32_t entry, slot;
      a_.by_page_size(key, &entry, &slot);
      const uint32_t page = load_shared_word(page_at(i));
      wanted = page < pages_;
      missing = !wanted;
      if (wanted) address += page * page_bytes_ + slot * token_bytes_;
    }
    __syncwarp();
    shared_.row_address()[32 * warp_ + lane_] = address | wanted;
    const uint32_t none = __ballot_sync(~0u, missing) & 0xffff;
    __syncwarp();
    return none;
  }
  __device__ __forceinline__ int line_of(int round) const { return 16 * warp_ + lane_ / 8 * 4 + round; }
  // copy(line, chunk, address, read) for this lane's chunks of keys or values whose rows are placed.
  template <bool kValues, class Copy>
  __device__ __forceinline__ void each_chunk(const Copy& copy) const {
    const auto* rows = reinterpret_cast<const ulonglong2*>(shared_.row_address() + 32 * warp_ + kValues * 16);
    const ulonglong2 low = rows[lane_ / 8 * 2], high = rows[lane_ / 8 * 2 + 1];
    const uint64_t row[kRounds] = {low.x, low.y, high.x, high.y};
#pragma unroll kUnrolled
    for (int pass = 0; pass < kPasses; ++pass) {
      const int chunk = pass * 8 + lane_ % 8;
      const bool held = chunk * 8 < static_cast<int>(a_.problem.head_size);
      if (kChunks % 8 == 0 || chunk < kChunks)
#pragma unroll
        for (int round = 0; round < kRounds; ++round)
          copy(line_of(round), chunk, reinterpret_cast<const char*>(row[round] & ~uint64_t{1}) + chunk * 8 * kSize,
               held && (row[round] & 1));
    }
  }

  __device__ __forceinline__ Place<Tile::kStages> wait_empty() {
    const Place<Tile::kStages> at = next_;
    next_ = at.next();
    wait_barrier(shared_.empty(at.stage()), at.parity() ^ 1);
    return at;
  }

  __device__ __forceinline__ void copy_rows(int i, int count) {
    const auto copy_to = [&](uint32_t to) {
      return [=](int line, int chunk, const char* from, bool read) {
        copy_async(to + tile_offset<Tile>(line, chunk), from, read ? 16 : 0);
      };
    };
    const uint32_t missing = place_rows(i);
    const Place<Tile::kStages> at = wait_empty();
    if (i < count) each_chunk<false>(copy_to(shared_.keys(at.stage())));
    if (i > 0) each_chunk<true>(copy_to(shared_.values(at.stage())));
    arrive_after_copies(shared_.full(at.stage()));
    if (lane_ == 0) {
      shared_.missing(at.stage())[warp_] = static_cast<uint16_t>(missing);
      arrive(shared_.full(at.stage()));  // the arrivals of asynchronous copies do not speak for this store
    }
    copy_page(i + kAhead);
    commit_copies();
  }

  // e4m3, by pieces of 16 bytes where rows are whole ones. A warp's 16 rows lie as panels of 64 columns, 16 lines each,
  // a lane's n-th piece 32 pieces behind its first, so that eight lanes read and write 128 bytes of different banks.
  static constexpr bool kWide = Tile::kHead % 16 == 0;
  static constexpr int kPieceBytes = kWide ? 16 : 8;
  static constexpr int kPerLine = 64 / kPieceBytes, kLines = 32 / kPerLine, kPerPanel = 16 / kLines;
  static constexpr int kFull = Tile::kHead / 64 * kPerPanel;    // a lane's pieces of whole panels
  static constexpr int kRest = Tile::kHead % 64 / kPieceBytes;  // pieces of a line past them: 0, 1 or 2
  static constexpr int kEach = kFull + (kRest > 0);             // a lane's pieces of keys or values
  static constexpr bool kAll = Tile::kHead <= 128;              // of them are in registers at a time
  static constexpr int kBatch = kAll ? kEach : 4;
  struct Piece {
    int line, byte;  // of the row
    bool there;
  };
  __device__ __forceinline__ Piece piece_of(int n) const {
    if (n < kFull)
      return {n % kPerPanel * kLines + lane_ / kPerLine, n / kPerPanel * 64 + lane_ % kPerLine * kPieceBytes, true};
    constexpr int kOf = std::max(kRest, 1);
    return {lane_ / kOf % 16, kFull / kPerPanel * 64 + lane_ % kOf * kPieceBytes, lane_ < 16 * kRest};
  }
  __device__ __forceinline__ uint32_t raw_at(int i, bool values) const {
    return shared_.raw(i % kAhead) + (values * kTileRows + 16 * warp_) * Tile::kHead;
  }
  template <int kBytes>
  __device__ __forceinline__ void copy_piece(uint32_t to, uint64_t row, int byte) const {
    const bool read = (row & 1) && byte < static_cast<int>(a_.problem.head_size);
    copy_async<kBytes>(to, reinterpret_cast<const char*>(row & ~uint64_t{1}) + byte, read ? kBytes : 0);
  }
  // The warp's rows of a step that is placed.
  __device__ __forceinline__ void copy_pieces(int i) const {
    const uint64_t* rows = shared_.row_address() + 32 * warp_;
    if (kWide && !a_.wide) {  // rare: short
#pragma unroll 1
      for (int at = lane_; at < 4 * Tile::kHead; at += 32) {
        const int row = at / (Tile::kHead / 8), byte = at % (Tile::kHead / 8) * 8, panel = byte / 64 * 64;
        copy_piece<8>(raw_at(i, row / 16) + panel * 16 + row % 16 * min(Tile::kHead - panel, 64) + byte % 64, rows[row],
                      byte);
      }
      return;
    }
    uint64_t row[2 * kPerPanel];
#pragma unroll
    for (int n = 0; n < 2 * kPerPanel; ++n) row[n] = rows[n / kPerPanel * 16 + piece_of(n % kPerPanel).line];
#pragma unroll
    for (int n = 0; n < 2 * kEach; ++n) {
      const bool values = n >= kEach;
      const Piece piece = piece_of(n % kEach);
      if (piece.there)
        copy_piece<kPieceBytes>(
            raw_at(i, values) + (n % kEach * 32 + lane_) * kPieceBytes,
            n % kEach < kFull ? row[values * kPerPanel + n % kEach % kPerPanel] : rows[values * 16 + piece.line],
            piece.byte);
    }
  }
  __device__ __forceinline__ void copy_raw(int i, int count) const {
    if (i <= count) {
      const uint32_t missing = place_rows(i);
      if (lane_ == 0) shared_.raw_missing(i % kAhead)[warp_] = static_cast<uint16_t>(missing);
      copy_pieces(i);
      copy_page(i + kAhead);
    }
    commit_copies();
  }
  struct Raw {
    uint32_t word[kBatch][kPieceBytes / 4];
  };
  __device__ __forceinline__ void load_raw(Raw& raw, uint32_t from) const {
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      if (!piece_of(n).there) continue;
      const uint32_t at = from + (n * 32 + lane_) * kPieceBytes;
      if constexpr (kWide) {
        const uint4 v = load_shared(at);
        raw.word[n][0] = v.x, raw.word[n][1] = v.y, raw.word[n][2] = v.z, raw.word[n][3] = v.w;
      } else {
        const uint2 v = load_shared_pair(at);
        raw.word[n][0] = v.x, raw.word[n][1] = v.y;
      }
    }
  }
  __device__ __forceinline__ void store_halves(const Raw& raw, uint32_t to) const {
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      const Piece piece = piece_of(n);
      if (piece.there)
#pragma unroll
        for (int half = 0; half < kPieceBytes / 8; ++half) {
          uint4 v;
          widen(raw.word[n][2 * half], &v.x, &v.y);
          widen(raw.word[n][2 * half + 1], &v.z, &v.w);
          store_shared(to + tile_offset<Tile>(16 * warp_ + piece.line, piece.byte / 8 + half), v);
        }
    }
  }
  __device__ __forceinline__ void convert_rows(Raw& raw, uint32_t from, uint32_t to) const {
#pragma unroll 1
    for (int n = 0; n < kEach; n += kBatch) {
      if (!kAll) load_raw(raw, from + n * 32 * kPieceBytes);
      store_halves(raw, to + n / kPerPanel * Tile::kPanelBytes);
    }
  }
  __device__ __forceinline__ void convert(int i) {
    Raw keys, values;
    __syncwarp();  // each lane has waited for its own copies
    if (kAll) load_raw(keys, raw_at(i, false)), load_raw(values, raw_at(i, true));
    const Place<Tile::kStages> at = wait_empty();
    convert_rows(keys, raw_at(i, false), shared_.keys(at.stage()));
    convert_rows(values, raw_at(i, true), shared_.values(at.stage()));
    if (lane_ == 0) shared_.missing(at.stage())[warp_] = shared_.raw_missing(i % kAhead)[warp_];
    __syncwarp();
    if (lane_ == 0) arrive(shared_.full(at.stage()));
  }

  const PrefillArgs& a_;
  const PrefillShared<Tile> shared_;
  const int warp_, lane_;
  Place<Tile::kStages> next_;
  // Of the tile of work: this lane's row of the last tile of keys, all keys that are seen, where the head's rows are.
  int top_, first_key_, last_key_;
  const int32_t* table_;  // or null
  uint32_t pages_;
  uint64_t base_;
  uint64_t page_bytes_, token_bytes_;
};

template <class Tile>
__device__ __forceinline__ void load_by_rows(const PrefillArgs& a, const PrefillShared<Tile>& shared) {
  const bool plans = threadIdx.x % kGroupThreads < 32;
  RowLoader<Tile> loader(a, shared);
  Planner planner;
#pragma unroll 1
  for (Place<Tile::kQuerySlots> slot;; slot = slot.next()) {
    if (plans) next_plan<Tile>(a, shared, slot, planner);
    wait_for_predecessor();
    if (slot.n == 0) release_successor();
    const Plan* plan = shared.plan(slot.stage());
    sync_threads(kLoaderBarrier, kGroupThreads);
    if (plan->head < 0) return;
    loader.load(*plan);
    if (Tile::kLarge || a.once) return wait_copies();
    // Everybody is done with this plan's place before the next one is written there.
    sync_threads(kLoaderBarrier, kGroupThreads);
  }
}

}  // namespace kestrel::cuda
