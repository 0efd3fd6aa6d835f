"""The family table: what a model_type implies, beside and instead of what its config.json says."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

# topk_method: how it scores. softmax_topk is the name here of what Qwen3 does without naming it.
SCORES = {"greedy": "softmax", "group_limited_greedy": "softmax", "noaux_tc": "sigmoid", "softmax_topk": "softmax"}


@dataclass(frozen=True)
class Family:
    """The parts of an architecture. Every key below that config.json may also give is a default.

    Attributes:
      routers: the topk_method values it may name, the default first.
      attention: "mla" (latent) or "gqa" (grouped queries).
      first_k_dense_replace, use_qk_norm, partial_rotary_factor: the defaults of these keys.
      output_bias: whether attention_bias reaches o_proj too.
      renamed: keys that its config.json spells in other ways, by their name in ModelConfig.
      text: of a multimodal wrapper, the model_types its text_config may name.
      prefix: what stands before the name of every tensor of the text model.
      row_limit: the key that bounds a row because attention beyond it would be sparse, which kjax does not have.
      unused: regular expression for tensors that are not loaded -> why.
    """

    routers: tuple[str, ...] = ("noaux_tc",)
    attention: Literal["mla", "gqa"] = "mla"
    first_k_dense_replace: int = 0
    use_qk_norm: bool = False
    partial_rotary_factor: float = 1.0
    output_bias: bool = True
    renamed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    text: tuple[str, ...] = ()
    prefix: str = ""
    row_limit: str | None = None
    unused: Mapping[str, str] = field(default_factory=dict)


_VISION = "the vision part, which is not fine-tuned"
FAMILIES = {
    "deepseek_v2": Family(routers=("greedy", "group_limited_greedy")),
    "deepseek_v3": Family(),
    # While a row has no more tokens than the indexer selects, it selects all of them: V3.2 is V3 there.
    "deepseek_v32": Family(row_limit="index_topk",
                           unused={r".*\.self_attn\.indexer\..*": "chooses the tokens of rows beyond index_topk"}),
    "kimi_k2": Family(),
    "kimi_k25": Family(text=("kimi_k2", "deepseek_v3"), prefix="language_model.",
                       unused={r"(model\.)?(vision_tower|mm_projector)\..*": _VISION}),
    "qwen3_moe": Family(attention="gqa", routers=("softmax_topk",), use_qk_norm=True,
                        renamed={"n_routed_experts": ("num_experts", "num_local_experts")}),
    "glm4_moe": Family(attention="gqa", first_k_dense_replace=1, partial_rotary_factor=0.5, output_bias=False),
    "glm4_moe_lite": Family(first_k_dense_replace=1),
}  # fmt: skip
