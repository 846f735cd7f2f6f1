// The tiles that the kernels of the products are compiled in (tiles.json, from which tools/moe_tiles.py writes the
// table), and the choice among them: by the tuned points of a layer's sizes (python/kestrel_kernels/configs, embedded
// by the same tool), the nearest number of tokens deciding, else by a rule of their number.
#pragma once

#include <kestrel/tensor.h>

#include <cstdint>
#include <string>
#include <vector>

namespace kestrel {

struct MoeArgs;
using MoeLaunch = void (*)(Stream, const MoeArgs&);

enum class MoeKernel { kWarp, kWgmma };

enum : unsigned { kMoeBF16 = 1, kMoeF16 = 2, kMoeE4M3 = 4 };

struct MoeTile {
  int block_m;  // assignments: a block of the alignment
  int block_n;  // rows of the weights
  int block_k;  // elements of the depth in a step
  int num_warps, num_stages;
  MoeKernel kernel;
  unsigned dtypes;

  constexpr bool takes(DType dtype) const {
    return dtypes & (dtype == DType::kBF16 ? kMoeBF16 : dtype == DType::kF16 ? kMoeF16 : kMoeE4M3);
  }
};

// Of a layer's weights.
struct MoeLayerSizes {
  int64_t experts, hidden, inner;
  DType dtype;
  bool operator==(const MoeLayerSizes&) const = default;
};

// A token count that a layer was tuned for, with the tiles of its two products there.
struct MoePoint {
  int64_t tokens;
  int up, down;
};

// What holds from `first` tokens on.
struct MoeRange {
  int64_t first;
  int up, down;
};

KESTREL_API int moe_tile_count();
KESTREL_API const MoeTile& moe_tile(int64_t index);

// A tile compiled elsewhere, for this process; returns its index. At most 256 of them.
KESTREL_API int moe_add_tile(const MoeTile& tile, MoeLaunch launch);
MoeLaunch moe_added_launch(int64_t index);

// Which kernel made this thread's last product, for the tuner and for tests: "warp", "wgmma", "plain", "cpu".
KESTREL_API const char* moe_last_kernel();
void moe_note_kernel(const char* name);

// Of all token counts, ascending, from 0 on.
KESTREL_API std::vector<MoeRange> moe_ranges(const MoeLayerSizes& sizes);

// The tile that is chosen for as many tokens, where it is `block_m` high; else -1, and the kernels choose.
int moe_tile_for(const MoeLayerSizes& sizes, int64_t tokens, int64_t block_m, bool down);

// The tuned points of a GPU take the place of those known for it and these sizes.
KESTREL_API void moe_learn(const std::string& gpu, const MoeLayerSizes& sizes, std::vector<MoePoint> points);
KESTREL_API void moe_forget();  // all of them, the embedded too

}  // namespace kestrel
