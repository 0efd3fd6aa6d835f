"""Adapters of the routed experts that stay on the host: read in place by the kernels, which sum the gradients there.

They are large (rank 8 on DeepSeek-V3: 3.28 G numbers) and only the host uses them, so they need not visit the device.
"""

import contextlib
import weakref
from collections.abc import Mapping

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from kjax import _ext
from kjax.errors import ConfigError
from kjax.offload.lora import PROJECTIONS
from kjax.offload.store import ExpertStore


def on_host(home: str, lora_experts: bool, stored: bool, accelerator: bool | None = None) -> bool:
    """Whether the routed experts' adapters stay on the host, by Lora.experts_home.

    lora_experts: there are any.  stored: a store holds the experts. "auto": where an accelerator runs the model.
    accelerator: whether one does; None: as in this process.
    """
    if accelerator is None:
        accelerator = jax.default_backend() != "cpu"
    if home == "host" and lora_experts and not stored:
        raise ConfigError("Lora.experts_home = 'host' needs Model.experts = 'host': experts on the device have their "
                          "adapters there")
    return lora_experts and stored and (home == "host" or home == "auto" and accelerator)


EXPERTS = ("moe_layers", "mlp", "experts")  # where these adapters lie in the lora tree
Tree = Mapping[str, Mapping[str, jax.Array]]  # projection -> {"lora_A": [L,E,R,in], "lora_B": [L,E,out,R]}, fp32


def cpu() -> jax.Device:
    return jax.local_devices(backend="cpu")[0]


def split(tree: dict) -> tuple[dict, Tree]:
    """A lora tree's part for the device, and that of the routed experts by projection."""
    leaves = flatten_dict(tree)
    device = {path: leaf for path, leaf in leaves.items() if path[:3] != EXPERTS}
    host = {path[3:]: leaf for path, leaf in leaves.items() if path[:3] == EXPERTS}
    return unflatten_dict(device), unflatten_dict(host)


def merge(device: dict, host: Tree) -> dict:
    """The inverse of split."""
    return unflatten_dict(flatten_dict(device) | {(*EXPERTS, *path): leaf for path, leaf in flatten_dict(host).items()})


class HostLora:
    """The handle through which compiled functions find the factors of all layers; hashable by identity.

    A function that uses it runs while a tree is bound:

        with host.bound(tree, gradients=True):
            step(...)
        update(tree, host.gradients)

    Attributes:
      id: its number in the kernels.
      gradients: the tree's, as numpy arrays that outlive the calls; None before the first binding that asks for them.
    """

    def __init__(self, store: ExpertStore):
        self._ext = _ext.HostAdapters(store.layers, store.experts, store.width, store.hidden)
        self.id = self._ext.id
        self.gradients: dict[str, dict[str, np.ndarray]] | None = None
        self._finalizer = weakref.finalize(self, self._ext.close)

    @contextlib.contextmanager
    def bound(self, tree: Tree, *, gradients: bool = False):
        """While it lasts calls read these arrays, which must be on the CPU; with `gradients` they add to cleared ones.

        Leaving it lets go of the arrays, so that they can be donated: wait for the calls' results before.
        """
        self.bind(tree, gradients=gradients)
        try:
            yield self
        finally:
            self.release()

    def bind(self, tree: Tree, *, gradients: bool = False) -> None:
        """As `bound`, until `release`."""
        if gradients:
            self._clear(tree)
        rows = []
        for name in PROJECTIONS:
            if name not in tree:
                rows.append(None)
                continue
            factors = [_on_host(tree[name][matrix]) for matrix in ("lora_A", "lora_B")]
            made = [self.gradients[name][matrix] if gradients else None for matrix in ("lora_A", "lora_B")]
            rows.append((*factors, *made))
        self._ext.bind(rows)

    def release(self) -> None:
        self._ext.release()

    def _clear(self, tree: Tree) -> None:
        shapes = {name: {matrix: array.shape for matrix, array in tree[name].items()} for name in tree}
        if self.gradients is not None and shapes == jax.tree.map(np.shape, self.gradients):
            for array in jax.tree.leaves(self.gradients):
                array.fill(0)
        else:
            self.gradients = {name: {matrix: _aligned_zeros(shape) for matrix, shape in pair.items()}
                              for name, pair in shapes.items()}

    def __repr__(self):
        return f"HostLora({self.id})"


def _on_host(array) -> np.ndarray:
    """The array's own memory; one on another device would be copied behind the caller's back."""
    if isinstance(array, jax.Array) and {device.platform for device in array.devices()} != {"cpu"}:
        raise ValueError(f"adapters on {array.devices()}: put them on a CPU device")
    return np.from_dlpack(array) if isinstance(array, jax.Array) else np.asarray(array)  # a view that JAX keeps none of


def _aligned_zeros(shape) -> np.ndarray:
    """Zeros at a multiple of 64 bytes, which JAX's CPU device takes without a copy."""
    size = int(np.prod(shape)) * 4
    raw = np.zeros(size + 64, np.uint8)
    begin = -raw.ctypes.data % 64
    return raw[begin : begin + size].view(np.float32).reshape(shape)
