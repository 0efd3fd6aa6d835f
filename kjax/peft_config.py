"""PEFT's adapter_config.json: a LoraSpec in PEFT's spelling, and a stranger's file as checked settings."""

import collections
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from kjax.adapter_layouts import EXPERTS, GATE, Fused, modules
from kjax.errors import CheckpointError, ConfigError
from kjax.lora import Adapter, Linears, LoraSpec
from kjax.weights.files import quote

# What PEFT can put into a LoRA that the formula y = W x + scale * B A x does not hold. Other keys, known or not,
# leave the formula alone.
_UNSUPPORTED = {
    "use_dora": "DoRA", "lora_bias": "a bias in the adapter", "modules_to_save": "fully trained modules",
    "fan_in_fan_out": "transposed weights",
    "layers_to_transform": "adapters on some layers only", "layer_replication": "replicated layers",
    "trainable_token_indices": "trained embeddings", "use_qalora": "QA-LoRA", "use_bdlora": "block-diagonal LoRA",
    "alora_invocation_tokens": "activated LoRA", "arrow_config": "Arrow routing", "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
}  # fmt: skip
# Initialisations that take something out of the base weights: such an adapter is wrong beside the unchanged base.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# A regular expression from a file can run for ever. With at most this many repetitions (60^4 / 4! = 540,000 ways over a
# name of 60 characters, PEFT's own `(.*\.)?` included) and groups of alternatives in at most this many characters it
# takes milliseconds a name, and a file may have this many of them.
_MAX_REPETITIONS, _MAX_GROUPS, _MAX_LENGTH, _MAX_PATTERNS = 3, 3, 200, 32


def write(spec: LoraSpec, linears: Linears, base: str, fused: tuple[Fused, ...] = ()) -> dict:
    """The contents of adapter_config.json: keys that every reader knows, with which PEFT finds the same modules.

    fused: the routed experts' adapters where the file holds them so; spec then has the others only.
    """
    adapters = {path: adapter for path, adapter in spec.entries} | {EXPERTS + f.parameter: f.adapter for f in fused}
    if len({(adapter.dropout, adapter.rslora) for adapter in adapters.values()}) != 1:
        raise ConfigError("PEFT files hold one dropout and one rslora for all modules; the adapters' differ")
    # Modules that a short name must not select: also those that kjax stacks elsewhere or never adapts.
    owners = {name: path for path in linears for name in modules(path, linears).values()}
    for layer in {re.match(r"model\.layers\.\d+", name)[0] for name in owners}:
        for name in ("gate_proj", "up_proj", "down_proj"):
            owners.setdefault(f"{layer}.mlp.experts.0.{name}", "")
    targets = _spell(spec.paths, linears, owners, lambda path: spec.get(path) is not None)
    rank, rank_pattern = _pattern({path: adapter.rank for path, adapter in adapters.items()}, linears)
    alpha, alpha_pattern = _pattern({path: _whole(adapter.alpha) for path, adapter in adapters.items()}, linears)
    any_adapter = next(iter(adapters.values()))
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": rank, "lora_alpha": alpha, "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern,
        # PEFT has no dropout for parameters and refuses the file; it would matter in training only.
        "lora_dropout": 0.0 if fused else any_adapter.dropout, "use_rslora": any_adapter.rslora, "bias": "none",
        "fan_in_fan_out": False, "init_lora_weights": True, "target_modules": targets,
    } | ({"target_parameters": [f"mlp.experts.{f.parameter}" for f in fused]} if fused else {})  # fmt: skip


def _whole(alpha: float) -> float:
    """A whole number as an int: some readers take no other alpha."""
    return int(alpha) if alpha == int(alpha) else alpha


def _pattern(values: Mapping[str, float], linears: Linears) -> tuple[float, dict[str, float]]:
    """The commonest value, and for the other paths PEFT's pattern: a regex for the end of a module's name.

    Where routed experts are adapted theirs is the default: PEFT with transformers 5 makes the rank of gate_up_proj
    from it, and from no pattern.
    """
    default = values.get(GATE, collections.Counter(values.values()).most_common(1)[0][0])
    others = {path: value for path, value in values.items() if not path.startswith(EXPERTS)}
    owners = {name: path for path in others for name in modules(path, linears).values()}
    pattern = {}
    for path, value in values.items():
        if value == default:
            continue
        if path in others:
            names = _spell([path], linears, owners, lambda other, value=value: values[other] == value)
            pattern |= {re.escape(name): value for name in names}
        else:  # `experts.12.down_proj`, and `experts.down_proj` for readers that keep all experts in one parameter
            pattern[rf"experts\.[\d.]*{path.removeprefix(EXPERTS)}"] = value
    return default, dict(sorted(pattern.items()))


def _spell(paths: Iterable[str], linears: Linears, owners: Mapping[str, str],
           belongs: Callable[[str], bool]) -> list[str]:
    """Names for these paths that select, by their end after a dot, no module whose path does not belong.

    The last part of the name where that suffices (`q_b_proj`), else the last two (`shared_experts.up_proj`, and
    `3.up_proj` for each expert), else the full names of all layers.
    """
    ends = {name: [".".join(name.split(".")[-parts:]) for parts in (1, 2)] for name in owners}
    taken = {end for name, path in owners.items() if not belongs(path) for end in ends[name]}
    names = set()
    for path in paths:
        full = modules(path, linears).values()
        names |= next((short for short in ({ends[name][parts] for name in full} for parts in (0, 1))
                       if not short & taken), set(full))
    return sorted(names)


@dataclass(frozen=True)
class Settings:
    """What an adapter_config.json says about a LoRA."""

    where: str
    base: str
    rank: int
    alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    dropout: float
    rslora: bool
    parameters: tuple[str, ...]  # of target_parameters: those that hold all routed experts
    targets: frozenset[str] | str  # names or a regular expression; empty: only the tensors tell
    excluded: frozenset[str] | str

    def adapter(self, module: str) -> Adapter:
        """The adapter of one module, `model.layers.3.self_attn.q_b_proj`: a pattern's first key that fits counts."""
        def value(pattern, default):
            return next((v for key, v in pattern.items() if _fits(key, module, self.where)), default)

        return Adapter(value(self.rank_pattern, self.rank), float(value(self.alpha_pattern, self.alpha)),
                       self.dropout, self.rslora)

    def names(self, module: str) -> bool:
        """Whether target_modules selects this module and exclude_modules does not."""
        return self._listed(self.targets, module) and not self._listed(self.excluded, module)

    def _listed(self, names: frozenset[str] | str, module: str) -> bool:
        if isinstance(names, str):
            return bool(_compile(names, self.where).fullmatch(module))
        parts = module.split(".")
        return any(".".join(parts[i:]) in names for i in range(len(parts)))


def read(raw: dict, where: str) -> Settings:
    """Checks the contents of an adapter_config.json; raises naming what kjax cannot follow."""
    if raw.get("peft_type") != "LORA":
        raise CheckpointError(f"{where}: peft_type {quote(raw.get('peft_type'))}; kjax reads LORA adapters")
    unsupported = [f"{key} = {quote(raw[key])} ({what})" for key, what in _UNSUPPORTED.items() if raw.get(key)]
    if raw.get("bias", "none") != "none":
        unsupported.append(f"bias = {quote(raw['bias'])} (trained biases)")
    start = raw.get("init_lora_weights", True)
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        unsupported.append(f"init_lora_weights = {quote(start)} (it changes the base weights; convert to a plain LoRA)")
    if unsupported:
        raise CheckpointError(f"{where}: not supported: {'; '.join(unsupported)}. Merge the adapter into its base with "
                              "PEFT, or train a plain LoRA")

    def get(key, ok, expected, default):
        value = raw.get(key)
        value = default if value is None else value
        if not ok(value):
            raise CheckpointError(f"{where}: {key} = {quote(value)}, expected {expected}")
        return value

    def is_rank(value):
        return type(value) is int and 0 < value < 1 << 20

    def is_alpha(value):
        return type(value) in (int, float) and math.isfinite(value)

    def is_names(value):
        return isinstance(value, str) or isinstance(value, list) and all(isinstance(name, str) for name in value)

    def pattern_of(is_value):
        return lambda value: (isinstance(value, dict) and all(map(is_value, value.values()))
                              and sum(_plain(key) is None for key in value) <= _MAX_PATTERNS)

    regexes = f"(at most {_MAX_PATTERNS} of them regular expressions)"
    targets = get("target_modules", is_names, "a list of names or a regular expression", [])
    excluded = get("exclude_modules", is_names, "a list of names or a regular expression", [])
    return Settings(
        where=where,
        base=str(raw.get("base_model_name_or_path") or ""),
        rank=get("r", is_rank, "a positive whole number", 8),  # PEFT's defaults
        alpha=get("lora_alpha", is_alpha, "a number", 8),
        rank_pattern=get("rank_pattern", pattern_of(is_rank), f"names {regexes} with positive whole numbers", {}),
        alpha_pattern=get("alpha_pattern", pattern_of(is_alpha), f"names {regexes} with numbers", {}),
        dropout=float(get("lora_dropout", lambda p: is_alpha(p) and 0 <= p < 1, "a number in [0, 1)", 0.0)),
        rslora=get("use_rslora", lambda flag: isinstance(flag, bool), "true or false", False),
        parameters=_parameters(raw, where),
        targets=_usable(targets),
        excluded=_usable(excluded),
    )


def _parameters(raw: dict, where: str) -> tuple[str, ...]:
    names = raw.get("target_parameters") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{where}: target_parameters = {quote(names)}, expected a list of names")
    if others := [name for name in names if name.split(".")[-1] not in ("gate_up_proj", "down_proj")]:
        raise CheckpointError(f"{where}: not supported: target_parameters names {quote(others[0])}; kjax adapts linear "
                              "layers, and of parameters only the experts' gate_up_proj and down_proj")
    return tuple(names)


def _usable(names: list[str] | str) -> frozenset[str] | str:
    """Names, or a regular expression if it is a simple one; without it the tensors tell what is adapted."""
    if isinstance(names, list):
        return frozenset(names)
    return names if names != "all-linear" and _is_harmless(names) else frozenset()


def _fits(key: str, module: str, where: str) -> bool:
    """Whether a pattern's key selects the module: PEFT matches it as a regex against the name's end after a dot."""
    if plain := _plain(key):
        return module == plain or module.endswith(f".{plain}")
    if not _is_harmless(key):
        raise CheckpointError(f"{where}: the regular expression {quote(key)} is too involved to be run safely; write "
                              "the names of the modules instead")
    return bool(_compile(rf"(?:.*\.)?(?:{key})", where).fullmatch(module))


def _plain(key: str) -> str | None:
    """The module name that a pattern's key spells, if it is no more than that."""
    plain = key.replace("\\.", ".")
    return plain if re.fullmatch(r"[\w.]+", plain) else None


def _is_harmless(pattern: str) -> bool:
    """Whether a match must end soon: few repetitions, none of them of a group, no back-references."""
    return (len(pattern) <= _MAX_LENGTH and len(re.findall(r"[*+{]|(?<!\()\?", pattern)) <= _MAX_REPETITIONS
            and pattern.count("(") <= _MAX_GROUPS and not re.search(r"\)[*+?{]|\\[1-9]|\(\?[^:]", pattern))


def _compile(pattern: str, where: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{where}: {quote(pattern)} is no regular expression ({error})") from error
