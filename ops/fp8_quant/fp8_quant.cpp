#include "ops/fp8_quant/fp8_quant.h"

#include "kestrel/contract.h"
#include "kestrel/cpu/target.h"
#include "kestrel/cuda.h"
#include "ops/fp8_quant/args.h"

KESTREL_CPU_TWIN(fp8_quant, void(const kestrel::Fp8QuantArgs& args));

namespace kestrel {
namespace cuda {
void fp8_quant(Stream stream, const Fp8QuantArgs& args);
}

namespace {

void check(Contract& c, const Tensor& out_bits, const Tensor& x) {
  Dim M("M"), N("N");
  c.in("x", x).dtype({DType::kBF16, DType::kF16}).shape({M, N}).last_contiguous();
  c.out("out_bits", out_bits).dtype({DType::kE4M3, DType::kU8}).shape({M, N}).last_contiguous();
}

void run(const Contract& c, Stream stream, const Fp8QuantArgs& args) {
  if (c.on_cpu()) return cpu::fp8_quant(args);
  if constexpr (kHasCuda) {
    DeviceGuard guard(args.x.device);
    cuda::fp8_quant(stream, args);
  }
}

}  // namespace

void fp8_quant_row(Stream stream, Tensor out_bits, Tensor out_scale, Tensor x) {
  Contract c("fp8_quant_row");
  check(c, out_bits, x);
  c.out("out_scale", out_scale).dtype({DType::kF32}).shape({x.shape[0]}).last_contiguous();
  run(c, stream, {Fp8Scale::kRow, out_bits, x, out_scale, {}});
}

void fp8_quant_tensor(Stream stream, Tensor out_bits, Tensor out_scale, Tensor x) {
  Contract c("fp8_quant_tensor");
  check(c, out_bits, x);
  c.out("out_scale", out_scale).dtype({DType::kF32});
  c.require(out_scale.numel() == 1, "out_scale", "of one element", out_scale.numel());
  run(c, stream, {Fp8Scale::kTensor, out_bits, x, out_scale, {}});
}

void fp8_quant_static(Stream stream, Tensor out_bits, Value<float> scale, Tensor x) {
  Contract c("fp8_quant_static");
  check(c, out_bits, x);
  if (scale.tensor) {
    c.in("scale", *scale.tensor).dtype({DType::kF32});
    c.require(scale.tensor->numel() == 1, "scale", "of one element", scale.tensor->numel());
  } else {
    c.require(scale.host > 0, "scale", "above zero", scale.host);
  }
  run(c, stream, {Fp8Scale::kGiven, out_bits, x, {}, scale});
}

}  // namespace kestrel
