"""The adapters of one layer's routed experts, and the dropout masks that host and device draw alike."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@struct.dataclass
class ExpertLora:
    """W x + scale * B (A dropout(x)) in place of W x, for some or all projections of every expert.

    Attributes:
      factors: projection -> (lora_A [E,R,in], lora_B [E,out,R]), fp32; one without an adapter is absent.
      seed: uint32 [2] that the dropout masks are made from; None: nothing is dropped.
      token: fp32 scalar through which JAX sees that factors on the host have gradients; its own is by how much a
        backward call makes the sum of their squares grow.
      scales: (projection, scale) of each adapted projection.  dropout: the share of elements dropped.
      host: holds the factors of all layers in place of `factors`, see kjax.offload.host_lora.
    """

    factors: dict[str, tuple[jax.Array, jax.Array]]
    seed: jax.Array | None = None
    token: jax.Array | None = None
    scales: tuple[tuple[str, float], ...] = struct.field(pytree_node=False, default=())
    dropout: float = struct.field(pytree_node=False, default=0.0)
    host: Any = struct.field(pytree_node=False, default=None)


def _mix(h):
    """MurmurHash3's finaliser: every bit of the result depends on every bit of h."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def threshold(rate: float) -> int:
    """Hashes below this are dropped."""
    return min(round(rate * 2**32), 2**32 - 1)


def keep_mask(seed, projection: str, routes, width: int, rate: float):
    """Which elements of each route's input stay: bool [*routes.shape, width].

    A function of the seed, the projection, the route and the element alone (ext/lowrank.h draws the same), so a
    recomputation drops what the first computation dropped. routes: int, n * K + k for place k of token n.
    """
    u32, number = jnp.uint32, PROJECTIONS.index(projection)
    route = routes.astype(u32)[..., None]
    first = _mix(seed[0] ^ (route * u32(0x9E3779B9) + u32(number)))
    second = _mix(seed[1] ^ (route * u32(0xC2B2AE3D) + u32(number + 3)))
    h = jnp.arange(width, dtype=u32) * u32(0x9E3779B9) + first
    h = (h ^ (h >> 16)) * u32(0x85EBCA6B)
    h = ((h ^ (h >> 13)) + second) * u32(0xC2B2AE35)
    return (h ^ (h >> 16)) >= u32(threshold(rate))
