// Expert after expert: the rows of all its blocks against its weights, by the twins' matrix product, whose threads
// share the columns. A sum over the experts of a token is kept apart for each of them in fp32 and added in order at the
// end, for so many columns at a time as bound the memory of that.
#include <memory>
#include <vector>

#include "kestrel/cpu/matmul.h"
#include "kestrel/cpu/rows.h"
#include "ops/activation/gate_cpu.h"
#include "ops/moe/moe_args.h"

namespace KESTREL_CPU {
namespace {

template <class F>
inline void each(int64_t count, float* __restrict a, F f) {
  for (int64_t i = 0; i < count; ++i) a[i] = f(a[i], i);
}

// body(expert, assignments, their number) for each run of blocks of one expert.
template <class Body>
void each_expert(const MoeArgs& args, Body body) {
  const int64_t used = *args.num_tokens_post_pad;
  std::vector<int32_t> ids;
  for (int64_t position = 0; position < used;) {
    const int32_t expert = args.expert_ids[position / args.block_m];
    ids.clear();
    for (; position < used && args.expert_ids[position / args.block_m] == expert; ++position)
      if (args.sorted_token_ids[position] < args.assignments()) ids.push_back(args.sorted_token_ids[position]);
    if (expert >= 0) body(expert, ids.data(), static_cast<int64_t>(ids.size()));
  }
}

// epilogue(assignment, column, count, sums, sums of the second panel), columns being those of a panel, scaled.
template <int kPanels, class T, class Epilogue>
void products(const MoeArgs& args, int64_t first, int64_t columns, Epilogue epilogue) {
  each_expert(args, [&](int64_t expert, const int32_t* ids, int64_t rows) {
    Weights<T> weights{{}, {}, columns, args.depth};
    const float* scale[kPanels];
    for (int i = 0; i < kPanels; ++i) {
      const ExpertWeights& w = args.panel[i];
      weights.panel[i] = static_cast<const T*>(w.data) + expert * w.expert_stride + first * w.row_stride;
      weights.stride[i] = w.row_stride;
      scale[i] = w.scale ? w.scale + expert * w.scale_stride + first : nullptr;
    }
    const auto x_row = [&](int64_t row) {
      return static_cast<const T*>(args.x) + args.x_rows.offset(ids[row] / args.slots_per_row);
    };
    matmul<kPanels>(weights, rows, x_row, [&](int64_t row, int64_t column, int64_t count, float* a, float* g) {
      if (args.x_scale) {
        const float x_scale = args.x_scale[ids[row] / args.slots_per_row];
        float* const sums[] = {a, g};
        for (int i = 0; i < kPanels; ++i) {
          const float* const s = scale[i] + column;
          each(count, sums[i], [=](float v, int64_t n) { return v * x_scale * s[n]; });
        }
      }
      epilogue(ids[row], first + column, count, a, g);
    });
  });
}

template <class Out>
Out* out_row(const MoeArgs& args, int64_t row) {
  return args.out.ptr<Out>() + args.out_rows.offset(row);
}

template <class T, class Out>
void up(const MoeArgs& args) {
  products<2, T>(args, 0, args.width, [&](int64_t assignment, int64_t column, int64_t count, float* a, float* g) {
    Out* const out = out_row<Out>(args, assignment) + column;
    if (args.gate) {
      apply_gate(*args.gate, count, a, g);
    } else {
      narrow(out + args.width, g, count);
    }
    narrow(out, a, count);
  });
}

inline float routing_weight(const MoeArgs& args, int64_t assignment) {
  return args.topk_weights[assignment / args.slots * args.topk_weights_stride + assignment % args.slots];
}

template <class T, class Out>
void down(const MoeArgs& args) {
  products<1, T>(args, 0, args.width, [&](int64_t assignment, int64_t column, int64_t count, float* a, float*) {
    const float weight = routing_weight(args, assignment);
    each(count, a, [=](float v, int64_t) { return v * weight; });
    narrow(out_row<Out>(args, assignment) + column, a, count);
  });
}

template <class T, class Out>
void down_reduced(const MoeArgs& args) {
  constexpr int64_t kMemory = 16 << 20, kLeastColumns = kBlockColumns;
  const int64_t assignments = args.assignments(), slots = args.slots;
  const int64_t width = std::min(args.width, std::max(kMemory / std::max<int64_t>(assignments, 1), kLeastColumns));
  const std::unique_ptr<float[]> parts(new float[static_cast<size_t>(assignments * width)]);
  std::vector<uint8_t> present(static_cast<size_t>(assignments));
  each_expert(args, [&](int64_t, const int32_t* ids, int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) present[ids[i]] = 1;
  });

  for (int64_t first = 0; first < args.width; first += width) {
    const int64_t columns = std::min(width, args.width - first);
    products<1, T>(args, first, columns, [&](int64_t assignment, int64_t column, int64_t count, float* a, float*) {
      const float weight = routing_weight(args, assignment);
      float* __restrict part = parts.get() + assignment * width + column - first;
      for (int64_t i = 0; i < count; ++i) part[i] = a[i] * weight;
    });
    parallel_for(args.tokens, 1 + 16384 / (columns * (slots + 1)), [&](int64_t begin, int64_t end) {
      alignas(64) float sums[kBlockColumns];
      for (int64_t token = begin; token < end; ++token) {
        for (int64_t column = 0; column < columns; column += kBlockColumns) {
          const int64_t count = std::min<int64_t>(kBlockColumns, columns - column);
          std::fill_n(sums, count, 0.0f);
          for (int64_t a = token * slots; a < (token + 1) * slots; ++a) {
            if (!present[a]) continue;
            const float* part = parts.get() + a * width + column;
            each(count, sums, [=](float v, int64_t i) { return v + part[i]; });
          }
          narrow(out_row<Out>(args, token) + first + column, sums, count);
        }
      }
    });
  }
}

template <class T, class Out>
void run(const MoeArgs& args) {
  if (args.panels == 2)
    up<T, Out>(args);
  else if (args.reduce)
    down_reduced<T, Out>(args);
  else
    down<T, Out>(args);
}

}  // namespace

void moe(const MoeArgs& args) {
  dispatch<bf16, f16, e4m3>(args.dtype, [&]<class T>() {
    if constexpr (dtype_of<T> == DType::kE4M3) {
      if (args.out.dtype == DType::kF32)  // for fused_moe
        up<T, float>(args);
      else
        run<T, bf16>(args);
    } else {
      run<T, T>(args);
    }
  });
}

}  // namespace KESTREL_CPU
