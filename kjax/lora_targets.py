"""Which linear layers get an adapter, and of what rank: the settings of Lora, matched against a model's modules."""

import difflib
import re
from collections.abc import Mapping

from kjax import config
from kjax.errors import ConfigError
from kjax.lora import GROUPS, Adapter, Linears, LoraSpec, module_names, stack_names

_ROUTER = "the router is never adapted: its choice of experts stays that of the base model"
# What cannot be adapted, by the name a user would give it or by its place in a layer, and why.
_REFUSED = {
    "router": _ROUTER,
    "mlp.gate": _ROUTER,
    "embed_tokens": "the embedding is not adapted",
    "lm_head": "the output head is not adapted",
}


def resolve(settings: config.Lora, linears: Linears) -> LoraSpec:
    """Turns targets and patterns into one adapter per linear.

    A target, an exclusion or the key of a pattern is a group, or a regular expression for a module's whole name or
    its end after a dot: `q_b_proj`, `shared_experts.up_proj`, `.*_a_proj`, `model.layers.0.mlp.*`. As in PEFT a bare
    projection name selects every module that ends in it, so `gate_proj` includes the routed experts; those are
    named with their number or without, `experts.5.up_proj` or `experts.up_proj`. Where several keys of one pattern fit
    a linear a projection name goes before a group and a regular expression before both; two of one kind must agree.
    """
    linears = {path: size for path, size in linears.items() if not path.endswith("/mlp/gate")}
    chosen = {path for target in settings.targets for path in _select("targets", target, linears)}
    for name in settings.exclude:
        chosen -= set(_select("exclude", name, linears))
    if not chosen:
        raise ConfigError(f"Lora.exclude = {settings.exclude!r} leaves nothing of targets = {settings.targets!r}")
    ranks = _pattern("rank_pattern", settings.rank_pattern, chosen, linears)
    alphas = _pattern("alpha_pattern", settings.alpha_pattern, chosen, linears)
    entries = []
    for path in sorted(chosen):
        rank, alpha = ranks.get(path, settings.rank), float(alphas.get(path, settings.alpha))
        entries.append((path, Adapter(rank, alpha, settings.dropout or 0.0, settings.rslora)))
    return LoraSpec(tuple(entries))


def _select(setting: str, name: str, linears) -> list[str]:
    """The paths that a group, projection name or regular expression selects; raises where there are none."""
    if name in GROUPS:
        found = [path for path in linears if GROUPS[name](path)]
        return found or _nothing(setting, name, linears)
    try:
        pattern = re.compile(rf"(?:.*\.)?(?:{name})")
    except re.error as error:
        raise ConfigError(f"Lora.{setting} = {name!r}: no group and no regular expression ({error})") from error
    found = []
    for path in linears:
        for names in ([stack_names(path, linears)] if linears[path].experts else []) + [module_names(path, linears)]:
            hits = [n for n in names if pattern.fullmatch(n)]
            if len(hits) == len(names):
                break
        if hits and len(hits) < len(names):
            what = "layers" if linears[path].experts is None else "experts"
            raise ConfigError(f"Lora.{setting} = {name!r} fits {len(hits)} of the {len(names)} {what} of {path} only "
                              f"({hits[0]}, ...): a stack is adapted as a whole; match all of it")
        if hits:
            found.append(path)
    layers = {n.rsplit(".self_attn.", 1)[0] for path in linears if GROUPS["attention"](path)
              for n in module_names(path, linears)}
    for refused, reason in _REFUSED.items():
        if not found and any(map(pattern.fullmatch, (refused, *(f"{layer}.{refused}" for layer in layers)))):
            raise ConfigError(f"Lora.{setting} = {name!r}: {reason}")
    return found or _nothing(setting, name, linears)


def _nothing(setting: str, name: str, linears):
    groups = [g for g in GROUPS if any(GROUPS[g](path) for path in linears)]
    projections = sorted({path.rsplit("/", 1)[1] for path in linears})
    near = difflib.get_close_matches(name, [*groups, *projections], n=1)
    raise ConfigError(f"Lora.{setting} = {name!r} matches nothing in this model."
                      + (f" Did you mean {near[0]!r}?" if near else "")
                      + f" There are the groups {', '.join(groups)} and the projections {', '.join(projections)}")


def _pattern(setting: str, pattern: Mapping[str, float], chosen: set[str], linears) -> dict[str, float]:
    """The value a pattern gives to each adapted path that one of its keys selects."""
    candidates: dict[str, list[tuple[int, str, float]]] = {}
    for key, value in pattern.items():
        kind = 0 if key in GROUPS else 1 if re.fullmatch(r"[\w.]+", key) else 2
        selected = chosen.intersection(_select(setting, key, linears))
        if not selected:
            raise ConfigError(f"Lora.{setting} key {key!r} selects nothing that is adapted: add it to targets")
        for path in selected:
            candidates.setdefault(path, []).append((kind, key, value))
    values = {}
    for path, rows in candidates.items():
        best = [row for row in rows if row[0] == max(rows)[0]]
        if len({value for _, _, value in best}) > 1:
            keys = " and ".join(repr(key) for _, key, _ in best)
            raise ConfigError(f"Lora.{setting}: {keys} give {path} different values; keep one")
        values[path] = best[0][2]
    return values
