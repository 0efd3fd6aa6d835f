// Forward and backward of the SwiGLU experts of one layer over a store; knows neither instruction sets nor formats.
#pragma once
#include <cstdint>

#include "adapters.h"
#include "kernels.h"

namespace kjax {

struct Call {
  int64_t store;
  int64_t layer;
  int64_t tokens, width;  // x, y, dy, dx [tokens, width]
  int64_t per_token;      // idx, gate, dgate [tokens, per_token]; idx -1: no expert
  Dtype dtype;            // of x, y, dy, dx
  const void* x;
  const int32_t* idx;
  const float* gate;
  const Adapters* adapters = nullptr;  // of the layer's experts, or null
};

// y[t] = sum_k gate[t, k] * W_down (silu(W_gate x[t]) * (W_up x[t])), experts idx[t, k], adapters on each W.
// With keep, returns the slip under which gate and up activations wait for the backward call; otherwise 0.
int32_t experts_forward(const Call& call, bool keep, void* y);

// dx and dgate for dy; the gradients of the adapters are added to. A slip that finds nothing costs a recomputation from
// x, to the same bits.
void experts_backward(const Call& call, int32_t slip, const void* dy, void* dx, float* dgate,
                      const AdapterGradients& gradients = {});

// Gives back the memory that calls keep for the next one, unless one is running.
void release_workspace();

}  // namespace kjax
