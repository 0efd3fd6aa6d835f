"""Every tensor of a checkpoint accounted for: each weight found as it is stored, nothing missing and nothing left."""

from collections.abc import Container, Iterable, Mapping

import numpy as np

from kjax.errors import CheckpointError
from kjax.offload.formats import FORMATS, Quantised
from kjax.weights.files import quote
from kjax.weights.names import Place, experts, grouped, places, skipped
from kjax.weights.safetensors import Checkpoint
from kjax.weights.stored import WHOLE, Source

STORABLE = ("BF16", "F32")  # what the host kernels multiply without scales


def account(checkpoint: Checkpoint, config, abstract: Mapping) -> list[tuple[Source, Place]]:
    """Every weight of the tree as it is stored, and its place.

    Compares the checkpoint with the tree, and with the routed experts where they stay on the host, and raises
    CheckpointError with everything that is missing, extra, misshapen or of a dtype that cannot be read. Which weights
    are quantised is told by the tensors themselves, how by config.quantization.
    """
    wanted = places(abstract, config.family.prefix)
    hosted = {}
    if config.num_moe_layers and not any("/experts/" in (place.leaf or "") for place in wanted.values()):
        hosted = _hosted(config)
    found = _Search(checkpoint, config, wanted | hosted, hosted)
    extra = [name for name in checkpoint.names() if name not in found.used and skipped(name, config) is None]
    report = found.report()
    if extra:
        report.insert(bool(found.missing), f"not part of this model: {grouped(extra)}")
    if report:
        unexplained = config.quantization is None and any(entry.dtype not in WHOLE for entry in found.whole)
        raise CheckpointError(
            f"{checkpoint.directory}: the tensors do not fit config.json (model_type {quote(config.model_type)}):\n  "
            + "\n  ".join(report)
            + ("\nconfig.json has no quantization_config that says how weights are quantised: use" if unexplained else
               "\nUse") + " the config.json that belongs to these weights, or download the checkpoint again."
        )
    return [(found.sources[name], place) for name, place in wanted.items()]


def expert_sources(checkpoint: Checkpoint, config) -> list[list[dict[str, Source]]]:
    """sources[l][e][projection] of all routed experts; raises CheckpointError naming all that do not fit."""
    hosted = _hosted(config)
    found = _Search(checkpoint, config, hosted, hosted)
    if report := found.report():
        raise CheckpointError(f"{checkpoint.directory}: the routed experts do not fit config.json:\n  "
                              + "\n  ".join(report))
    result = [[{} for _ in range(config.n_routed_experts)] for _ in range(config.num_moe_layers)]
    for layer, expert, projection, name, _ in experts(config):
        result[layer][expert][projection] = found.sources[name]
    return result


def _hosted(config) -> dict[str, Place]:
    return {name: Place(None, (layer, expert), shape) for layer, expert, _, name, shape in experts(config)}


class _Search:
    """Looks for the wanted weights.

    Attributes:
      sources: name -> the weight, of all that have all their tensors.  used: the names of these tensors.
      missing: names of tensors.  whole: the weights that are stored without scales.
    """

    def __init__(self, checkpoint: Checkpoint, config, wanted: Mapping[str, Place], hosted: Container[str]):
        self.checkpoint, self.quantization, self.wanted, self.hosted = checkpoint, config.quantization, wanted, hosted
        self.sources: dict[str, Source] = {}
        self.used, self.missing, self.whole, self.quantised, self.shapes = set(), [], [], [], []
        for name, place in wanted.items():
            if self._is_quantised(name, place):
                self._add_quantised(name, place)
            elif name in checkpoint:
                self.used.add(name)
                self.sources[name] = checkpoint.entry(name)
                self.whole.append(self.sources[name])
            else:
                self.missing.append(name)

    def _is_quantised(self, name: str, place: Place) -> bool:
        made = self.quantization
        if made is None or len(place.shape) != 2:
            return False
        if made.codes:  # in a tensor of another name
            return name + made.codes in self.checkpoint or name + made.scales in self.checkpoint
        return name in self.checkpoint and self.checkpoint.entry(name).dtype == FORMATS[made.format].dtype

    def _add_quantised(self, name: str, place: Place):
        made = self.quantization
        parts = [name + made.codes, name + made.scales] + [name + made.shape] * bool(made.shape)
        self.used.update(parts)
        absent = [part for part in parts if part not in self.checkpoint]
        self.missing += absent
        if not absent:
            codes, scales, *shape = map(self.checkpoint.entry, parts)
            self.sources[name] = Quantised(name, made.format, place.shape, codes, scales)
            self.quantised.append(self.sources[name])
            self.shapes += [(entry, place.shape) for entry in shape]

    def report(self) -> list[str]:
        """What is wrong, a line for each kind."""
        shapes = [(entry, self.wanted[entry.name].shape) for entry in self.whole]
        dtypes = []
        for weight in self.quantised:
            for entry, dtype, shape in weight.expected():
                shapes.append((entry, shape))
                dtypes.append((entry, dtype))
        dtypes += [(entry, "I32" if entry.dtype != "I64" else "I64") for entry, _ in self.shapes]
        lines = [f"missing: {grouped(self.missing)}"] if self.missing else []
        lines += _grouped_by("wrong shape", ((f"{list(entry.shape)}, expected {list(needs)}", entry.name)
                                             for entry, needs in shapes if entry.shape != tuple(needs)))
        lines += _grouped_by("wrong dtype", ((f"{entry.dtype}, expected {dtype}", entry.name)
                                             for entry, dtype in dtypes if entry.dtype != dtype))
        lines += _grouped_by("wrong dtype", self._unreadable())
        lines += _grouped_by("wrong shape", self._lying_shapes())
        return lines or self._mixed()

    def _unreadable(self) -> Iterable[tuple[str, str]]:
        for entry in self.whole:
            if entry.name not in self.hosted and entry.dtype not in WHOLE:
                yield f"{entry.dtype}, readable are {', '.join(WHOLE)}", entry.name
            elif entry.name in self.hosted and entry.dtype not in STORABLE:
                other = " (experts='device' reads F16)" if entry.dtype == "F16" else ""
                yield f"{entry.dtype}, experts on the host are {' or '.join(STORABLE)}{other}", entry.name

    def _lying_shapes(self) -> Iterable[tuple[str, str]]:
        """A packed tensor's own word on the shape of its weight."""
        for entry, shape in self.shapes:
            if entry.dtype not in ("I32", "I64"):
                continue  # reported as such
            if entry.shape != (2,):
                yield f"{list(entry.shape)}, expected [2]", entry.name
            elif not np.array_equal(said := self.checkpoint.read(entry.name), shape):
                yield f"it says {said.tolist()}, the weight is {list(shape)}", entry.name

    def _mixed(self) -> list[str]:
        kinds = {}
        for name, source in self.sources.items():
            if name in self.hosted:
                kinds.setdefault(source.dtype, []).append(name)
        if len(kinds) < 2:
            return []
        counts = " and ".join(f"{len(found)} {kind}" for kind, found in kinds.items())
        return [f"wrong dtype: {counts} routed experts, all must be of one dtype: "
                f"{grouped(min(kinds.values(), key=len))}"]


def _grouped_by(what: str, findings: Iterable[tuple[str, str]]) -> list[str]:
    """`what: why: names` for each why."""
    by_reason = {}
    for why, name in findings:
        by_reason.setdefault(why, []).append(name)
    return [f"{what}: {why}: {grouped(found)}" for why, found in by_reason.items()]
