"""What a model is, read from its config.json with the family table; contradictions are refused."""

from dataclasses import dataclass
from pathlib import Path

from kjax.errors import ConfigError
from kjax.models import keys as config_json
from kjax.models import quantization
from kjax.models.families import FAMILIES, SCORES, Family
from kjax.models.keys import Keys
from kjax.models.quantization import Quantization


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
    """A mixture-of-experts decoder; field names are those of the Hugging Face config.json.

    Widths of the other kind of attention than the family's are 0.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
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
    row_limit: int | None = None
    # Latent attention.
    q_lora_rank: int | None = None
    kv_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    # Attention with grouped queries; rotary_dim counts what is rotated of the beginning of a head.
    num_key_value_heads: int = 0
    head_dim: int = 0
    rotary_dim: int = 0
    use_qk_norm: bool = False

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def num_dense_layers(self) -> int:
        return min(self.first_k_dense_replace, self.num_hidden_layers)

    @property
    def num_moe_layers(self) -> int:
        return self.num_hidden_layers - self.num_dense_layers

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def rope_width(self) -> int:
        """How many numbers of a query or key head are rotated."""
        return self.rotary_dim or self.qk_rope_head_dim

    @property
    def longest_row(self) -> tuple[int, str]:
        """The most tokens that a sequence may have, and the key of config.json that says so."""
        if self.row_limit is not None and self.row_limit < self.max_position_embeddings:
            return self.row_limit, self.family.row_limit
        return self.max_position_embeddings, "max_position_embeddings"

    def check_row(self, tokens: int, what: str):
        """Refuses rows so long that this model's attention would become sparse; `what` is as long as `tokens`."""
        if self.row_limit is not None and tokens > self.row_limit:
            raise ConfigError(f"{what}: {tokens} tokens, but {self.model_type} rows of more than "
                              f"{self.family.row_limit} = {self.row_limit} need sparse attention, which kjax does not "
                              "have; make them shorter")

    @classmethod
    def from_json(cls, source: "str | Path | dict", where: str = "config.json") -> "ModelConfig":
        """Reads a config.json: its path, the directory it lies in, or its content as a dict, which errors call `where`.

        Both spellings are understood, `rope_scaling` + `rope_theta` (transformers 4) and `rope_parameters` (5).
        Raises CheckpointError that names the key.
        """
        keys = config_json.read(source, where)
        family = _family(keys, tuple(FAMILIES))
        return _read(_text(keys, family) if family.text else keys, family, keys.content["model_type"])


def _family(keys: Keys, known: tuple[str, ...]) -> Family:
    model_type = keys.get("model_type")
    if not isinstance(model_type, str) or model_type not in known:
        keys.fail("model_type", f"unknown; kjax knows {', '.join(known)}")
    return FAMILIES[model_type]


def _text(keys: Keys, wrapper: Family) -> Keys:
    """The text model of a multimodal one. What it leaves open, the wrapper's config says."""
    keys.get("text_config")
    text = keys.inner("text_config")
    _family(text, wrapper.text)
    own = {key: value for key, value in text.content.items() if value is not None}
    outer = {key: keys.content[key] for key in ("quantization_config", "tie_word_embeddings") if key in keys.content}
    return Keys(text.where, outer | own)


def _read(keys: Keys, family: Family, model_type: str) -> ModelConfig:
    keys = Keys(keys.where, keys.content, family.renamed)
    keys.only("hidden_act", "silu")
    keys.only("moe_layer_freq", 1)
    keys.only("decoder_sparse_step", 1)
    keys.only("mlp_only_layers", [])
    keys.only("mlp_bias", False)
    keys.only("attention_dropout", 0.0)
    keys.only("use_sliding_window", False)
    config = ModelConfig(
        model_type=model_type,
        vocab_size=keys.integer("vocab_size"),
        hidden_size=keys.integer("hidden_size"),
        intermediate_size=keys.integer("intermediate_size"),
        num_hidden_layers=keys.integer("num_hidden_layers"),
        num_attention_heads=keys.integer("num_attention_heads"),
        first_k_dense_replace=_dense_layers(keys, family),
        moe_intermediate_size=keys.integer("moe_intermediate_size"),
        n_routed_experts=keys.integer("n_routed_experts"),
        n_shared_experts=keys.integer("n_shared_experts", 0, least=0),
        num_experts_per_tok=keys.integer("num_experts_per_tok"),
        n_group=keys.integer("n_group", 1),
        topk_group=keys.integer("topk_group", 1),
        topk_method=_router(keys, family),
        norm_topk_prob=keys.flag("norm_topk_prob", False),
        routed_scaling_factor=keys.number("routed_scaling_factor", 1.0),
        rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
        attention_bias=keys.flag("attention_bias", False),
        tie_word_embeddings=keys.flag("tie_word_embeddings", False),
        max_position_embeddings=keys.integer("max_position_embeddings"),
        rope=_rope(keys, family),
        quantization=quantization.read(keys),
        row_limit=keys.integer(family.row_limit) if family.row_limit else None,
        **{"mla": _latent, "gqa": _grouped}[family.attention](keys, family),
    )
    _check(keys, config)
    return config


def _latent(keys: Keys, family: Family) -> dict:
    heads = keys.integer("num_attention_heads")
    if keys.integer("num_key_value_heads", heads) != heads:
        keys.fail("num_key_value_heads", f"latent attention has as many as num_attention_heads = {heads}")
    if _rotary_share(keys, family) != 1:
        keys.fail("partial_rotary_factor", "not supported with latent attention, only 1")
    widths = dict(
        q_lora_rank=keys.integer("q_lora_rank", None),
        kv_lora_rank=keys.integer("kv_lora_rank"),
        qk_nope_head_dim=keys.integer("qk_nope_head_dim"),
        qk_rope_head_dim=keys.integer("qk_rope_head_dim", least=2),
        v_head_dim=keys.integer("v_head_dim"),
    )
    if widths["qk_rope_head_dim"] % 2:
        keys.fail("qk_rope_head_dim", "must be even: rotation acts on pairs")
    return widths


def _grouped(keys: Keys, family: Family) -> dict:
    heads = keys.integer("num_attention_heads")
    groups = keys.integer("num_key_value_heads", heads)
    if heads % groups:
        keys.fail("num_key_value_heads", f"does not divide num_attention_heads = {heads}")
    width = keys.integer("head_dim", keys.integer("hidden_size") // heads, least=2)
    rotary = int(width * _rotary_share(keys, family))
    if rotary < 2 or rotary % 2:
        keys.fail("partial_rotary_factor", f"rotates {rotary} numbers of a head of {width}: must be even, at least 2")
    return dict(num_key_value_heads=groups, head_dim=width, rotary_dim=rotary,
                use_qk_norm=keys.flag("use_qk_norm", family.use_qk_norm))


def _dense_layers(keys: Keys, family: Family) -> int:
    """first_k_dense_replace; transformers 5 writes mlp_layer_types instead for some families, a word per layer."""
    kinds = keys.get("mlp_layer_types", None)
    if kinds is None:
        return keys.integer("first_k_dense_replace", family.first_k_dense_replace, least=0)
    layers = keys.integer("num_hidden_layers")
    dense = kinds.count("dense") if isinstance(kinds, list) else 0
    if kinds != ["dense"] * dense + ["sparse"] * (layers - dense):
        keys.fail("mlp_layer_types", f"expected a word for each of {layers} layers, 'dense' ones before 'sparse' ones")
    if min(keys.integer("first_k_dense_replace", dense, least=0), layers) != dense:
        keys.fail("first_k_dense_replace", f"contradicts mlp_layer_types, which begins with {dense} dense layers")
    return dense


def _router(keys: Keys, family: Family) -> str:
    method = keys.get("topk_method", family.routers[0])
    if method not in family.routers:
        keys.fail("topk_method", f"unknown for this model_type, expected {' or '.join(family.routers)}")
    if keys.get("scoring_func", SCORES[method]) != SCORES[method]:
        keys.fail("scoring_func", f"contradicts topk_method = {method!r}, which scores by {SCORES[method]}")
    return method


def _check(keys: Keys, config: ModelConfig):
    """The rules between keys of the router."""
    experts, groups = config.n_routed_experts, config.n_group
    if config.num_experts_per_tok > experts:
        keys.fail("num_experts_per_tok", f"more than {keys.spelled('n_routed_experts')} = {experts}")
    if config.topk_method in ("greedy", "group_limited_greedy") and config.norm_topk_prob:
        # Published code disagrees: transformers ignores the key, DeepSeek's own normalises and does not scale.
        keys.fail("norm_topk_prob", f"not supported with topk_method = {config.topk_method!r}")
    if config.topk_method in ("greedy", "softmax_topk"):
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


def _rope_keys(keys: Keys) -> Keys:
    """What describes the rotation: rope_parameters of transformers 5 or rope_scaling of 4."""
    v4 = keys.inner("rope_scaling")
    return v4 if keys.get("rope_parameters", None) is None else keys.inner("rope_parameters")


def _twice(keys: Keys, key: str, default):
    """A number that may stand beside the description of the rotation or in it."""
    rope = _rope_keys(keys)
    value = (rope if key in rope.content else keys).number(key, *default)
    if keys.number(key, value) != value:
        keys.fail(key, f"contradicts rope_parameters, which says {value}")
    return value


def _rotary_share(keys: Keys, family: Family) -> float:
    share = _twice(keys, "partial_rotary_factor", (family.partial_rotary_factor,))
    if share > 1 or (share < 1 and family.partial_rotary_factor == 1):
        keys.fail("partial_rotary_factor", f"{share:g} is not supported for this model_type")
    return share


def _rope(keys: Keys, family: Family) -> Rope:
    rope, theta = _rope_keys(keys), _twice(keys, "rope_theta", ())
    interleaved = family.attention == "mla" and keys.flag("rope_interleave", True)
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
