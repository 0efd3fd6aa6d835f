"""The mixture-of-experts block: router, shared experts, and routed experts on the host or on the device."""

import jax
from flax import linen as nn
from jax import numpy as jnp

from kjax.errors import ConfigError
from kjax.models.config import ModelConfig
from kjax.models.layers import INIT, MLP, Parts, swiglu
from kjax.models.router import Router, route
from kjax.offload.experts import host_experts
from kjax.offload.host_lora import HostLora
from kjax.offload.lora import PROJECTIONS, ExpertLora
from kjax.offload.reference import experts_ref


class Experts(Parts):
    """Declares the routed experts and gives (weights, adapters), each None where there are none.

    The weights are arrays on the device, gate_proj and up_proj [E,F,D], down_proj [E,D,F], for small models only;
    a store holds them otherwise.
    """

    on_device: bool
    host_lora: HostLora | None

    @nn.compact
    def __call__(self) -> tuple[list | None, ExpertLora | None]:
        weights = None
        if self.on_device:
            c = self.config
            wide = (c.n_routed_experts, c.moe_intermediate_size, c.hidden_size)
            shapes = {"gate_proj": wide, "up_proj": wide, "down_proj": (wide[0], wide[2], wide[1])}
            weights = [self.param(name, INIT, shape, self.dtype) for name, shape in shapes.items()]
        return weights, self._adapters()

    def _adapters(self) -> ExpertLora | None:
        found = {name: self.lora.get("/".join((*self.path, name))) for name in PROJECTIONS} if self.lora else {}
        found = {name: adapter for name, adapter in found.items() if adapter}
        if not found:
            return None
        factors, token = {}, None
        if self.host_lora is not None:
            token = jnp.zeros(()) if not self.has_variable("lora", "token") else self.get_variable("lora", "token")
        for name in found if self.host_lora is None else ():
            if not self.has_variable("lora", name):
                raise ConfigError(f"{'/'.join(self.path)}/{name} is to be adapted, but the lora tree holds nothing "
                                  "for it")
            held = self.get_variable("lora", name)
            factors[name] = held["lora_A"], held["lora_B"]
        rates = {adapter.dropout for adapter in found.values()}
        if len(rates) > 1:
            raise ConfigError(f"the adapters of {'/'.join(self.path)} must share one dropout, not {sorted(rates)}")
        rate, seed = rates.pop(), None
        if rate and not self.deterministic:
            seed = jax.random.bits(self.make_rng("dropout"), (2,), jnp.uint32)
        scales = tuple((name, adapter.scale) for name, adapter in found.items())
        return ExpertLora(factors, seed, token, scales, rate, self.host_lora)


class MoE(Parts):
    """Declares the block; the routed experts only where no store holds them."""

    device_experts: bool
    host_lora: HostLora | None

    @nn.compact
    def __call__(self) -> dict:
        c, parts = self.config, (self.config, self.lora, self.dtype, self.deterministic)
        w = {"gate": Router(c, name="gate")()}
        if c.n_shared_experts:
            w["shared_experts"] = MLP(*parts, c.moe_intermediate_size * c.n_shared_experts, name="shared_experts")()
        w["experts"] = Experts(*parts, self.device_experts, self.host_lora, name="experts")()
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
    weights, lora = w["experts"]
    if weights is None:
        routed = host_experts(store, layer, flat, idx, gate, lora)
    else:
        routed = experts_ref(*(weight.astype(x.dtype) for weight in weights), flat, idx, gate, lora)
    return residual + routed.reshape(x.shape)
