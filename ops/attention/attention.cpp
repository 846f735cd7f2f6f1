#include "ops/attention/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "kestrel/contract.h"
#include "kestrel/cpu/target.h"
#include "kestrel/cuda.h"
#include "kestrel/indices.h"
#include "ops/attention/plan.h"
#include "ops/attention/problem.h"

KESTREL_CPU_TWIN(attention, void(const kestrel::AttentionProblem& problem));

namespace kestrel {
namespace cuda {
const char* attention_decode(Stream stream, const AttentionProblem& problem, const DecodeHints& hints, DecodePlan plan);
void attention_prefill(Stream stream, const AttentionProblem& problem, const PrefillPlan& plan);
void attention(Stream stream, const AttentionProblem& problem);
}  // namespace cuda

namespace {

constexpr int64_t kInt32End = int64_t{1} << 31;

thread_local const char* last_kernel = "";

// Dimensions of one index have no stride: frameworks put anything there, which would look unaligned.
AttentionStrides strides_of(const Tensor& t) {
  const auto stride = [&](int dim) { return t.shape[dim] > 1 ? t.stride[dim] : 0; };
  if (t.rank == 4) return {stride(0), stride(1), stride(2)};
  return {0, stride(0), stride(1)};
}

const int32_t* pointer(const std::optional<Tensor>& t) { return t ? t->ptr<int32_t>() : nullptr; }

void check_scale(Contract& c, const char* name, const Value<float>& scale) {
  if (!scale.tensor) return;
  c.in(name, *scale.tensor).dtype({DType::kF32});
  c.require(scale.tensor->numel() == 1, name, "one number", scale.tensor->numel());
}

void check_bound(Contract& c, const char* name, std::optional<int64_t> bound, int64_t length) {
  if (bound && length > *bound)
    c.fail(ErrorKind::kValueError, name, "be at least the longest sequence",
           std::to_string(*bound) + " for a length of " + std::to_string(length));
}

// Offsets that start anywhere and never fall. Rows before the first and after the last belong to no sequence.
void check_offsets(Contract& c, const char* name, const int32_t* offsets, int64_t batch, int64_t total) {
  for (int64_t b = 0; b <= batch; ++b) {
    c.require(offsets[b] >= (b ? offsets[b - 1] : 0), name, "offsets that start at 0 or above and never fall",
              int64_t{offsets[b]});
    c.require(offsets[b] <= total, name, "offsets into the rows there are", int64_t{offsets[b]});
  }
}

// The lengths and pages of each sequence. Pages that no query sees are not looked at: a window leaves old ones behind.
void check_sequences(Contract& c, const AttentionProblem& p, std::optional<int64_t> max_seqlen_q,
                     std::optional<int64_t> max_seqlen_k) {
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence s = sequence_of(p, b);
    const int64_t room = p.cu_seqlens_k ? p.cu_seqlens_k[b + 1] - p.cu_seqlens_k[b] : p.k_len;
    if (p.seqused_k) {
      c.require(s.k_len >= 0, "seqused_k", "0 or more", s.k_len);
      c.require(s.k_len <= room, "seqused_k", p.page_table ? "within the room of its page table" : "within the keys",
                s.k_len);
    }
    check_bound(c, "max_seqlen_q", max_seqlen_q, s.q_len);
    check_bound(c, "max_seqlen_k", max_seqlen_k, s.k_len);
    if (!p.page_table || s.q_len == 0) continue;
    const int64_t first = visible_keys(p, s, 0).first, last = visible_keys(p, s, s.q_len - 1).last;
    if (first >= last) continue;
    const int32_t* table = p.page_table + b * p.page_table_stride;
    for (int64_t entry = first / p.page_size; entry <= (last - 1) / p.page_size; ++entry)
      if (table[entry] < 0 || table[entry] >= p.pages)
        c.fail(ErrorKind::kValueError, "page_table", "hold pages in [0, " + std::to_string(p.pages) + ")",
               std::to_string(table[entry]) + " at [" + std::to_string(b) + ", " + std::to_string(entry) + "]");
  }
}

}  // namespace

const char* last_attention_kernel() { return last_kernel; }

int64_t attention_workspace_bytes() { return kAttentionWorkspaceBytes; }

void attention(Stream stream, Tensor out, std::optional<Tensor> lse, Tensor q, Tensor k, Tensor v,
               const AttentionOptions& o) {
  Contract c(o.names.op);
  Dim B("B"), Sq("Sq"), Hq("Hq"), Hk("Hk"), Sk("Sk"), D("D"), total_q("total_q"), total_k("total_k"), pages("pages"),
      page_size("page_size"), max_pages("max_pages"), starts("B + 1");
  c.in("q", q).dtype({DType::kBF16, DType::kF16});
  if (o.cu_seqlens_q) {
    c.in("q", q).shape({total_q, Hq, D}).last_contiguous();
    c.in("cu_seqlens_q", *o.cu_seqlens_q).dtype({DType::kI32}).shape({starts}).contiguous();
    c.require(starts >= 1, "cu_seqlens_q", "B + 1 offsets long", starts.size);
    B.size = starts - 1;
  } else {
    c.in("q", q).shape({B, Sq, Hq, D}).last_contiguous();
    starts.size = B + 1;
  }
  c.require(D >= 1 && D <= 256, "q", "of a head size from 1 to 256", D.size);

  c.in(o.names.k, k).dtype({q.dtype, DType::kE4M3, DType::kU8});
  c.require(!(o.page_table && o.cu_seqlens_k), "cu_seqlens_k", "None where a page_table is given", std::string("both"));
  if (o.page_table) {
    c.in(o.names.k, k).shape({pages, page_size, Hk, D}).last_contiguous();
    c.require(page_size >= 1, o.names.k, "of a page size of at least 1", page_size.size);
    c.in("page_table", *o.page_table).dtype({DType::kI32}).shape({B, max_pages}).last_contiguous();
  } else if (o.cu_seqlens_k) {
    c.in(o.names.k, k).shape({total_k, Hk, D}).last_contiguous();
    c.in("cu_seqlens_k", *o.cu_seqlens_k).dtype({DType::kI32}).shape({starts}).contiguous();
  } else {
    c.in(o.names.k, k).shape({B, Sk, Hk, D}).last_contiguous();
  }
  c.in(o.names.v, v).dtype_like(k).shape_like(k).last_contiguous();
  c.require(Hk > 0 ? Hq % Hk == 0 : Hq == 0, "q", "of a multiple of the key heads", Hq.size);

  if (o.seqused_k) c.in("seqused_k", *o.seqused_k).dtype({DType::kI32}).shape({B}).contiguous();
  const Value<int64_t> prefix = o.prefix_len.value_or(Value<int64_t>(-1));
  if (prefix.tensor) c.in("prefix_len", *prefix.tensor).dtype({DType::kI32}).shape({B}).contiguous();
  if (o.learnable_sink)
    c.in("learnable_sink", *o.learnable_sink).dtype({DType::kBF16, DType::kF16, DType::kF32}).shape({Hq}).contiguous();
  check_scale(c, "k_scale", o.k_scale);
  check_scale(c, "v_scale", o.v_scale);
  c.out("out", out).like(q).last_contiguous();
  if (o.workspace && !c.on_cpu())
    c.workspace(*o.workspace, attention_workspace_bytes(), "attention_workspace_bytes() long", 16);
  if (lse) {
    c.out("lse", *lse).dtype({DType::kF32});
    o.cu_seqlens_q ? c.out("lse", *lse).shape({Hq, total_q}) : c.out("lse", *lse).shape({B, Hq, Sq});
  }

  const auto at_least = [&](const char* name, const char* expected, const std::optional<int64_t>& value, int64_t low) {
    c.require(!value || *value >= low, name, expected, value.value_or(low));
  };
  at_least("window_size", "None, -1 or more on the left", o.window_left, -1);
  at_least("window_size", "None, -1 or more on the right", o.window_right, -1);
  at_least("max_seqlen_q", "0 or more", o.max_seqlen_q, 0);
  at_least("max_seqlen_k", "0 or more", o.max_seqlen_k, 0);
  at_least("fresh_tokens", "0 or more", o.fresh_tokens, 0);
  at_least("num_splits", "0 or more", o.num_splits, 0);
  c.require(o.softcap >= 0.0f && std::isfinite(o.softcap), "softcap", "0 or more", static_cast<double>(o.softcap));
  if (o.prefix_len && !prefix.tensor) c.require(prefix.host >= 0, "prefix_len", "0 or more", prefix.host);

  AttentionProblem p{};
  p.out = out.data, p.q = q.data, p.k = k.data, p.v = v.data;
  p.out_stride = strides_of(out), p.q_stride = strides_of(q), p.k_stride = strides_of(k), p.v_stride = strides_of(v);
  if (lse) {
    p.lse = lse->ptr<float>();
    const int64_t* stride = lse->stride;
    p.lse_stride =
        lse->rank == 3 ? AttentionStrides{stride[0], stride[2], stride[1]} : AttentionStrides{0, stride[1], stride[0]};
  }
  if (o.learnable_sink) p.sink = o.learnable_sink->data, p.sink_dtype = o.learnable_sink->dtype;
  p.q_dtype = q.dtype;
  p.kv_dtype = k.dtype == DType::kU8 ? DType::kE4M3 : k.dtype;
  p.batch = B, p.q_heads = Hq, p.k_heads = Hk, p.head_size = D;
  p.q_len = o.cu_seqlens_q ? total_q : Sq;
  p.k_len = o.page_table ? max_pages * page_size : o.cu_seqlens_k ? total_k : Sk;
  p.cu_seqlens_q = pointer(o.cu_seqlens_q), p.cu_seqlens_k = pointer(o.cu_seqlens_k);
  p.seqused_k = pointer(o.seqused_k);
  if (o.page_table) {
    p.page_table = pointer(o.page_table);
    p.page_table_stride = o.page_table->stride[0];
    p.page_size = page_size, p.pages = pages;
  }
  p.prefix_lens = pointer(prefix.tensor), p.prefix_len = prefix.host;
  p.window_left = o.window_left.value_or(-1), p.window_right = o.window_right.value_or(-1);
  p.causal = o.causal || o.prefix_len;
  if (o.k_scale.tensor) p.k_scale_at = o.k_scale.tensor->ptr<float>();
  if (o.v_scale.tensor) p.v_scale_at = o.v_scale.tensor->ptr<float>();
  p.k_scale = o.k_scale.host, p.v_scale = o.v_scale.host;
  p.softmax_scale = o.softmax_scale.value_or(static_cast<float>(1.0 / std::sqrt(static_cast<double>(D.size))));
  p.softcap = o.softcap;

  if (checks_indices(stream, c.on_cpu())) {
    AttentionProblem host = p;
    std::vector<HostCopy> copies;
    const auto read = [&](const std::optional<Tensor>& t) {
      return t ? copies.emplace_back(stream, *t).ptr<int32_t>() : nullptr;
    };
    host.cu_seqlens_q = read(o.cu_seqlens_q), host.cu_seqlens_k = read(o.cu_seqlens_k);
    host.seqused_k = read(o.seqused_k), host.page_table = read(o.page_table);
    host.prefix_lens = read(prefix.tensor);
    if (host.cu_seqlens_q) check_offsets(c, "cu_seqlens_q", host.cu_seqlens_q, B, total_q);
    if (host.cu_seqlens_k) check_offsets(c, "cu_seqlens_k", host.cu_seqlens_k, B, total_k);
    if (prefix.tensor) c.indices(stream, "prefix_len", *prefix.tensor, 0, kInt32End, false);
    check_sequences(c, host, o.max_seqlen_q, o.max_seqlen_k);
  }
  last_kernel = c.on_cpu() ? "cpu" : kPlainKernel;
  if (out.empty()) return;
  if (c.on_cpu()) return cpu::attention(p);
  if constexpr (kHasCuda) {
    DeviceGuard guard(q.device);
    const DecodeHints hints{std::min(o.max_seqlen_k.value_or(p.k_len), p.k_len), o.num_splits, o.fresh_tokens,
                            o.batch_invariant, o.workspace ? o.workspace->data : nullptr};
    AttentionPlan plan;
    if (compute_capability() == 90) plan = attention_plan(p, hints, sm_count());
    if (plan.decode) {
      last_kernel = cuda::attention_decode(stream, p, hints, *plan.decode);
    } else if (plan.prefill) {
      last_kernel = kPrefillKernel;
      cuda::attention_prefill(stream, p, *plan.prefill);
    } else {
      cuda::attention(stream, p);
    }
  }
}

}  // namespace kestrel
