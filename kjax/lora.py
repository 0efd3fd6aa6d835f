"""Low-rank adapters: what they are and are attached to, how large each is, how they start, what they cost in memory."""

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

# A fp32 master, its gradient and the two Adam moments: what one trainable number costs while training.
MASTER_BYTES, TRAINING_BYTES = 4, 16

GROUPS = {
    "attention": lambda path: "/self_attn/" in path,
    "shared": lambda path: "/mlp/shared_experts/" in path,
    "dense": lambda path: path.startswith("dense_layers/mlp/"),
    "experts": lambda path: "/mlp/experts/" in path,
}


class Size(NamedTuple):
    """What a stacked linear is: [layers, out, in], or [layers, experts, out, in] for a routed expert's."""

    layers: int
    width_in: int
    width_out: int
    experts: int | None = None

    @property
    def stack(self) -> tuple[int, ...]:
        """The leading axes of its arrays: (L,), or (L, E)."""
        return (self.layers,) if self.experts is None else (self.layers, self.experts)


Linears = Mapping[str, Size]  # path -> size of everything that could be adapted


@dataclass(frozen=True)
class Adapter:
    """The adapter of one linear layer: y = W x + scale * B (A dropout(x)), A [R, in], B [out, R]."""

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False

    @property
    def scale(self) -> float:
        """alpha / R; rank-stabilised (arXiv:2312.03732): alpha / sqrt(R)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True)
class LoraSpec:
    """The adapters of a model by path (`moe_layers/self_attn/q_b_proj`): hashable, so that modules can carry it."""

    entries: tuple[tuple[str, Adapter], ...]

    def get(self, path: str) -> Adapter | None:
        return dict(self.entries).get(path)

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(path for path, _ in self.entries)

    def with_dropout(self, rate: float) -> "LoraSpec":
        return LoraSpec(tuple((path, replace(adapter, dropout=rate)) for path, adapter in self.entries))


def group(path: str) -> str:
    """The group a linear path belongs to: attention, shared, dense or experts."""
    return next(name for name, belongs in GROUPS.items() if belongs(path))


def layer_offset(path: str, linears: Linears) -> int:
    """The Hugging Face number of a stack's first layer: the MoE layers come after the dense ones."""
    if path.startswith("dense_layers/"):
        return 0
    return next((size.layers for other, size in linears.items() if other.startswith("dense_layers/")), 0)


def module_names(path: str, linears: Linears) -> list[str]:
    """The Hugging Face module names of a stacked linear, one per layer: `model.layers.3.self_attn.q_b_proj`.

    Of a routed expert's linear one per layer and expert, in the order of the stack's [L, E]:
    `model.layers.3.mlp.experts.0.up_proj`.
    """
    size, names = linears[path], stack_names(path, linears)
    if size.experts is None:
        return names
    ends = (name.rsplit(".", 1) for name in names)
    return [f"{experts}.{e}.{projection}" for experts, projection in ends for e in range(size.experts)]


def stack_names(path: str, linears: Linears) -> list[str]:
    """One name per layer, without the number of an expert: `model.layers.3.mlp.experts.up_proj`."""
    first, tail = layer_offset(path, linears), path.split("/", 1)[1].replace("/", ".")
    return [f"model.layers.{first + i}.{tail}" for i in range(linears[path].layers)]


def abstract(spec: LoraSpec, linears: Linears) -> dict:
    """The shapes of the lora tree: path -> {"lora_A": [L, R, in], "lora_B": [L, out, R]}, all fp32.

    Those of the routed experts have a second axis: [L, E, R, in] and [L, E, out, R].
    """
    leaves = {}
    for path, adapter in spec.entries:
        size = linears[path]
        leaves[f"{path}/lora_A"] = jax.ShapeDtypeStruct((*size.stack, adapter.rank, size.width_in), jnp.float32)
        leaves[f"{path}/lora_B"] = jax.ShapeDtypeStruct((*size.stack, size.width_out, adapter.rank), jnp.float32)
    return unflatten_dict(leaves, sep="/")


def init(spec: LoraSpec, linears: Linears, key: jax.Array) -> dict:
    """A fresh lora tree: A uniform, B zero, so that training starts from the base model.

    Each A is drawn from its own key, made from its path: another target does not change the others.
    """
    leaves = flatten_dict(abstract(spec, linears), sep="/")
    for name, leaf in leaves.items():
        if name.endswith("/lora_B"):
            leaves[name] = jnp.zeros(leaf.shape, leaf.dtype)
        else:
            # Kaiming-uniform with a = sqrt(5): bound sqrt(6 / ((1 + a^2) in)) = 1 / sqrt(in).
            bound = leaf.shape[-1] ** -0.5
            own = jax.random.fold_in(key, zlib.crc32(name.encode()))
            leaves[name] = jax.random.uniform(own, leaf.shape, leaf.dtype, -bound, bound)
    return unflatten_dict(leaves, sep="/")


def count(tree) -> int:
    """The numbers in a tree of arrays (or of their shapes)."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def labels(tree) -> dict:
    """The same tree with each leaf's own name in its place: what optax.partition takes for LoRA+."""
    return unflatten_dict({name: name[-1] for name in flatten_dict(tree)})


class Row(NamedTuple):
    """One group of adapters; bytes are those of the fp32 masters."""

    group: str
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Table:
    """The trainable parameters per group, known before anything is allocated; print it, or iterate over its rows."""

    rows: tuple[Row, ...]  # one per group, then "total"
    ranks: tuple[str, ...]  # the ranks in each group, as text
    base_parameters: int | None

    def __iter__(self):
        return iter(self.rows)

    @property
    def training_bytes(self) -> int:
        """Masters, gradients and Adam moments."""
        return self.rows[-1].parameters * TRAINING_BYTES

    @property
    def summary(self) -> str:
        share = ""
        if self.base_parameters:
            share = f"{self.rows[-1].parameters / self.base_parameters:.4%} of the base's {self.base_parameters:,}; "
        return f"{share}with gradients and optimiser state {size(self.training_bytes)}"

    def _cells(self):
        head = ("group", "rank", "trainable", "size")
        return [head, *((row.group, rank, f"{row.parameters:,}", size(row.bytes))
                        for row, rank in zip(self.rows, self.ranks, strict=True))]

    def __str__(self) -> str:
        cells = self._cells()
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        lines = ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
                 for row in cells]
        return "\n".join([*lines, self.summary])

    def __rich__(self):
        from rich.table import Table as RichTable

        head, *body = self._cells()
        table = RichTable(title="Trainable parameters", caption=self.summary)
        for i, name in enumerate(head):
            table.add_column(name, justify="right" if i else "left")
        for i, row in enumerate(body):
            table.add_row(*row, end_section=i == len(body) - 2)
        return table


def size(count_bytes: float) -> str:
    """Bytes as text, in powers of ten: `52.4 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count_bytes < 1000:
            return f"{count_bytes:.0f} {unit}" if unit == "B" else f"{count_bytes:.1f} {unit}"
        count_bytes /= 1000
    return f"{count_bytes:.1f} TB"


def table(spec: LoraSpec, linears: Linears, base_parameters: int | None = None) -> Table:
    """What the adapters of a spec cost, per group; base_parameters adds their share of the model."""
    parameters: dict[str, int] = {}
    ranks: dict[str, set[int]] = {}
    order = list(GROUPS)
    for path, adapter in sorted(spec.entries, key=lambda entry: order.index(group(entry[0]))):
        linear, name = linears[path], group(path)
        numbers = math.prod(linear.stack) * adapter.rank * (linear.width_in + linear.width_out)
        parameters[name] = parameters.get(name, 0) + numbers
        ranks.setdefault(name, set()).add(adapter.rank)
    parameters["total"], ranks["total"] = sum(parameters.values()), set()
    return Table(tuple(Row(name, n, n * MASTER_BYTES) for name, n in parameters.items()),
                 tuple(", ".join(map(str, sorted(ranks[name]))) for name in parameters), base_parameters)
