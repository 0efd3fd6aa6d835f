"""One optimiser step and one evaluation batch, as pure functions to be jitted."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from kjax import loss as losses
from kjax import models


class State(NamedTuple):
    """All that changes while training; with the settings it determines every later step."""

    lora: dict  # the adapter, fp32 masters
    optimizer: optax.OptState
    step: jax.Array  # int32 scalar: optimiser steps done, which is also the position in the data


class Metrics(NamedTuple):
    """What a step reports, as scalars."""

    loss: jax.Array  # mean cross-entropy of the target tokens, before the update
    targets: jax.Array  # their number
    grad_norm: jax.Array  # global, before clipping
    finite: jax.Array  # False: loss or gradient was not, and the state is that of before the step


def initial_state(lora: dict, optimizer: optax.GradientTransformation) -> State:
    return State(lora, optimizer.init(lora), jnp.zeros((), jnp.int32))


def abstract_state(lora: dict, optimizer: optax.GradientTransformation) -> State:
    """The shapes of initial_state and where its arrays lie, to restore into; lora: shapes."""
    return placed(jax.eval_shape(lambda tree: initial_state(tree, optimizer), lora), jax.local_devices()[0])


def placed(shapes, device: jax.Device):
    """A tree of shapes whose arrays are to lie on a device."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)


def batch_loss(model, unembed: Callable, chunk: int, lora: dict, params: dict, batch: Mapping, *, dropout_key=None):
    """The summed cross-entropy of a batch of [B,T] int32 arrays tokens, targets, positions, segments; and the count.

    unembed: (models.head(params), hidden [n,D]) -> logits [n,V] fp32. Dropout is on where there is a key.
    """
    hidden = _hidden(model, lora, params, batch, dropout_key)
    return losses.cross_entropy(unembed, models.head(params), hidden, batch["targets"], chunk)


def _hidden(model, lora: dict, params: dict, batch: Mapping, dropout_key=None):
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    return model.apply({"params": params, "lora": lora}, batch["tokens"], batch["positions"], batch["segments"],
                       deterministic=dropout_key is None, rngs=rngs)


def gradients(model, unembed: Callable, *, chunk: int, seed: int, dropout: bool) -> Callable:
    """Returns f(lora, step, params, batch) -> (mean loss, target tokens, gradients to lora).

    The loss is normalised by the target tokens of the step. The dropout key is a function of seed and step alone, so a
    resumed run draws the same masks.
    """
    def run(lora: dict, step, params: dict, batch: Mapping):
        key = jax.random.fold_in(jax.random.key(seed), step) if dropout else None

        def mean_loss(lora):
            total, count = batch_loss(model, unembed, chunk, lora, params, batch, dropout_key=key)
            return total / jnp.maximum(count, 1.0), count

        (loss, count), grads = jax.value_and_grad(mean_loss, has_aux=True)(lora)
        return loss, count, grads

    return run


def updated(state: State, optimizer: optax.GradientTransformation, grads, loss, count, norm) -> tuple[State, Metrics]:
    """The state after an update, or as it was where loss or gradient is not finite."""
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    updates, optimizer_state = optimizer.update(grads, state.optimizer, state.lora)
    new = State(optax.apply_updates(state.lora, updates), optimizer_state, state.step + 1)
    new = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state)
    return new, Metrics(loss, count, norm, finite)


def train_step(model, unembed: Callable, optimizer: optax.GradientTransformation, *, chunk: int, seed: int,
               dropout: bool) -> Callable:
    """Returns step(state, params, batch) -> (state, Metrics): one update of the adapter; jit it and donate the state.

    The batch is a whole optimiser step: every MoE layer sees all of its tokens at once (the model runs attention in
    micro-batches).
    """
    differentiate = gradients(model, unembed, chunk=chunk, seed=seed, dropout=dropout)

    def step(state: State, params: dict, batch: Mapping):
        loss, count, grads = differentiate(state.lora, state.step, params, batch)
        return updated(state, optimizer, grads, loss, count, optax.tree.norm(grads))

    return step


def compiler_options() -> dict[str, str]:
    """For jax.jit of a step. The CPU backend's compiler orders operations for threads rather than for memory unless it
    is told; on steps with long rows that costs up to half as much memory again, and host calls bound the speed anyway.
    """
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"} if jax.default_backend() == "cpu" else {}


class Score(NamedTuple):
    """What evaluation batches add up to: over target tokens, the summed cross-entropy, their number, and how many of
    them are the most probable token."""

    loss: float
    targets: float
    right: float

    def __add__(self, other: "Score") -> "Score":
        return Score(*(a + float(b) for a, b in zip(self, other, strict=True)))

    @property
    def mean_loss(self) -> float:
        return self.loss / max(self.targets, 1.0)

    @property
    def accuracy(self) -> float:
        return self.right / max(self.targets, 1.0)


def eval_step(model, unembed: Callable, *, chunk: int) -> Callable:
    """Returns step(lora, params, batch) -> Score of scalars, without dropout or stash."""

    def step(lora: dict, params: dict, batch: Mapping):
        hidden = _hidden(model, lora, params, batch)
        return Score(*losses.scores(unembed, models.head(params), hidden, batch["targets"], chunk))

    return step
