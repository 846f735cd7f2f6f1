// The gates by number, for the ops that apply one in their epilogue, and the arguments both devices work on.
#pragma once

#include <kestrel/tensor.h>

namespace kestrel {

enum class Gate { kGeluResidual, kSilu, kGelu, kGeluTanh };

// dispatch_gate(gate, [&]<Gate kGate>() { ... })
template <class Body>
void dispatch_gate(Gate gate, Body&& body) {
  switch (gate) {
    case Gate::kGeluResidual: return body.template operator()<Gate::kGeluResidual>();
    case Gate::kSilu: return body.template operator()<Gate::kSilu>();
    case Gate::kGelu: return body.template operator()<Gate::kGelu>();
    case Gate::kGeluTanh: return body.template operator()<Gate::kGeluTanh>();
  }
}

struct ActivationArgs {
  Gate gate;
  Tensor out, x;
  Rows out_rows, x_rows;
  int64_t width;  // N
};

}  // namespace kestrel
