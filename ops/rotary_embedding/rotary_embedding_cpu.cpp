#include <algorithm>

#include "kestrel/cpu/index.h"
#include "kestrel/cpu/parallel.h"
#include "ops/rotary_embedding/args.h"
#include "ops/rotary_embedding/rotate_cpu.h"

namespace KESTREL_CPU {
namespace {

template <class T>
void rotate(const Tensor& x, const RotaryArgs& args) {
  const Rows tokens = token_rows(x, 2), positions = token_rows(args.positions, 0);
  const int64_t heads = x.size(-2), head_stride = x.stride[x.rank - 2], pairs = args.cos_sin_cache.shape[1] / 2;
  const int64_t grain = 1 + 16384 / std::max<int64_t>(heads * pairs, 1);
  parallel_for(tokens.count, grain, [&](int64_t first, int64_t last) {
    for (int64_t token = first; token < last; ++token) {
      const int64_t position = index_at(args.positions, positions.offset(token));
      const float* cos_sin = args.cos_sin_cache.ptr<float>() + position * args.cos_sin_cache.stride[0];
      T* head = x.ptr<T>() + tokens.offset(token);
      for (int64_t h = 0; h < heads; ++h, head += head_stride)
        rotate_head(head, head, cos_sin, pairs, args.interleaved);
    }
  });
}

}  // namespace

void rotary_embedding(const RotaryArgs& args) {
  dispatch<bf16, f16, float>(args.query.dtype, [&]<class T>() {
    rotate<T>(args.query, args);
    if (args.key) rotate<T>(*args.key, args);
  });
}

}  // namespace KESTREL_CPU
