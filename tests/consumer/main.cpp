// Calls an op on the CPU and checks the numbers; then a call that breaks the contract.
#include <cmath>
#include <cstdio>
#include <cstring>

#include <kestrel/activation.h>

int main() {
  constexpr int kRows = 3, kWidth = 37;
  float x[kRows][2 * kWidth], out[kRows][kWidth];
  for (int r = 0; r < kRows; ++r)
    for (int i = 0; i < 2 * kWidth; ++i) x[r][i] = std::sin(static_cast<float>(r * 100 + i));

  const kestrel::Tensor in(x, kestrel::DType::kF32, {kRows, 2 * kWidth});
  kestrel::silu_and_mul({}, kestrel::Tensor(out, kestrel::DType::kF32, {kRows, kWidth}), in);

  for (int r = 0; r < kRows; ++r)
    for (int i = 0; i < kWidth; ++i) {
      const double a = x[r][i], b = x[r][kWidth + i], expected = a / (1 + std::exp(-a)) * b;
      if (!(std::fabs(out[r][i] - expected) <= 1e-6)) {
        std::printf("out[%d][%d] is %g, expected %g\n", r, i, out[r][i], expected);
        return 1;
      }
    }

  try {
    kestrel::silu_and_mul({}, kestrel::Tensor(out, kestrel::DType::kF32, {kRows, kWidth + 1}), in);
  } catch (const kestrel::Error& error) {
    std::puts(error.what());
    return error.kind == kestrel::ErrorKind::kValueError ? 0 : 1;
  }
  std::puts("a wrong shape was taken");
  return 1;
}
