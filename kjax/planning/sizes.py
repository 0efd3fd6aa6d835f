"""Bytes and operations of a run that follow from the shapes of its model: main memory, disk, the experts' work."""

import math

import jax.numpy as jnp

from kjax.config import Config
from kjax.lora import MASTER_BYTES, TRAINING_BYTES, size
from kjax.models import ModelConfig
from kjax.offload.stash import budget
from kjax.offload.storage import FREE_SHARE
from kjax.planning.formats import Format
from kjax.planning.machine import Machine
from kjax.planning.report import Row, total
from kjax.weights import lowbit

PROGRAM = 2**30  # of the host: Python, JAX, compiled code; 0.6 to 0.9 GB were seen
STASH_SHARE = 0.9  # of what is free beside everything else: the most that is proposed for Model.stash_gb
PARTS = (("routed experts", "/mlp/experts/"), ("shared experts", "/mlp/shared_experts/"), ("router", "/mlp/gate/"),
         ("attention", "/self_attn/"), ("dense layers", "dense_layers/mlp/"), ("embedding", "embed_tokens/"),
         ("output head", "lm_head/"), ("norms", "norm"))


def parameters(shapes: dict) -> tuple[Row, ...]:
    """Numbers per part of the model, in total, and outside the routed experts."""
    counts: dict[str, int] = {}
    for name, leaf in shapes.items():
        part = next((part for part, mark in PARTS if mark in f"{name}/"), "norms")
        counts[part] = counts.get(part, 0) + math.prod(leaf.shape)
    rows = [Row(part, counts[part]) for part, _ in PARTS if part in counts]
    return (*rows, Row("total", sum(counts.values())), Row("outside the routed experts",
            sum(counts.values()) - counts.get("routed experts", 0)))


class Sizes:
    """The routed experts of one run and what surrounds them.

    shapes: path -> leaf of the params tree with the experts on the device.  trained: numbers per group.
    hosts_adapters: whether those of the routed experts live on the host.
    """

    def __init__(self, config: Config, model: ModelConfig, shapes: dict, experts: Format, others: Format,
                 trained: dict[str, int], hosts_adapters: bool):
        self.config, self.model, self.format, self.trained = config, model, experts, trained
        self.host_adapters = trained.get("experts", 0) if hosts_adapters else 0  # numbers
        self.hosted = config.model.experts == "host" and model.num_moe_layers > 0
        self.tokens = config.train.rows_per_step * config.data.max_length
        self.itemsize = jnp.dtype(config.model.dtype).itemsize
        self.routes = self.tokens * model.num_experts_per_tok
        routed = {name: leaf for name, leaf in shapes.items() if "/mlp/experts/" in name}
        self.experts = sum(math.prod(leaf.shape[:2]) * experts.bytes(*leaf.shape[2:]) for leaf in routed.values())
        self.expert_parameters = sum(math.prod(leaf.shape) for leaf in routed.values())
        self.others = 0
        for name, leaf in shapes.items():
            if name not in routed and "_proj" in name.split("/")[-2] and len(leaf.shape) == 3:
                self.others += leaf.shape[0] * others.bytes(*leaf.shape[1:])
            elif name not in routed:
                kind = 4 if name.endswith("e_score_correction_bias") else 2 if others.bits <= 16 else 4
                self.others += math.prod(leaf.shape) * kind
        # Kept from forward to backward: gate and up activations of every route, in the type of the computation, and
        # the products with the adapters' A in fp32.
        kept = 2 * model.moe_intermediate_size * (4 if experts.bits == 32 else 2) + 4 * self._ranks
        self.stash_need = kept * self.routes * model.num_moe_layers * self.hosted

    @property
    def expert_adapters(self) -> int:
        """Numbers of the adapters on routed experts."""
        return self.trained.get("experts", 0)

    @property
    def _ranks(self) -> int:
        """The ranks of an expert's adapters, summed over its projections."""
        model = self.model
        widths = model.num_moe_layers * model.n_routed_experts * (model.hidden_size + model.moe_intermediate_size)
        return self.expert_adapters // widths if self.expert_adapters else 0

    @property
    def _table(self) -> int:
        """Bytes of the embedding table where it stays in main memory."""
        table = self.model.vocab_size * self.model.hidden_size * self.itemsize
        return table * lowbit.hosts_table(self.model, self.config.model.weights)

    def resident(self, on: Machine) -> bool:
        """Whether the experts are copied to memory of the process; "auto" does in a long run (docs/storage.md)."""
        mode = self.config.model.storage
        return mode == "resident" or (mode == "auto" and self.experts <= FREE_SHARE * on.host)

    @property
    def call(self) -> int:
        """x, y, dy and dx of one layer, and the fp32 sums of one of them."""
        return self.tokens * self.model.hidden_size * (4 * self.itemsize + 4) * self.hosted

    def stash(self, on: Machine, weights: float) -> int:
        """Bytes that a run's stash takes: its budget is set once the weights are loaded, and mapped ones stay free.

        weights: bytes of what is not the experts, if the CPU runs it.
        """
        loaded = PROGRAM + weights + self._table + self.experts * self.resident(on)
        if self.config.model.adapter is not None:
            loaded += MASTER_BYTES * self.host_adapters
        return min(self.stash_need, budget(self.config.model.stash_gb, max(0, on.host - loaded)))

    def proposed(self, left: float) -> int:
        """GB for Model.stash_gb where `left` bytes are free beside everything else: what is wanted, or most of them."""
        return max(0, min(math.ceil(self.stash_need / 1e9), math.floor(left * STASH_SHARE / 1e9)))

    def host(self, on: Machine, stash: int, device_part: float) -> tuple[list[Row], list[Row]]:
        """(memory of the process, page cache). device_part: bytes of what is not the experts, if the CPU runs it."""
        rows, cache = [], []
        if self.hosted:
            if self.resident(on):
                rows.append(Row("routed experts", self.experts, f"{self.format.name}, copied to huge pages"))
            else:
                cache.append(Row("routed experts", self.experts, f"{self.format.name}, as they lie in the files"))
            rows.append(Row("expert activations", self.call, "of the layer at work"))
            if self.host_adapters:
                rows.append(Row("expert adapters", TRAINING_BYTES * self.host_adapters,
                                "masters, gradients and two Adam moments, fp32"))
        rows.append(Row("program", PROGRAM, "Python, JAX and compiled code"))
        if on.device is None:
            rows.append(Row("device part", device_part, "JAX runs on the CPU"))
        if self._table:
            rows.append(Row("embedding table", self._table, "gathered for each batch"))
        if self.hosted:
            note, more = "gate and up activations from forward to backward", ""
            if stash < self.stash_need:
                note = f"of {size(self.stash_need)} wanted: {1 - stash / self.stash_need:.0%} of routes computed twice"
                gigabytes = self.proposed(on.host - total(rows) - total(cache))
                more = f"; memory is left: set Model.stash_gb = {gigabytes}" if gigabytes * 1e9 > stash else ""
            rows.append(Row("stash", stash, note + more))
        return rows, cache

    def disk(self, saves: int) -> list[Row]:
        """Of a new run that saves so many states, when most of it is there (RunDirectory.require_space)."""
        keep, adapter = self.config.train.keep, sum(self.trained.values()) * MASTER_BYTES
        states = min(saves, keep + 1)
        note = f"{states - 1} kept, another being written" if states > 1 else "one"
        rows = [Row("checkpoint of the base", self.experts + self.others,
                    f"experts {self.format.name}; without MTP layers"),
                Row("adapter", adapter, "PEFT, fp32"),
                Row("saved states", states * 4 * adapter, f"{note}: masters, two moments, an adapter")]
        if 1 < saves <= keep:
            rows.append(Row("adapter of the run", adapter, "while the next is written beside it"))
        return rows

    # Work.

    @property
    def route_operations(self) -> float:
        """Of one direction, all routes and layers: 6 D F for a route."""
        return 6.0 * self.model.hidden_size * self.model.moe_intermediate_size * self.routes * self.model.num_moe_layers

    @property
    def share_met(self) -> float:
        """Of the experts that a step's tokens meet, were the routing uniform."""
        return 1 - (1 - self.model.num_experts_per_tok / self.model.n_routed_experts) ** self.tokens

    def missed(self, stash: float) -> float:
        """The share of routes whose activations are computed again."""
        return 1 - stash / self.stash_need if self.stash_need else 0.0

    def adapter_operations(self) -> float:
        """Of the adapters on routed experts, forward, backward and their gradients, all routes and layers: 2 R
        numbers of A and of B for each of three products."""
        experts = self.model.n_routed_experts * self.model.num_moe_layers
        return 3 * 2.0 * self.expert_adapters / experts * self.routes * self.model.num_moe_layers

    def work(self, operations: float, stash: float) -> list[Row]:
        rows = [Row("tokens", self.tokens, "places of a full step; packing fills almost all of them"),
                Row("device operations", operations, "matrix products, forward, recompute and backward")]
        if self.hosted:
            again = self.missed(stash) * self.route_operations * 2 / 3
            rows += [Row("host operations", 2 * self.route_operations, "the experts, forward and backward to x"),
                     Row("tokens per expert", self.routes / self.model.n_routed_experts, "on average"),
                     Row("expert bytes read", 2.0 * self.share_met * self.experts, "once forward, once backward")]
            if again:
                rows.append(Row("host operations again", again, "gate and up, where the stash is full"))
            if self.expert_adapters:
                rows.append(Row("expert adapter operations", self.adapter_operations()))
            if self.config.model.experts == "host":
                rows.append(Row("bytes to and from the host", 5.0 * self.tokens * self.model.hidden_size * self.itemsize
                                * self.model.num_moe_layers, "x, y; x, dy, dx: over PCIe where there is a device"))
        return rows
