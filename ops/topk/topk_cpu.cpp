#include "kestrel/cpu/convert.h"
#include "kestrel/cpu/math.h"
#include "kestrel/cpu/parallel.h"
#include "ops/topk/args.h"
#include "ops/topk/draw.h"
#include "ops/topk/select.h"

namespace KESTREL_CPU {
namespace {

Selection& selection() {
  static thread_local Selection of_thread;
  return of_thread;
}

int64_t grain(int64_t width) { return 1 + 65536 / width; }

// x becomes its softmax, in place.
void softmax(float* x, int64_t count) {
  const float highest = score_of(highest_rank(x, count));
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) {
    x[i] = exp(x[i] - highest);
    sum += x[i];
  }
  for (int64_t i = 0; i < count; ++i) x[i] /= sum;
}

}  // namespace

void topk_fwd(const TopkArgs& args) {
  dispatch<bf16, f16, float>(args.scores.dtype, [&]<class T>() {
    parallel_for(args.scores_rows.count, grain(args.width), [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        const T* scores = args.scores.ptr<T>() + args.scores_rows.offset(row);
        T* values = args.values.ptr<T>() + args.values_rows.offset(row);
        int32_t* indices = args.indices.ptr<int32_t>() + args.indices_rows.offset(row);
        const int64_t* best = selection()(scores, args.width, args.k);
        for (int64_t i = 0; i < args.k; ++i) {
          indices[i] = static_cast<int32_t>(index_of(best[i]));
          values[i] = scores[indices[i]];
        }
        if (!args.softmax) continue;
        float chosen[kMaxChosen];
        for (int64_t i = 0; i < args.k; ++i) chosen[i] = to_float(values[i]);
        softmax(chosen, args.k);
        for (int64_t i = 0; i < args.k; ++i) values[i] = from_float<T>(chosen[i]);
      }
    });
  });
}

namespace {

struct RouterScratch {
  std::vector<float> scores, choice;  // choice: score + bias of the experts that may be chosen, side by side
  std::vector<int64_t> groups;        // as candidates
};

void score(const RouterArgs& args, int64_t row, float* out) {
  dispatch<bf16, f16, float>(args.scores.dtype, [&]<class T>() {
    const T* x = args.scores.ptr<T>() + args.scores_rows.offset(row);
    if (args.sigmoid)
      for (int64_t i = 0; i < args.experts; ++i) out[i] = sigmoid(to_float(x[i]));
    else
      for (int64_t i = 0; i < args.experts; ++i) out[i] = to_float(x[i]);
  });
  if (!args.sigmoid) softmax(out, args.experts);
}

void add_bias(const Tensor& bias, const float* scores, float* out) {
  dispatch<bf16, f16, float>(bias.dtype, [&]<class T>() {
    const T* b = bias.ptr<T>();
    for (int64_t i = 0; i < bias.size(0); ++i) out[i] = scores[i] + to_float(b[i]);
  });
}

// The sum of the two largest; of a single one, that.
float two_best(const float* x, int64_t count) {
  if (count == 1) return x[0];
  const int64_t* best = selection()(x, count, 2);
  return x[index_of(best[0])] + x[index_of(best[1])];
}

// Moves the experts of the best groups to the front of s.choice, and those groups, ascending, to that of s.groups.
void choose_groups(const RouterArgs& args, int64_t size, RouterScratch& s) {
  s.groups.clear();
  for (int64_t g = 0; g < args.groups; ++g)
    s.groups.push_back(candidate(rank_of(two_best(s.choice.data() + g * size, size)), g));
  const auto end = s.groups.begin() + args.chosen_groups;
  std::nth_element(s.groups.begin(), end - 1, s.groups.end(), std::greater<>());
  std::sort(s.groups.begin(), end, [](int64_t a, int64_t b) { return index_of(a) < index_of(b); });
  float* front = s.choice.data();
  for (auto g = s.groups.begin(); g != end; ++g, front += size)
    std::copy_n(s.choice.data() + index_of(*g) * size, size, front);
}

void route(const RouterArgs& args, int64_t row, RouterScratch& s) {
  float* weights = args.weights.ptr<float>() + args.weights_rows.offset(row);
  int32_t* ids = args.ids.ptr<int32_t>() + args.ids_rows.offset(row);
  const int64_t size = args.experts / args.groups;
  const bool grouped = args.chosen_groups < args.groups;
  s.scores.resize(static_cast<size_t>(args.experts));
  score(args, row, s.scores.data());
  s.choice = s.scores;
  if (args.bias) add_bias(*args.bias, s.scores.data(), s.choice.data());
  if (grouped) choose_groups(args, size, s);
  const int64_t* best = selection()(s.choice.data(), size * args.chosen_groups, args.k);
  float sum = 0;
  for (int64_t i = 0; i < args.k; ++i) {
    int64_t id = index_of(best[i]);
    if (grouped) id = index_of(s.groups[static_cast<size_t>(id / size)]) * size + id % size;
    ids[i] = static_cast<int32_t>(id);
    weights[i] = s.scores[static_cast<size_t>(id)];
    sum += weights[i];
  }
  const float divisor = args.renormalize && sum != 0.0f ? sum : 1.0f;
  for (int64_t i = 0; i < args.k; ++i) weights[i] = weights[i] / divisor * args.scale;
}

template <class T>
int64_t draw(const T* logits, const int64_t* best, int64_t k, float temperature, float u) {
  float cumulative[kMaxChosen];
  const float highest = to_float(logits[index_of(best[0])]);
  float sum = 0;
  for (int64_t i = 0; i < k; ++i) {
    sum += exp_weight((to_float(logits[index_of(best[i])]) - highest) / temperature);
    cumulative[i] = sum;
  }
  const float target = u * sum;
  for (int64_t i = 0; i < k; ++i)
    if (cumulative[i] > target) return index_of(best[i]);
  return index_of(best[0]);
}

}  // namespace

void topk_router(const RouterArgs& args) {
  parallel_for(args.scores_rows.count, grain(args.experts), [&](int64_t first, int64_t last) {
    static thread_local RouterScratch scratch;
    for (int64_t row = first; row < last; ++row) route(args, row, scratch);
  });
}

void sample_top_k(const SampleArgs& args) {
  const float temperature = args.temperature.host;
  const int64_t k = temperature > 0.0f ? args.k : 1;
  dispatch<bf16, f16, float>(args.logits.dtype, [&]<class T>() {
    parallel_for(args.logits_rows.count, grain(args.width), [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        const T* logits = args.logits.ptr<T>() + args.logits_rows.offset(row);
        const int64_t* best = selection()(logits, args.width, k);
        const float u = uniform(args.seed.host, args.offset.host, row);
        const int64_t id = k == 1 ? index_of(best[0]) : draw(logits, best, k, temperature, u);
        args.ids.ptr<int32_t>()[row] = static_cast<int32_t>(id);
      }
    });
  });
}

}  // namespace KESTREL_CPU
