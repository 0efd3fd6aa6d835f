"""What a model is, read from its config.json: a table from model_type to its parts; contradictions are refused."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from kjax.errors import CheckpointError
from kjax.models import quantization
from kjax.models.quantization import Quantization

ROUTERS = {"greedy": "softmax", "group_limited_greedy": "softmax", "noaux_tc": "sigmoid"}  # topk_method: scoring_func


@dataclass(frozen=True)
class Family:
    """What a model_type implies where its config.json is silent.

    routers: the topk_method values it may name, the default first.
    """

    routers: tuple[str, ...]


FAMILIES = {
    "deepseek_v2": Family(routers=("greedy", "group_limited_greedy")),
    "deepseek_v3": Family(routers=("noaux_tc",)),
    "kimi_k2": Family(routers=("noaux_tc",)),
}


@dataclass(frozen=True)
class Yarn:
    """YaRN context extension (arXiv:2309.00071) as DeepSeek uses it; the names are those of config.json."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class Rope:
    """Rotary positions. interleaved: pairs are (2i, 2i+1); otherwise (i, i + width/2)."""

    theta: float
    interleaved: bool = True
    yarn: Yarn | None = None


@dataclass(frozen=True)
class ModelConfig:
    """A mixture-of-experts decoder with latent attention; field names are those of the Hugging Face config.json."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    first_k_dense_replace: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    topk_method: str
    norm_topk_prob: bool
    routed_scaling_factor: float
    rms_norm_eps: float
    attention_bias: bool
    tie_word_embeddings: bool
    max_position_embeddings: int
    rope: Rope
    quantization: Quantization | None = None

    @property
    def num_dense_layers(self) -> int:
        return min(self.first_k_dense_replace, self.num_hidden_layers)

    @property
    def num_moe_layers(self) -> int:
        return self.num_hidden_layers - self.num_dense_layers

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @classmethod
    def from_json(cls, source: "str | Path | dict") -> "ModelConfig":
        """Reads a config.json: its path, the directory it lies in, or its content as a dict.

        Both spellings are understood, `rope_scaling` + `rope_theta` (transformers 4) and `rope_parameters` (5).
        Raises CheckpointError that names the key.
        """
        return _read(_Keys(*_content(source)))


def _content(source) -> tuple[str, dict]:
    if isinstance(source, dict):
        return "config.json", source
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: a model directory needs its config.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected an object of settings")
    return str(path), content


_REQUIRED = object()


class _Keys:
    """Typed access to the keys of a config.json, with errors that name file and key."""

    def __init__(self, where: str, content: dict):
        self.where, self.content = where, content

    def fail(self, key: str, rule: str):
        value = f" = {self.content[key]!r}" if key in self.content else ""
        raise CheckpointError(f"{self.where}: {key}{value}: {rule}")

    def get(self, key: str, default=_REQUIRED):
        """The value; an absent key or null gives the default."""
        value = self.content.get(key)
        if value is None and default is _REQUIRED:
            self.fail(key, "is missing" if key not in self.content else "must be given")
        return default if value is None else value

    def integer(self, key: str, default=_REQUIRED, least: int = 1) -> int:
        value = self.get(key, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
            self.fail(key, f"expected a whole number, at least {least}")
        return value

    def number(self, key: str, default=_REQUIRED, positive: bool = True) -> float:
        value = self.get(key, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            self.fail(key, "expected a number")
        if value < 0 or (positive and value == 0):
            self.fail(key, "must be positive" if positive else "must not be negative")
        return float(value)

    def flag(self, key: str, default=_REQUIRED) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            self.fail(key, "expected true or false")
        return value

    def only(self, key: str, supported, default=None):
        """Refuses a value whose arithmetic kjax does not have, instead of ignoring it."""
        if self.get(key, supported if default is None else default) != supported:
            self.fail(key, f"not supported, only {json.dumps(supported)}")


def _read(keys: _Keys) -> ModelConfig:
    model_type = keys.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        keys.fail("model_type", f"unknown; kjax knows {', '.join(FAMILIES)}")
    keys.only("hidden_act", "silu")
    keys.only("moe_layer_freq", 1)
    keys.only("mlp_bias", False)
    keys.only("attention_dropout", 0.0)
    config = ModelConfig(
        model_type=model_type,
        vocab_size=keys.integer("vocab_size"),
        hidden_size=keys.integer("hidden_size"),
        intermediate_size=keys.integer("intermediate_size"),
        num_hidden_layers=keys.integer("num_hidden_layers"),
        num_attention_heads=keys.integer("num_attention_heads"),
        q_lora_rank=keys.integer("q_lora_rank", None),
        kv_lora_rank=keys.integer("kv_lora_rank"),
        qk_nope_head_dim=keys.integer("qk_nope_head_dim"),
        qk_rope_head_dim=keys.integer("qk_rope_head_dim", least=2),
        v_head_dim=keys.integer("v_head_dim"),
        first_k_dense_replace=keys.integer("first_k_dense_replace", 0, least=0),
        moe_intermediate_size=keys.integer("moe_intermediate_size"),
        n_routed_experts=keys.integer("n_routed_experts"),
        n_shared_experts=keys.integer("n_shared_experts", 0, least=0),
        num_experts_per_tok=keys.integer("num_experts_per_tok"),
        n_group=keys.integer("n_group", 1),
        topk_group=keys.integer("topk_group", 1),
        topk_method=_router(keys, FAMILIES[model_type]),
        norm_topk_prob=keys.flag("norm_topk_prob", False),
        routed_scaling_factor=keys.number("routed_scaling_factor", 1.0),
        rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
        attention_bias=keys.flag("attention_bias", False),
        tie_word_embeddings=keys.flag("tie_word_embeddings", False),
        max_position_embeddings=keys.integer("max_position_embeddings"),
        rope=_rope(keys),
        quantization=quantization.read(keys),
    )
    _check(keys, config)
    return config


def _router(keys: _Keys, family: Family) -> str:
    method = keys.get("topk_method", family.routers[0])
    if method not in family.routers:
        keys.fail("topk_method", f"unknown for this model_type, expected {' or '.join(family.routers)}")
    if keys.get("scoring_func", ROUTERS[method]) != ROUTERS[method]:
        keys.fail("scoring_func", f"contradicts topk_method = {method!r}, which scores by {ROUTERS[method]}")
    return method


def _check(keys: _Keys, config: ModelConfig):
    """The rules between keys."""
    heads, experts, groups = config.num_attention_heads, config.n_routed_experts, config.n_group
    if keys.integer("num_key_value_heads", heads) != heads:
        keys.fail("num_key_value_heads", f"latent attention has as many as num_attention_heads = {heads}")
    if config.qk_rope_head_dim % 2:
        keys.fail("qk_rope_head_dim", "must be even: rotation acts on pairs")
    if config.num_experts_per_tok > experts:
        keys.fail("num_experts_per_tok", f"more than n_routed_experts = {experts}")
    if ROUTERS[config.topk_method] == "softmax" and config.norm_topk_prob:
        # Published code disagrees: transformers ignores the key, DeepSeek's own normalises and does not scale.
        keys.fail("norm_topk_prob", f"not supported with topk_method = {config.topk_method!r}")
    if config.topk_method == "greedy":
        return
    if experts % groups:
        keys.fail("n_group", f"does not divide n_routed_experts = {experts}")
    if config.topk_group > groups:
        keys.fail("topk_group", f"keeps more groups than n_group = {groups}")
    if config.num_experts_per_tok > config.topk_group * (experts // groups):
        keys.fail("num_experts_per_tok", f"more than the {config.topk_group * (experts // groups)} experts of the "
                                         f"topk_group = {config.topk_group} groups kept")
    if config.topk_method == "noaux_tc" and groups > 1 and experts // groups < 2:
        keys.fail("n_group", "a group is scored by its two best experts, but has only one")


def _rope(keys: _Keys) -> Rope:
    v5, v4 = keys.get("rope_parameters", None), keys.get("rope_scaling", None)
    for key, value in (("rope_parameters", v5), ("rope_scaling", v4)):
        if value is not None and not isinstance(value, dict):
            keys.fail(key, "expected an object")
    name = "rope_parameters" if v5 is not None else "rope_scaling"
    rope = _Keys(f"{keys.where}: {name}", v5 if v5 is not None else v4 or {})
    theta = (rope if "rope_theta" in rope.content else keys).number("rope_theta")
    if keys.number("rope_theta", theta) != theta:
        keys.fail("rope_theta", f"contradicts rope_parameters, which says {theta}")
    interleaved = keys.flag("rope_interleave", True)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return Rope(theta, interleaved)
    if kind != "yarn":
        rope.fail("rope_type" if "rope_type" in rope.content else "type", "not supported, only default and yarn")
    return Rope(theta, interleaved, Yarn(
        factor=rope.number("factor"),
        original_max_position_embeddings=rope.integer("original_max_position_embeddings"),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        mscale=rope.number("mscale", None, positive=False),
        mscale_all_dim=rope.number("mscale_all_dim", None, positive=False),
        attention_factor=rope.number("attention_factor", None),
        truncate=rope.flag("truncate", True),
    ))
