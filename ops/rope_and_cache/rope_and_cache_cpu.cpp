// Each head goes through the steps of the separate ops, rounded to T after each: q where it lies, k and v in the cache
// where that has their dtype, else in a copy.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "ops/kv_cache_write/store_cpu.h"
#include "ops/rope_and_cache/args.h"
#include "ops/rotary_embedding/rotate_cpu.h"
#include "ops/tau_tail/scale_cpu.h"

namespace KESTREL_CPU {
namespace {

template <class T>
T* scratch(int64_t size) {
  static thread_local std::vector<T> buffer;
  if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(static_cast<size_t>(size));
  return buffer.data();
}

// The token's row of each table that a position points into.
template <class T>
struct Tables {
  const RopeAndCacheArgs& args;
  Rows positions = token_rows(args.rotary.positions, 0);
  Rows tok = args.tok_qv_lin ? token_rows(*args.tok_qv_lin, 1) : Rows{};
  int64_t pairs = args.rotary.cos_sin_cache.shape[1] / 2;

  int64_t position(int64_t token) const { return index_at(args.rotary.positions, positions.offset(token)); }

  void rotate(T* out, const T* x, int64_t position) const {
    const Tensor& table = args.rotary.cos_sin_cache;
    rotate_head(out, x, table.ptr<float>() + position * table.stride[0], pairs, args.rotary.interleaved);
  }

  // Factors of heads [first, first + count): of the values where `values`, else of the queries.
  const float* factors(int64_t token, int64_t position, bool values, int64_t first, int64_t count) const {
    float* out = scratch<float>(count);
    const T* row = args.tok_qv_lin->ptr<T>() + tok.offset(token) + (values ? args.write.heads : 0);
    tau_factors(out, row + first, *args.tau_pos_table, position, first, count);
    return out;
  }
};

template <class T>
void change_queries(const RopeAndCacheArgs& args) {
  const Tables<T> tables{args};
  const Tensor& q = args.rotary.query;
  const Rows rows = token_rows(q, 2);
  const int64_t heads = q.size(-2), size = q.size(-1), stride = q.stride[q.rank - 2];
  parallel_for(rows.count, 1 + 16384 / std::max<int64_t>(heads * size, 1), [&](int64_t first, int64_t last) {
    for (int64_t token = first; token < last; ++token) {
      const int64_t position = tables.position(token);
      T* query = q.ptr<T>() + rows.offset(token);
      if (args.tok_qv_lin) {
        const float* factors = tables.factors(token, position, false, 0, heads);
        for (int64_t h = 0; h < heads; ++h) scale_head(query + h * stride, query + h * stride, factors[h], size);
      }
      for (int64_t h = 0; h < heads; ++h) tables.rotate(query + h * stride, query + h * stride, position);
    }
  });
}

template <class T, class Cache>
void write(const RopeAndCacheArgs& args) {
  const Tables<T> tables{args};
  const Tensor &k = args.write.key, &v = args.write.value;
  const Rows k_rows = token_rows(k, 2), v_rows = token_rows(v, 2);
  const CacheSide<Cache> keys{args.write.key_cache, args.write.k_scale},
      values{args.write.value_cache, args.write.v_scale};
  const int64_t size = args.write.head_size;

  // make(out, head) gives each head in dtype T: in the cache itself, or beside it to be converted. Conversion waits for
  // all heads of the token: reading a head right after it was written would stall on the stores.
  const auto write_heads = [&](const CacheSide<Cache>& side, int64_t page, int64_t offset, int64_t first, int64_t last,
                               const auto& make) {
    if constexpr (std::is_same_v<T, Cache>) {
      for (int64_t h = first; h < last; ++h) make(side.head(page, offset, h), h);
    } else {
      T* made = scratch<T>((last - first) * size);
      for (int64_t h = first; h < last; ++h) make(made + (h - first) * size, h);
      for (int64_t h = first; h < last; ++h)
        store_head(side.head(page, offset, h), made + (h - first) * size, size, side.reciprocal(h));
    }
  };
  const auto write_keys = [&](int64_t token, int64_t page, int64_t offset, int64_t first, int64_t last) {
    const int64_t position = tables.position(token), rotated = 2 * tables.pairs;
    write_heads(keys, page, offset, first, last, [&](T* out, int64_t h) {
      const T* x = k.ptr<T>() + k_rows.offset(token) + h * k.stride[k.rank - 2];
      tables.rotate(out, x, position);
      std::copy(x + rotated, x + size, out + rotated);
    });
  };
  const auto write_values = [&](int64_t token, int64_t page, int64_t offset, int64_t first, int64_t last) {
    const T* x = v.ptr<T>() + v_rows.offset(token);
    const int64_t stride = v.stride[v.rank - 2];
    if (!args.tok_qv_lin) {
      for (int64_t h = first; h < last; ++h)
        store_head(values.head(page, offset, h), x + h * stride, size, values.reciprocal(h));
      return;
    }
    const float* factors = tables.factors(token, tables.position(token), true, first, last - first);
    write_heads(values, page, offset, first, last,
                [&](T* out, int64_t h) { scale_head(out, x + h * stride, factors[h - first], size); });
  };
  for_each_slot(args.write, write_keys, write_values);
}

}  // namespace

void rope_and_cache(const RopeAndCacheArgs& args) {
  dispatch<bf16, f16>(args.write.key.dtype, [&]<class T>() {
    change_queries<T>(args);
    if (args.write.key.empty()) return;
    args.write.fp8 ? write<T, e4m3>(args) : write<T, T>(args);
  });
}

}  // namespace KESTREL_CPU
