"""Routed experts in host memory: the store, the differentiable call, and the plain jnp oracle."""

from kjax.offload.experts import host_experts
from kjax.offload.reference import experts_ref
from kjax.offload.store import ExpertStore

__all__ = ["ExpertStore", "experts_ref", "host_experts"]
