"""The routed experts in plain jnp: what the host kernels must equal, and how small models train them on the device."""

import jax
import jax.numpy as jnp

from kjax.offload.lora import ExpertLora, keep_mask


def experts_ref(gate_w, up_w, down_w, x, idx, gate, lora: ExpertLora | None = None):
    """SwiGLU experts, y[n] = sum_k gate[n,k] * down(silu(gate_w x) * up_w x) of expert idx[n,k].

    Every expert sees every token, so the cost is E/K times that of the host call: for oracles and small models.

    Args:
      gate_w, up_w: [E,F,D] and down_w: [E,D,F], as in the checkpoint.
      x: [N,D].  idx: [N,K] int32, -1 for no expert.  gate: [N,K] fp32.
      lora: adapters; their products are in fp32. With dropout no token may be routed twice to one expert.

    Returns:
      y [N,D] in x.dtype; sums in fp32.
    """
    f32 = jnp.float32
    chosen = jax.nn.one_hot(idx, gate_w.shape[0], dtype=f32)  # [N,K,E]
    weight = jnp.einsum("nk,nke->ne", gate.astype(f32), chosen)
    every = jnp.broadcast_to(x[:, None], (x.shape[0], gate_w.shape[0], x.shape[1]))
    g = jnp.einsum("nd,efd->nef", x, gate_w, preferred_element_type=f32) + _adapter(lora, "gate_proj", every, chosen)
    u = jnp.einsum("nd,efd->nef", x, up_w, preferred_element_type=f32) + _adapter(lora, "up_proj", every, chosen)
    h = (jax.nn.silu(g) * u).astype(x.dtype)
    y = jnp.einsum("nef,edf->ned", h, down_w, preferred_element_type=f32) + _adapter(lora, "down_proj", h, chosen)
    return jnp.einsum("ned,ne->nd", y, weight).astype(x.dtype)


def _adapter(lora: ExpertLora | None, projection: str, x, chosen):
    """scale * B (A dropout(x)) of every expert: x [N,E,I] -> [N,E,O] fp32, or 0 where there is none."""
    if lora is None or projection not in lora.factors:
        return 0.0
    a, b = lora.factors[projection]
    x, scale = x.astype(jnp.float32), dict(lora.scales)[projection]
    if lora.seed is not None:
        routes = jnp.arange(chosen.shape[0] * chosen.shape[1]).reshape(chosen.shape[:2])
        keep = keep_mask(lora.seed, projection, routes, x.shape[-1], lora.dropout)
        x = x * jnp.einsum("nki,nke->nei", keep.astype(x.dtype), chosen) / (1 - lora.dropout)
    return scale * jnp.einsum("ner,eor->neo", jnp.einsum("nei,eri->ner", x, a), b)
