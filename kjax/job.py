"""Everything a run needs besides weights, found and checked before anything large is read or allocated."""

import math
from dataclasses import dataclass
from pathlib import Path

from kjax import adapters, data, lora, lora_targets, models, optimizer
from kjax.config import Config
from kjax.identity import Identity, base_hash
from kjax.offload import host_lora, storage, store
from kjax.weights.account import account, expert_sources
from kjax.weights.safetensors import Checkpoint


@dataclass(frozen=True)
class Job:
    """A checked run.

    Attributes:
      linears: everything adaptable.  adapter: the lora tree to continue from, or None.
      batches: the optimiser steps.  evaluation: rows to evaluate on, or None.
      storage: how the experts are held on the host; None where they are not.
      base: the identity that adapters record.  identity: what a saved state must have been trained from.
    """

    config: Config
    model: models.ModelConfig
    linears: dict[str, lora.Size]
    spec: lora.LoraSpec
    adapter: dict | None
    tokenizer: data.Tokenizer
    train: data.Dataset
    evaluation: data.Dataset | None
    batches: data.Batches
    total_steps: int
    expert_dtype: str
    storage: storage.Storage | None
    base: adapters.Base
    identity: Identity

    @property
    def table(self) -> lora.Table:
        shapes = models.abstract_params(self.model, self.config.model.dtype, "device")
        return lora.table(self.spec, self.linears, lora.count(shapes))

    @property
    def experts_on_host(self) -> bool:
        """Whether the routed experts' adapters live on the host (Lora.experts_home)."""
        adapted = any(lora.group(path) == "experts" for path in self.spec.paths)
        return host_lora.on_host(self.config.lora.experts_home, adapted, self.config.model.experts == "host")

    @property
    def dropout(self) -> bool:
        return any(adapter.dropout > 0 for _, adapter in self.spec.entries)


def lora_spec(config: Config, linears: lora.Linears, loaded: lora.LoraSpec | None = None) -> lora.LoraSpec:
    """The adapters that a run trains: those of Model.adapter where it is set, else those that Lora describes.

    loaded: the spec of Model.adapter, where its files have been read.
    """
    if config.model.adapter is None:
        return lora_targets.resolve(config.lora, linears)
    spec = loaded or adapters.spec(config.model.adapter, linears)
    return spec if config.lora.dropout is None else spec.with_dropout(config.lora.dropout)


def prepare(config: Config, resuming: bool = False) -> Job:
    """Read the model's description, the tokenizer and the data of a run; raises the first thing that is wrong.

    resuming: the adapter's numbers are those of the saved state, so Model.adapter's are not read.
    """
    with Checkpoint(config.model.directory) as files:
        model = models.ModelConfig.from_json(files.config_json, str(files.config_path))
        model.check_row(config.data.max_length, "Data.max_length")
        linears = models.linears(model)
        base = adapters.identify(files)
        entries = [files.entry(name) for name in files.names()]
        account(files, model, models.abstract_params(model, config.model.dtype, config.model.experts))
        hosted = model.num_moe_layers and config.model.experts == "host"
        sources = expert_sources(files, model) if hosted else None
        hashed = base_hash(files.directory, entries)
    loaded = tree = None
    if config.model.adapter is not None and not resuming:
        loaded, tree = adapters.load(config.model.adapter, linears, base)
    spec = lora_spec(config, linears, loaded)
    tokenizer = data.Tokenizer.of_run(config)
    train, evaluation = data.load(config.data, tokenizer, config.train.seed)
    for dataset in (train, evaluation):
        if dataset is not None:
            data.check_ids(dataset.examples, model.vocab_size)
    settings = config.train
    batches = data.Batches.of_run(config, train)
    total = settings.steps or max(1, math.ceil(settings.epochs * len(batches)))
    chosen = storage.choose(config.model.storage, store.size(sources), total) if sources else None
    identity = Identity.of(config, hashed, train.hash, spec)
    return Job(config, model, linears, spec, tree, tokenizer, train, evaluation, batches, total,
               sources[0][0]["gate_proj"].dtype if sources else "", chosen, base, identity)


def rows(job: Job, directory: Path, isa: str, threads: int) -> list[tuple[str, str]]:
    """The lines of the banner that tell what will be done."""
    model, settings, chosen = job.model, job.config.train, job.config.optimizer
    layers = f"{model.num_dense_layers} dense + {model.num_moe_layers} MoE layers"
    experts = f"{model.n_routed_experts} experts, {model.num_experts_per_tok} per token"
    where = {"host": f"{job.expert_dtype} as stored, on the host ({isa}, {threads} threads)",
             "device": f"{job.config.model.dtype}, on the device"}[job.config.model.experts]
    warmup = optimizer.warmup_steps(chosen, job.total_steps)
    lines = [
        ("model", f"{job.config.model.directory}  {model.model_type}, {layers}, {experts}"),
        ("experts", where),
        *([("storage", str(job.storage))] if job.storage else []),
        ("the rest", f"{_weights(job.config.model)}, on the device"),
        *([("adapter", f"goes on from {job.config.model.adapter}, with its targets, ranks and scales; dropout "
            f"{job.spec.entries[0][1].dropout:g}")] if job.config.model.adapter is not None else []),
        ("data", _describe(job.train.report)),
    ]
    if job.evaluation is not None:
        lines.append(("evaluation", _describe(job.evaluation.report)))
    wanted, count = settings.rows_per_step, job.batches.rows_per_step
    lines += [
        ("step", f"{count} rows of up to {job.config.data.max_length} tokens = {count * job.config.data.max_length:,} "
                 f"places, {job.config.data.rows}" + (f"; the data do not fill {wanted}" if count < wanted else "")),
        ("steps", f"{job.total_steps} ({job.total_steps / len(job.batches):.2f} epochs of {len(job.batches)})"),
        ("rate", f"{chosen.learning_rate:g}, {chosen.schedule} after {warmup} steps of warm-up"),
        ("writes to", str(directory)),
    ]
    return lines


def _weights(settings) -> str:
    if settings.weights == "full":
        return settings.dtype
    return f"linear layers {settings.weights}, computed in {settings.dtype}"


def _describe(report: data.Report) -> str:
    text = f"{report.rows:,} rows, {report.tokens:,} tokens, {report.trained_share:.0%} of them trained"
    if report.truncated:
        text += f"; {report.truncated:,} rows ({report.truncated_share:.0%}) cut to {report.max_length} tokens"
    if report.dropped:
        text += f"; {report.dropped:,} rows dropped, nothing to train on within {report.max_length} tokens"
    return text
