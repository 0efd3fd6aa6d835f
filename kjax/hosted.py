"""Training with the routed experts' adapters on the host: the device's step, then theirs, under one clipped norm.

The kernels sum the gradients of these adapters on the host. The device's step learns their norm from the gradients of
one number per layer, clips its own adapters by the norm over both, and hands that norm on to the host's update, which
is the same Optax chain compiled for the CPU.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from kjax import optimizer as optimizers
from kjax import step
from kjax.offload.host_lora import EXPERTS, HostLora, Tree, cpu, merge, split


class HostedState(NamedTuple):
    """All that changes while training, as step.State, in two parts."""

    device: step.State
    host: Tree  # fp32 masters of the routed experts, on the CPU device
    host_optimizer: optax.OptState

    @property
    def lora(self) -> dict:
        """The whole adapter."""
        return merge(self.device.lora, self.host)

    @property
    def step(self) -> jax.Array:
        return self.device.step


def initial_state(tree: dict, optimizer: optax.GradientTransformation) -> HostedState:
    """tree: the whole adapter, wherever its arrays are; optimizer: without clipping."""
    device, host = split(tree)
    host = jax.device_put(host, cpu())
    with jax.default_device(cpu()):
        host_optimizer = jax.device_put(optimizer.init(host), cpu())
    return HostedState(step.initial_state(jax.device_put(device, jax.local_devices()[0]), optimizer), host,
                       host_optimizer)


def abstract_state(tree: dict, optimizer: optax.GradientTransformation) -> HostedState:
    """The shapes of initial_state and where its arrays lie, to restore into; tree: shapes of the whole adapter."""
    device, host = split(tree)
    return HostedState(step.abstract_state(device, optimizer), step.placed(host, cpu()),
                       step.placed(jax.eval_shape(optimizer.init, host), cpu()))


def device_step(gradients: Callable, optimizer: optax.GradientTransformation, clip_norm: float | None,
                layers: int) -> Callable:
    """step(state, params, batch) -> (state, Metrics) of the device's part; Metrics.grad_norm is over both parts.

    gradients: step.gradients.  optimizer: without clipping.  layers: with routed experts.
    """
    def run(state: step.State, params: dict, batch):
        tree = unflatten_dict(flatten_dict(state.lora) | {(*EXPERTS, "token"): jnp.zeros(layers)})
        loss, count, grads = gradients(tree, state.step, params, batch)
        leaves = flatten_dict(grads)
        squares = leaves.pop((*EXPERTS, "token"))  # each layer's sum, of the gradients that stay on the host
        grads = unflatten_dict(leaves)
        norm = jnp.sqrt(sum((jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)), jnp.sum(squares)))
        grads = optimizers.clip(grads, norm, clip_norm)
        return step.updated(state, optimizer, grads, loss, count, norm)

    return run


def host_update(optimizer: optax.GradientTransformation, clip_norm: float | None) -> Callable:
    """update(host, host_optimizer, gradients, {"norm", "finite"}) -> (host, host_optimizer), for the CPU."""
    def run(host: Tree, state: optax.OptState, grads: Tree, told: dict):
        updates, new_state = optimizer.update(optimizers.clip(grads, told["norm"], clip_norm), state, host)
        new = optax.apply_updates(host, updates), new_state
        return jax.tree.map(lambda after, before: jnp.where(told["finite"], after, before), new, (host, state))

    return run


class TrainStep:
    """Both parts of a step, with the interface of a compiled function."""

    def __init__(self, host: HostLora, device, update):
        """device, update: device_step and host_update, compiled, the latter with its first two arguments donated."""
        self._host, self._device, self._update = host, device, update

    def prepare(self, state: HostedState, params: dict, batch) -> None:
        self._device.prepare(state.device, params, batch)

    def __call__(self, state: HostedState, params: dict, batch) -> tuple[HostedState, step.Metrics]:
        with self._host.bound(state.host, gradients=True):
            device, metrics = self._device(state.device, params, batch)
        told = jax.device_put({"norm": metrics.grad_norm, "finite": metrics.finite}, cpu())
        grads = jax.device_put(self._host.gradients, cpu(), may_alias=True)
        arguments = state.host, state.host_optimizer, grads, told
        self._update.prepare(*arguments)
        return HostedState(device, *self._update(*arguments)), metrics


class EvalStep:
    """An evaluation over a whole adapter, with the interface of a compiled function."""

    def __init__(self, host: HostLora, device):
        self._host, self._device = host, device

    def prepare(self, tree: dict, params: dict, batch) -> None:
        self._device.prepare(split(tree)[0], params, batch)

    def __call__(self, tree: dict, params: dict, batch):
        device, host = split(tree)
        with self._host.bound(host):
            return self._device(device, params, batch)
