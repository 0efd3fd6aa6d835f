"""The settings of a run: frozen dataclasses whose types and ranges are checked on construction."""

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Literal

from kjax.errors import ConfigError


def _matches(value, hint) -> bool:
    """Whether `value` is of the annotated type; an int passes for a float, a bool never for a number."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in args
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, arg) for arg in args)
    if origin is tuple:
        return isinstance(value, tuple) and all(_matches(item, args[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_matches(k, args[0]) and _matches(v, args[1]) for k, v in value.items())
    if hint is typing.Any:
        return True
    if hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _hint_text(hint) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


class _Checked:
    """Checks every field against its annotation: `Lora.rank = 'sixteen'` fails where it is written."""

    def __post_init__(self):
        hints = typing.get_type_hints(type(self))
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, list) and typing.get_origin(hints[f.name]) is tuple:
                object.__setattr__(self, f.name, value := tuple(value))
            if not _matches(value, hints[f.name]):
                raise ConfigError(f"{type(self).__name__}.{f.name} = {value!r}: expected {_hint_text(hints[f.name])}")
        self._check()

    def _check(self):
        """Ranges and combinations; raises ConfigError."""

    def _require(self, ok: bool, name: str, rule: str):
        if not ok:
            raise ConfigError(f"{type(self).__name__}.{name} = {getattr(self, name)!r}: {rule}")


@dataclass(frozen=True)
class Model(_Checked):
    """The base model and how it is held.

    dtype is the compute type of everything outside the routed experts; those follow their store (design: a bf16
    store multiplies bf16 operands with fp32 sums). `experts="device"` keeps them as JAX arrays: small models only.

    weights is how the linear layers outside the routed experts lie on the device: "full", in dtype; "8bit", FP8 with
    the bytes and scales of a checkpoint that is FP8, else INT8; "nf4" (QLoRA) or "int4". Except for "full" the output
    head has 8 bits and the embedding table stays in main memory (docs/low-bit.md).
    """

    directory: str
    # A PEFT adapter to continue from: its targets, ranks and scales hold, and where Data and Lora name none its chat
    # template and its dropout.
    adapter: str | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    experts: Literal["host", "device"] = "host"
    weights: Literal["full", "8bit", "nf4", "int4"] = "full"
    transport: Literal["auto", "ffi", "pure_callback"] = "auto"
    storage: Literal["auto", "mapped", "resident"] = "auto"  # of routed experts on the host, see docs/storage.md
    stash_gb: float | None = None  # host memory for kept activations; None: a quarter of what is free

    def _check(self):
        self._require(self.stash_gb is None or 0 <= self.stash_gb <= 1e6, "stash_gb", "must be between 0 and 1e6")


@dataclass(frozen=True)
class Lora(_Checked):
    """Where adapters attach and how large they are.

    targets and exclude name groups (`attention`, `shared`, `dense`, `experts`), projections (`q_b_proj`) or regular
    expressions over module paths; the patterns give single groups, projections or regexes another rank or alpha.
    experts_home: where those of the routed experts and their optimiser live; `auto`: on the host where an accelerator
    runs the model.
    """

    targets: tuple[str, ...] = ("attention",)
    exclude: tuple[str, ...] = ()
    rank: int = 8
    alpha: float = 16.0
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    rslora: bool = False
    dropout: float | None = None  # None: that of Model.adapter, else none
    experts_home: Literal["auto", "device", "host"] = "auto"

    def _check(self):
        self._require(len(self.targets) > 0, "targets", "names nothing to adapt")
        self._require(self.rank > 0, "rank", "must be positive")
        self._require(self.alpha > 0, "alpha", "must be positive")
        self._require(all(r > 0 for r in self.rank_pattern.values()), "rank_pattern", "ranks must be positive")
        self._require(all(a > 0 for a in self.alpha_pattern.values()), "alpha_pattern", "alphas must be positive")
        self._require(self.dropout is None or 0 <= self.dropout < 1, "dropout", "must be in [0, 1), or None")


@dataclass(frozen=True)
class Data(_Checked):
    """The rows to train and evaluate on, and how they become token rows."""

    dataset: str  # a .json or .jsonl file, or an entry of dataset_info.json
    dataset_dir: str | None = None  # where dataset_info.json lies
    select: dict[str, typing.Any] = field(default_factory=dict)  # keep rows whose columns equal these values
    eval_dataset: str | None = None
    eval_select: dict[str, typing.Any] = field(default_factory=dict)
    val_size: float = 0.0  # split off for evaluation: a share below 1, or a number of rows
    limit: int | None = None  # use the first rows only
    format: Literal["auto", "alpaca", "sharegpt", "messages"] = "auto"
    template: str | None = None  # None: that of Model.adapter, else the model's own; a packaged name; a .jinja file
    max_length: int = 2048  # tokens per row
    rows: Literal["packed", "grouped", "plain"] = "packed"
    mask_history: bool = False  # train the last assistant turn only
    train_on_prompt: bool = False

    def _check(self):
        self._require(self.val_size >= 0, "val_size", "must not be negative")
        self._require(self.limit is None or self.limit > 0, "limit", "must be positive")
        self._require(self.max_length >= 2, "max_length", "must be at least 2: a token and its target")


@dataclass(frozen=True)
class Optimizer(_Checked):
    """AdamW with global-norm clipping and a learning-rate schedule."""

    learning_rate: float = 1e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = 0.03  # of all steps; ignored when warmup_steps is given
    warmup_steps: int | None = None
    min_ratio: float = 0.0  # the schedule ends at learning_rate * min_ratio
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    clip_norm: float | None = 1.0
    loraplus_ratio: float = 1.0  # learning rate of lora_B over that of lora_A (LoRA+, arXiv:2402.12354)

    def _check(self):
        self._require(self.learning_rate > 0, "learning_rate", "must be positive")
        self._require(0 <= self.warmup_ratio <= 1, "warmup_ratio", "must be in [0, 1]")
        self._require(self.warmup_steps is None or self.warmup_steps >= 0, "warmup_steps", "must not be negative")
        self._require(0 <= self.min_ratio <= 1, "min_ratio", "must be in [0, 1]")
        self._require(self.weight_decay >= 0, "weight_decay", "must not be negative")
        self._require(0 <= self.beta1 < 1, "beta1", "must be in [0, 1)")
        self._require(0 <= self.beta2 < 1, "beta2", "must be in [0, 1)")
        self._require(self.epsilon > 0, "epsilon", "must be positive")
        self._require(self.clip_norm is None or self.clip_norm > 0, "clip_norm", "must be positive, or None")
        self._require(self.loraplus_ratio > 0, "loraplus_ratio", "must be positive")


@dataclass(frozen=True)
class Train(_Checked):
    """The loop: how long, how large a step, what is written and when."""

    run_dir: str
    epochs: float = 1.0
    steps: int | None = None  # overrides epochs
    rows_per_step: int = 16  # one optimiser step sees all of them in one expert batch per layer
    micro_rows: int | None = None  # rows in attention at a time; None: all
    loss_chunk: int = 1024  # tokens whose logits exist at a time
    seed: int = 0
    eval_steps: int | None = None  # None: only before the first step and at the end
    save_steps: int | None = None  # None: only at the end
    keep: int = 2  # checkpoints kept
    tensorboard: bool = True
    plot: bool = True

    def _check(self):
        self._require(self.epochs > 0, "epochs", "must be positive")
        for name in ("rows_per_step", "loss_chunk", "keep"):
            self._require(getattr(self, name) > 0, name, "must be positive")
        for name in ("steps", "micro_rows", "eval_steps", "save_steps"):
            self._require(getattr(self, name) is None or getattr(self, name) > 0, name, "must be positive, or None")
        self._require(0 <= self.seed < 2**31, "seed", "must be in [0, 2^31)")
        if self.micro_rows is not None:
            self._require(self.rows_per_step % self.micro_rows == 0, "micro_rows",
                          f"must divide rows_per_step = {self.rows_per_step}")


@dataclass(frozen=True)
class Config(_Checked):
    """One run."""

    model: Model
    data: Data
    train: Train
    lora: Lora = field(default_factory=Lora)
    optimizer: Optimizer = field(default_factory=Optimizer)
