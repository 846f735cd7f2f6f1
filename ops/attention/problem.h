// What every attention kernel works on: operands, lengths, paging and mask, as plain numbers and pointers, so that it
// can be a kernel's argument. Whatever the mask, the keys that a query sees are one interval: visible_keys().
#pragma once

#include <kestrel/tensor.h>

namespace kestrel {

// Elements from one [batch, token, head] to the next. Packed tensors have no batch; of a paged cache it is the page.
struct AttentionStrides {
  int64_t batch, token, head;
  constexpr int64_t at(int64_t b, int64_t t, int64_t h) const { return b * batch + t * token + h * head; }
  bool operator==(const AttentionStrides&) const = default;
};

struct AttentionProblem {
  void* out;
  float* lse;  // or null
  const void *q, *k, *v;
  const void* sink;  // or null
  AttentionStrides out_stride, lse_stride, q_stride, k_stride, v_stride;
  DType q_dtype, kv_dtype, sink_dtype;

  int64_t batch, q_heads, k_heads, head_size;
  int64_t q_len, k_len;  // of every sequence, or room for it, where no tensor says otherwise
  const int32_t *cu_seqlens_q, *cu_seqlens_k, *seqused_k;  // or null
  const int32_t* page_table;                               // or null
  int64_t page_table_stride, page_size, pages;

  const int32_t* prefix_lens;         // or null
  int64_t prefix_len;                 // -1: no prefix
  int64_t window_left, window_right;  // -1: no limit
  bool causal;

  const float *k_scale_at, *v_scale_at;  // or null: the numbers below
  float k_scale, v_scale, softmax_scale, softcap;
};

struct Sequence {
  int64_t q_batch, q_first, q_len;  // q[q_batch, q_first + i]
  int64_t k_batch, k_first, k_len;  // k[k_batch, k_first + j]; paged: through row k_batch of the page table
  int64_t prefix;
};

constexpr Sequence sequence_of(const AttentionProblem& p, int64_t b) {
  Sequence s{b, 0, p.q_len, b, 0, p.k_len, p.prefix_lens ? p.prefix_lens[b] : p.prefix_len};
  if (p.cu_seqlens_q) {
    s.q_batch = 0;
    s.q_first = p.cu_seqlens_q[b];
    s.q_len = p.cu_seqlens_q[b + 1] - s.q_first;
  }
  if (p.cu_seqlens_k) {
    s.k_batch = 0;
    s.k_first = p.cu_seqlens_k[b];
    s.k_len = p.cu_seqlens_k[b + 1] - s.k_first;
  }
  if (p.seqused_k) s.k_len = p.seqused_k[b];
  return s;
}

struct KeyRange {
  int64_t first, last;  // [first, last); both grow with the query's index
};

constexpr KeyRange visible_keys(const AttentionProblem& p, const Sequence& s, int64_t query) {
  const int64_t position = query + s.k_len - s.q_len;
  int64_t first = 0, last = s.k_len;
  if (p.causal) last = position + 1;
  if (s.prefix >= 0 && position < s.prefix) last = s.prefix < s.k_len ? s.prefix : s.k_len;
  if (p.window_left >= 0 && first < position - p.window_left) first = position - p.window_left;
  if (p.window_right >= 0 && last > position + p.window_right + 1) last = position + p.window_right + 1;
  return {first, last > first ? last : first};
}

}  // namespace kestrel
