"""The routed experts in plain jnp: what the host kernels must equal, and how small models train them on the device."""

import jax
import jax.numpy as jnp


def experts_ref(gate_w, up_w, down_w, x, idx, gate):
    """SwiGLU experts, y[n] = sum_k gate[n,k] * down(silu(gate_w x) * up_w x) of expert idx[n,k].

    Every expert sees every token, so the cost is E/K times that of the host call: for oracles and small models.

    Args:
      gate_w, up_w: [E,F,D] and down_w: [E,D,F], as in the checkpoint.
      x: [N,D].  idx: [N,K] int32, -1 for no expert.  gate: [N,K] fp32.

    Returns:
      y [N,D] in x.dtype; sums in fp32.
    """
    f32 = jnp.float32
    weight = jnp.einsum("nk,nke->ne", gate.astype(f32), jax.nn.one_hot(idx, gate_w.shape[0], dtype=f32))
    g = jnp.einsum("nd,efd->nef", x, gate_w, preferred_element_type=f32)
    u = jnp.einsum("nd,efd->nef", x, up_w, preferred_element_type=f32)
    h = (jax.nn.silu(g) * u).astype(x.dtype)
    y = jnp.einsum("nef,edf->ned", h, down_w, preferred_element_type=f32)
    return jnp.einsum("ned,ne->nd", y, weight).astype(x.dtype)
