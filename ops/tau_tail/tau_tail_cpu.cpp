#include <vector>

#include "kestrel/cpu/parallel.h"
#include "ops/tau_tail/args.h"
#include "ops/tau_tail/scale_cpu.h"

namespace KESTREL_CPU {
namespace {

template <class T>
void scale(const TauTailArgs& args) {
  const Rows rows = token_rows(args.qkv_out, 1), tok_rows = token_rows(args.tok_qv_lin, 1),
             positions = token_rows(args.position_ids, 0);
  const int64_t heads = args.heads, size = args.head_size;
  parallel_for(rows.count, 1 + 8192 / (heads * size), [&](int64_t first, int64_t last) {
    static thread_local std::vector<float> factors;
    factors.resize(static_cast<size_t>(heads));
    for (int64_t token = first; token < last; ++token) {
      const int64_t position = index_at(args.position_ids, positions.offset(token));
      const T* tok = args.tok_qv_lin.ptr<T>() + tok_rows.offset(token);
      T* query = args.qkv_out.ptr<T>() + rows.offset(token);
      const auto scale_heads = [&](T* x, const T* tok_of_x) {
        tau_factors(factors.data(), tok_of_x, args.tau_pos_table, position, 0, heads);
        for (int64_t h = 0; h < heads; ++h, x += size) scale_head(x, x, factors[static_cast<size_t>(h)], size);
      };
      scale_heads(query, tok);
      scale_heads(query + 2 * heads * size, tok + heads);
    }
  });
}

}  // namespace

void tau_tail(const TauTailArgs& args) {
  dispatch<bf16, f16>(args.qkv_out.dtype, [&]<class T>() { scale<T>(args); });
}

}  // namespace KESTREL_CPU
