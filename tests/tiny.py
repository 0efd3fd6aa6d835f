"""A whole fine-tuning job in small: a random DeepSeek-V3 checkpoint with its tokenizer, dialogues, and settings."""

import dataclasses
import io
import json
import random
from pathlib import Path

import weights_cases
from rich.console import Console

from kjax import adapters, checkpoint, config

V3 = weights_cases.V3 | {"vocab_size": weights_cases.BYTE_VOCABULARY}
WORDS = ("river", "stone", "lamp", "quiet", "seven", "green", "winter", "paper", "bread", "north")


def model(directory: Path, dtype: str = "float32", seed: int = 0, **changes) -> Path:
    """A random checkpoint with config.json and tokenizer; `changes` are keys of config.json."""
    weights_cases.write(directory, V3 | changes, dtype, seed)
    weights_cases.write_tokenizer(directory)
    return directory


def rows(path: Path, number: int = 24, seed: int = 0) -> Path:
    """Dialogues of one question and its answer, in the OpenAI layout, as JSON Lines."""
    rng = random.Random(seed)
    with open(path, "w") as file:
        for _ in range(number):
            words = rng.sample(WORDS, rng.randint(1, 3))
            messages = [{"role": "user", "content": f"say {' '.join(words)}"},
                        {"role": "assistant", "content": f"{' '.join(reversed(words))}, as you wish."}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def settings(directory: Path, run: str = "run", **changes) -> config.Config:
    """A run of four steps in `directory`, whose model and rows are made on first use.

    changes are settings by name, with their group: train__steps=2, lora__dropout=0.1.
    """
    base, data = directory / "model", directory / "rows.jsonl"
    if not base.exists():
        model(base)
    if not data.exists():
        rows(data)
    made = config.Config(
        model=config.Model(directory=str(base), dtype="float32"),
        data=config.Data(dataset=str(data), max_length=64, val_size=4.0),
        lora=config.Lora(rank=2, alpha=4.0, targets=("q_b_proj", "o_proj")),
        optimizer=config.Optimizer(learning_rate=3e-2, warmup_ratio=0.0),
        train=config.Train(run_dir=str(directory / run), steps=4, rows_per_step=4, loss_chunk=64, tensorboard=False,
                           plot=False))
    for name, value in changes.items():
        group, field = name.split("__")
        made = dataclasses.replace(made, **{group: dataclasses.replace(getattr(made, group), **{field: value})})
    return made


def quiet() -> Console:
    """A console whose output a test may read."""
    return Console(file=io.StringIO(), width=200)


def adapter_bytes(run) -> bytes:
    return (run.adapter / adapters.WEIGHTS).read_bytes()


def saved_steps(directory) -> list[int]:
    return checkpoint.Checkpoints(directory / "checkpoints", 2).steps()
