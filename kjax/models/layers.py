"""The smallest parts: a projection with its adapter, RMSNorm, SwiGLU.

Modules only declare: calling one gives its arrays. The arithmetic is in functions that know no Flax, so that they can
be mapped, checkpointed and differentiated by plain JAX.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from kjax.errors import ConfigError
from kjax.lora import LoraSpec
from kjax.models.config import ModelConfig
from kjax.weights import lowbit

INIT = nn.initializers.normal(0.02)  # of random models only: Hugging Face's initializer_range


@struct.dataclass
class Projection:
    """One linear layer, y = W x (+ b) (+ scale * B A dropout(x)): weight [O,I], lora_A [R,I], lora_B [O,R]."""

    weight: jax.Array
    bias: jax.Array | None = None
    lora_A: jax.Array | None = None
    lora_B: jax.Array | None = None
    key: jax.Array | None = None  # of the dropout; None: deterministic
    scale: float = struct.field(pytree_node=False, default=1.0)
    dropout: float = struct.field(pytree_node=False, default=0.0)


class Parts(nn.Module):
    """A module that declares parameters; the fields are what every part needs to know."""

    config: ModelConfig
    lora: LoraSpec | None
    dtype: Any
    deterministic: bool


class Linear(nn.Module):
    """Declares a projection [features_out, features_in]; its own path says whether it carries an adapter.

    Where the parameters hold the weight in few bits (kjax.weights.lowbit) it is dequantised here, once for the layer,
    outside the micro-batches, and again in the backward pass: a rematerialised layer saves none of it.
    """

    features_in: int
    features_out: int
    lora: LoraSpec | None
    dtype: Any
    deterministic: bool
    bias: bool = False

    @nn.compact
    def __call__(self) -> Projection:
        form = lowbit.find(self.variables.get("params", {}))
        if form is None:
            weight = self.param("weight", INIT, (self.features_out, self.features_in), self.dtype)
        else:
            weight = lowbit.dequantise(form, self.get_variable("params", form), self.features_in, self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features_out,), self.dtype) if self.bias else None
        path = "/".join(self.path)
        adapter = self.lora.get(path) if self.lora else None
        if adapter is None:
            return Projection(weight, bias)
        if not self.has_variable("lora", "lora_A"):
            raise ConfigError(f"{path} is to be adapted, but the lora tree holds nothing for it")
        key = self.make_rng("dropout") if adapter.dropout and not self.deterministic else None
        return Projection(weight, bias, self.get_variable("lora", "lora_A"), self.get_variable("lora", "lora_B"),
                          key, adapter.scale, adapter.dropout)


def linear(p: Projection, x, rows):
    """x [B,T,I] -> [B,T,O] in x.dtype; rows [B] are the row numbers that choose the dropout masks."""
    y = jnp.einsum("bti,oi->bto", x, p.weight.astype(x.dtype))
    if p.bias is not None:
        y = y + p.bias.astype(x.dtype)
    if p.lora_A is None:
        return y
    if p.key is not None:
        x = dropout(x, p.dropout, p.key, rows)
    low = jnp.einsum("bti,ri->btr", x, p.lora_A.astype(x.dtype)) * p.scale
    return y + jnp.einsum("btr,or->bto", low, p.lora_B.astype(x.dtype))


def merged(p: Projection, dtype):
    """W + scale * B A, [O,I]: the weight that acts when nothing is dropped."""
    if p.lora_A is None:
        return p.weight.astype(dtype)
    return (p.weight + p.scale * jnp.einsum("or,ri->oi", p.lora_B, p.lora_A)).astype(dtype)


def dropout(x, rate: float, key, rows):
    """Zeroes elements of x [B,T,I] and scales the rest. A mask belongs to its row, however rows are grouped."""
    def mask(row):
        return jax.random.bernoulli(jax.random.fold_in(key, row), 1 - rate, x.shape[1:])
    return jnp.where(jax.vmap(mask)(rows), x / (1 - rate), 0)


class Norm(nn.Module):
    """Declares the weight [D] of an RMSNorm."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self):
        return self.param("weight", nn.initializers.ones, (self.width,), self.dtype)


def rms_norm(x, weight, eps: float):
    """x / rms(x), rounded to x.dtype before the weight multiplies it: the order of Hugging Face's models."""
    f = x.astype(jnp.float32)
    f = f * jax.lax.rsqrt(jnp.mean(f * f, axis=-1, keepdims=True) + eps)
    return weight.astype(x.dtype) * f.astype(x.dtype)


class MLP(Parts):
    """Declares the three projections of a SwiGLU of the given width."""

    width: int

    @nn.compact
    def __call__(self) -> dict[str, Projection]:
        d, f = self.config.hidden_size, self.width
        sizes = {"gate_proj": (d, f), "up_proj": (d, f), "down_proj": (f, d)}
        return {name: Linear(*size, self.lora, self.dtype, self.deterministic, name=name)()
                for name, size in sizes.items()}


def swiglu(w: dict[str, Projection], x, rows):
    """x [B,T,D] -> down(silu(gate(x)) * up(x)) [B,T,D]."""
    h = jax.nn.silu(linear(w["gate_proj"], x, rows)) * linear(w["up_proj"], x, rows)
    return linear(w["down_proj"], h, rows)
