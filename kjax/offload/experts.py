"""`host_experts`: the routed experts as one differentiable black box whose arithmetic happens on the host.

Under `nn.remat(policy=save_only_these_names(SAVED))` with the expert output added last, the backward pass of a layer
needs idx and the slip but neither the output nor the call, so the host forward runs once per layer and execution.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kjax.offload import bridge
from kjax.offload.lora import PROJECTIONS, ExpertLora
from kjax.offload.store import ExpertStore

SAVED = "experts"  # checkpoint_name of what a rematerialised layer must keep: idx and the slip


def host_experts(store: ExpertStore, layer, x, idx, gate, lora: ExpertLora | None = None):
    """SwiGLU experts on the host: y[n] = sum_k gate[n,k] * expert[idx[n,k]](x[n]).

    Differentiable in x, gate and adapters, once and in reverse. The primal call keeps nothing; under differentiation
    the host keeps the gate and up activations until the backward call fetches them by the slip. vmap is refused:
    flatten [B,T,D] to [N,D] instead.

    Args:
      store: static; holds the weights.  layer: int32 scalar, may be traced (it is under scan).
      x: [N,D] bfloat16 or float32.  idx: [N,K] int32, -1 for no expert (costs nothing).  gate: [N,K] fp32.
      lora: adapters of the layer's experts; their products are in fp32, and dropout draws a mask per route.

    Returns:
      y [N,D] in x.dtype, summed in fp32.
    """
    if x.ndim != 2 or x.shape[1] != store.width:
        raise ValueError(f"x {x.shape}: expected [N,{store.width}], as the store's experts are")
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise TypeError(f"x {x.dtype}: expected bfloat16 or float32")
    if idx.shape != gate.shape or idx.ndim != 2 or idx.shape[0] != x.shape[0]:
        raise ValueError(f"idx {idx.shape} and gate {gate.shape}: expected both [{x.shape[0]},K]")
    return _experts(store, jnp.asarray(layer, jnp.int32), x, idx.astype(jnp.int32), gate.astype(jnp.float32), lora)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _experts(store, layer, x, idx, gate, lora):
    return bridge.forward(store, False, layer, x, idx, gate, lora)[0]


def _forward(store, layer, x, idx, gate, lora):
    idx = checkpoint_name(idx, SAVED)
    y, slip = bridge.forward(store, True, layer, x, idx, gate, lora)
    return y, (layer, checkpoint_name(slip, SAVED), x, idx, gate, lora)


def _backward(store, residuals, dy):
    layer, slip, x, idx, gate, lora = residuals
    dx, dgate, grads = bridge.backward(store, layer, slip, x, idx, gate, dy.astype(x.dtype), lora)
    if lora is None:
        return None, dx, None, dgate, None
    if lora.host is not None:
        return None, dx, None, dgate, lora.replace(seed=None, token=grads[0])
    pairs = zip([name for name in PROJECTIONS if name in lora.factors], grads[::2], grads[1::2], strict=True)
    return None, dx, None, dgate, lora.replace(factors={name: (a, b) for name, a, b in pairs}, seed=None)


_experts.defvjp(_forward, _backward)
