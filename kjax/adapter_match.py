"""Which adapters of the model the tensors of a PEFT file are: all that does not fit is reported at once."""

from collections.abc import Mapping
from pathlib import Path

from kjax.adapter_layouts import DOWN, EXPERTS, GATE, MATRICES, Fused, Reader, module, modules, parse
from kjax.errors import CheckpointError
from kjax.lora import Linears, LoraSpec
from kjax.peft_config import Settings
from kjax.weights.files import quote

DTYPES = ("F32", "BF16", "F16", "F64")
Found = Mapping[str, tuple[str, tuple[int, ...]]]  # a tensor's name -> its dtype and shape


def match(directory: Path, settings: Settings, tensors, linears: Linears) -> tuple[LoraSpec, Reader]:
    """The spec that an open file's tensors make up, and a reader of them; raises with all that does not fit."""
    slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118  not a dict
    found = {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
    search = _Search(settings, found, linears)
    for path in linears:
        if not (path.startswith(EXPERTS) and search.fused):
            search.add_stack(path)
    made = search.fused_adapters() if search.fused else ()
    if not found:
        search.problems.append("the file holds no tensors")
    if search.problems:
        raise CheckpointError(f"{directory}: this adapter (of {quote(settings.base)}) does not fit the model: "
                              + listed(search.problems))
    reader = Reader(tensors, search.keys, linears, made)
    if any(reader.is_split(adapter) for adapter in made):
        made = tuple(Fused(a.parameter, a.wrapper, a.adapter, a.parameter == "gate_up_proj") for a in made)
        reader = Reader(tensors, search.keys, linears, made)
    entries = search.entries + [entry for adapter in made for entry in adapter.entries()]
    return LoraSpec(tuple(sorted(entries))), reader


class _Search:
    """Compares tensors with the model.

    Attributes: keys: (module, matrix) -> the tensor's name.  fused: whether the experts' adapters are.
      entries, problems: what was found.
    """

    def __init__(self, settings: Settings, found: Found, linears: Linears):
        self.settings, self.found, self.linears = settings, found, linears
        self.keys: dict[tuple[str, str], str] = {}
        self.entries, self.problems, strangers = [], [], []
        owned = {name for path in linears for name in modules(path, linears).values()}
        if DOWN in linears:
            owned |= {name + wrapper for name in self._experts() for wrapper in ("", ".base_layer")}
        for key in found:
            place = parse(key)
            if place is None or place[0] not in owned:
                strangers.append(key)
            elif place in self.keys:
                self.problems.append(f"{quote(key)} and {quote(self.keys[place])} are the same adapter")
            else:
                self.keys[place] = key
        self.problems += _strangers(strangers)
        self.present = {name for name, _ in self.keys}
        self.fused = DOWN in linears and any(
            name + wrapper in self.present for name in self._experts() for wrapper in ("", ".base_layer"))

    def _experts(self) -> list[str]:
        """The module that holds a layer's experts, of each MoE layer."""
        layers = self.linears[DOWN].layers
        return [module(DOWN, (layer, 0), self.linears).removesuffix(".0.down_proj") for layer in range(layers)]

    def add_stack(self, path: str):
        """A linear of all layers (and experts), each with a pair of tensors."""
        settings, names = self.settings, list(modules(path, self.linears).values())
        # Fused files spell the experts in target_parameters; kjax's and others' per-expert files in target_modules.
        named = [name for name in names if (settings.names(name) if settings.targets else name in self.present)]
        if unnamed := self.present.intersection(names).difference(named):
            self.problems.append(f"{min(unnamed)} has tensors, but target_modules in adapter_config.json does not name "
                                 "it")
        elif 0 < len(named) < len(names):
            what = "layers" if self.linears[path].experts is None else "experts"
            self.problems.append(f"{path} is adapted in {len(named)} of {len(names)} {what}; kjax needs all of them")
        if not named:
            return
        size = self.linears[path]
        adapters = {name: settings.adapter(name) for name in named}
        for name, adapter in adapters.items():
            self._check(name, adapter.rank, {"lora_A": (adapter.rank, size.width_in),
                                             "lora_B": (size.width_out, adapter.rank)})
        if len(set(adapters.values())) > 1:
            self.problems.append(f"{path} has layers of different rank or alpha, which a stack of layers cannot have")
        self.entries.append((path, adapters[named[0]]))

    def fused_adapters(self) -> tuple[Fused, ...]:
        """The adapters of the experts' two parameters, gate_up_proj inside where there are both."""
        experts = self._experts()
        if classic := next((name for name in self.present if ".mlp.experts." in name
                            and not name.endswith(".base_layer")), None):
            self.problems.append(f"the routed experts have fused adapters and adapters of their own ({classic}, ...)")
        both = any(f"{name}.base_layer" in self.present for name in experts)
        parameters = ("gate_up_proj", "down_proj") if both else self._single(experts)
        made = []
        for parameter in parameters:
            wrapper = ".base_layer" if both and parameter == "gate_up_proj" else ""
            adapters = {self.settings.adapter(f"{name}.{parameter}") for name in experts}
            if len(adapters) > 1:
                self.problems.append(f"{parameter} has layers of different rank or alpha, which a stack of layers "
                                     "cannot have")
            made.append(Fused(parameter, wrapper, adapters.pop()))
            for layer in range(len(experts)):
                self._check(made[-1].module(layer, self.linears), made[-1].adapter.rank, made[-1].shapes(self.linears))
        return tuple(made)

    def _single(self, experts: list[str]) -> tuple[str, ...]:
        """Which parameter the only wrapper is of: target_parameters says it, else the shapes."""
        named = tuple(p for p in ("gate_up_proj", "down_proj")
                      if any(name == p or name.endswith(f".{p}") for name in self.settings.parameters))
        if len(named) == 1:
            return named
        _, shape = self.found.get(self.keys.get((experts[0], "lora_A")), (None, ()))
        return ("down_proj" if shape and shape[-1] == self.linears[DOWN].width_in != self.linears[GATE].width_in else
                "gate_up_proj",)

    def _check(self, name: str, rank: int, wanted: Mapping[str, tuple[int, int]]):
        for matrix in MATRICES:
            key = self.keys.get((name, matrix))
            dtype, actual = self.found.get(key, (None, None))
            if dtype is None:
                self.problems.append(f"base_model.model.{name}.{matrix}.weight is missing")
            elif actual != wanted[matrix]:
                self.problems.append(f"{key} is {list(actual)}, the model and rank {rank} need {list(wanted[matrix])}")
            elif dtype not in DTYPES:
                self.problems.append(f"{key} has dtype {dtype}, not one of {', '.join(DTYPES)}")


def _strangers(keys: list[str]) -> list[str]:
    """What the tensors are that belong to no adaptable linear of the model."""
    router = [key for key in keys if ".mlp.gate." in key]
    problems = [f"{quote(key)} belongs to no linear layer of this model" for key in keys if key not in router]
    if router:
        problems.append(f"{len(router)} tensors adapt the router ({quote(router[0])}, ...), which kjax never does")
    return problems


def listed(items: list[str], limit: int = 20) -> str:
    return "; ".join(items[:limit]) + (f"; and {len(items) - limit} more" if len(items) > limit else "")
