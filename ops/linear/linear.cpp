#include "ops/linear/linear.h"

#include "kestrel/contract.h"
#include "kestrel/cpu/target.h"
#include "kestrel/cuda.h"
#include "ops/linear/linear_args.h"

KESTREL_CPU_TWIN(linear, void(const kestrel::LinearArgs& args));

namespace kestrel {
namespace {

struct NamedActivation {
  std::string_view name;
  LinearActivation value;
};
constexpr NamedActivation kActivations[] = {
    {"", LinearActivation::kNone},
    {"gelu", LinearActivation::kGelu},
    {"gelu_tanh", LinearActivation::kGeluTanh},
    {"silu", LinearActivation::kSilu},
    {"gelu_residual", LinearActivation::kGeluResidualGate},
    {"silu_and_mul", LinearActivation::kSiluGate},
    {"gelu_and_mul", LinearActivation::kGeluGate},
    {"gelu_tanh_and_mul", LinearActivation::kGeluTanhGate},
};

LinearActivation activation_named(Contract& c, std::string_view name) {
  for (const NamedActivation& a : kActivations)
    if (a.name == name) return a.value;
  c.require(false, "activation",
            "gelu, gelu_tanh, silu, gelu_residual, silu_and_mul, gelu_and_mul, gelu_tanh_and_mul or none",
            std::string(name));
  return LinearActivation::kNone;
}

struct ArgNames {
  const char *out = "out", *x = "x", *w = "w", *b = "b", *residual = "residual";
};

// The checks of out = activation(x w^T + b) + residual, whatever the op calls its arguments.
LinearArgs check(Contract& c, LinearActivation activation, Tensor out, Tensor x, Tensor w, std::optional<Tensor> b,
                 std::optional<Tensor> residual, ArgNames name = {}) {
  LinearArgs args{activation, out, x, w, b, residual, {}, {}, {}, 0, 0};
  c.in(name.x, x).dtype({DType::kBF16, DType::kF16, DType::kF32}).rank(1, kMaxRank).rows(&args.x_rows);
  args.depth = x.size(-1);
  Dim weight_rows("N");
  c.in(name.w, w).dtype_like(x).shape({weight_rows, args.depth}).last_contiguous();
  if (is_gate(activation))
    c.require(weight_rows % 2 == 0, name.w, "two halves high for a gate: an even number of rows", weight_rows);
  args.columns = is_gate(activation) ? weight_rows / 2 : weight_rows;
  if (b) c.in(name.b, *b).dtype_like(x).shape({weight_rows}).last_contiguous();
  Tensor expected = x;
  expected.shape[x.rank - 1] = args.columns;
  if (residual) c.in(name.residual, *residual).like(expected).rows(&args.residual_rows);
  c.out(name.out, out).like(expected).rows(&args.out_rows);
  return args;
}

// [M, H] seen with the leading dimensions of `like`, where those hold M rows.
Tensor unfold(const Tensor& matrix, const Tensor& like) {
  int64_t rows = 1;
  for (int i = 0; i + 1 < like.rank; ++i) rows *= like.shape[i];
  if (matrix.rank != 2 || like.rank == 2 || like.rank > kMaxRank || matrix.shape[0] != rows) return matrix;
  Tensor t = matrix;
  t.rank = like.rank;
  t.shape[t.rank - 1] = matrix.shape[1];
  t.stride[t.rank - 1] = matrix.stride[1];
  int64_t stride = matrix.stride[0];
  for (int i = t.rank - 2; i >= 0; --i) {
    t.shape[i] = like.shape[i];
    t.stride[i] = stride;
    stride *= like.shape[i];
  }
  return t;
}

void check_workspace(Contract& c, const std::optional<Tensor>& workspace) {
  if (!workspace || c.on_cpu()) return;
  c.workspace(*workspace, kLinearWorkspaceBytes, "linear_workspace_bytes() long", 256);
}

void run(Stream stream, const Contract& c, const LinearArgs& args, const std::optional<Tensor>& workspace) {
  if (args.out.empty()) return;
  if (c.on_cpu()) return cpu::linear(args);
  if constexpr (kHasCuda) {
    DeviceGuard guard(args.out.device);
    cuda::linear(stream, args, workspace);
  }
}

}  // namespace

int64_t linear_workspace_bytes() { return kLinearWorkspaceBytes; }

void linear(Stream stream, Tensor out, std::optional<Tensor> workspace, Tensor x, Tensor w, std::optional<Tensor> b,
            std::optional<Tensor> residual, std::string_view activation) {
  Contract c("linear");
  const LinearArgs args = check(c, activation_named(c, activation), out, x, w, b, residual);
  check_workspace(c, workspace);
  run(stream, c, args, workspace);
}

void fused_mlp(Stream stream, Tensor out, Tensor hidden, std::optional<Tensor> workspace, Tensor x, Tensor w1,
               Tensor b1, Tensor w2, Tensor b2, Tensor residual) {
  Contract c("fused_mlp");
  hidden = unfold(hidden, x);
  LinearArgs up = check(c, LinearActivation::kGeluTanh, hidden, x, w1, b1, {}, {.out = "hidden", .w = "w1", .b = "b1"});
  up.hidden = true;
  const LinearArgs down =
      check(c, LinearActivation::kNone, out, hidden, w2, b2, residual, {.x = "hidden", .w = "w2", .b = "b2"});
  check_workspace(c, workspace);
  run(stream, c, up, workspace);
  run(stream, c, down, workspace);
}

}  // namespace kestrel
