"""The mixture-of-experts block: router, shared experts, and routed experts on the host or on the device."""

from flax import linen as nn
from jax import numpy as jnp

from kjax.models.config import ModelConfig
from kjax.models.layers import INIT, MLP, Parts, swiglu
from kjax.models.router import Router, route
from kjax.offload.experts import host_experts
from kjax.offload.reference import experts_ref


class Experts(Parts):
    """Declares the routed experts as arrays, gate_proj and up_proj [E,F,D], down_proj [E,D,F]: small models only."""

    @nn.compact
    def __call__(self) -> list:
        c = self.config
        wide = (c.n_routed_experts, c.moe_intermediate_size, c.hidden_size)
        shapes = {"gate_proj": wide, "up_proj": wide, "down_proj": (wide[0], wide[2], wide[1])}
        return [self.param(name, INIT, shape, self.dtype) for name, shape in shapes.items()]


class MoE(Parts):
    """Declares the block; the routed experts only where no store holds them."""

    device_experts: bool

    @nn.compact
    def __call__(self) -> dict:
        c, parts = self.config, (self.config, self.lora, self.dtype, self.deterministic)
        w = {"gate": Router(c, name="gate")()}
        if c.n_shared_experts:
            w["shared_experts"] = MLP(*parts, c.moe_intermediate_size * c.n_shared_experts, name="shared_experts")()
        if self.device_experts:
            w["experts"] = Experts(*parts, name="experts")()
        return w


def moe(w: dict, config: ModelConfig, store, layer, x, residual, segments, rows):
    """residual + shared(x) + routed(x), all [B,T,D]; padding (segments [B,T] 0) goes to no expert.

    The routed experts are added last and nothing follows: a rematerialised layer then needs neither their output nor
    a second host call (kjax.offload.experts). Shared experts have no gate and are not scaled.
    """
    flat = x.reshape(-1, x.shape[-1])  # [N,D]
    idx, gate = route(w["gate"], config, flat)
    idx = jnp.where(segments.reshape(-1, 1) == 0, -1, idx)
    if "shared_experts" in w:
        residual = residual + swiglu(w["shared_experts"], x, rows)
    if "experts" in w:
        routed = experts_ref(*(weight.astype(x.dtype) for weight in w["experts"]), flat, idx, gate)
    else:
        routed = host_experts(store, layer, flat, idx, gate)
    return residual + routed.reshape(x.shape)
