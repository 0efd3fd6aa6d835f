"""Measures what 8 and 4 bits cost: the error of weights and logits of each format against bf16.

Claim: FP8 of an FP8 checkpoint loses nothing; INT8 changes weights by 0.6 % of their size, NF4 by 9.2 %, INT4 by 9.5 %.
Command: python experiments/low_bit.py [CHECKPOINT], by default the tiny base of the demo; a random wider model follows.
"""

import json
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from rich.console import Console
from rich.table import Table

import kjax
from kjax.models import ModelConfig, abstract_params
from kjax.weights import lowbit
from kjax.weights.save import save_checkpoint

HERE = Path(__file__).parent
ROWS, LENGTH = 8, 64
# Four layers 512 wide: wide enough for whole blocks, small enough for seconds.
WIDER = json.loads((HERE / "tiny_base" / "config.json").read_text()) | {
    "hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 256, "num_hidden_layers": 4,
    "q_lora_rank": 192, "kv_lora_rank": 128, "num_attention_heads": 8, "num_key_value_heads": 8,
}  # fmt: skip


def random_checkpoint(directory: Path) -> Path:
    """Normal weights of deviation in^-1/2, norms of one."""
    rng = np.random.default_rng(0)

    def leaf(path, shape):
        text = jax.tree_util.keystr(path)
        if "norm" in text or "bias" in text:
            return np.full(shape.shape, "norm" in text, shape.dtype)
        return (rng.standard_normal(shape.shape, np.float32) * shape.shape[-1] ** -0.5).astype(shape.dtype)

    shapes = abstract_params(ModelConfig.from_json(WIDER), "bfloat16", "device")
    return save_checkpoint(directory, jax.tree_util.tree_map_with_path(leaf, shapes), WIDER)


def tokens_of(model: kjax.Model, rng: np.random.Generator) -> np.ndarray:
    """Rows of the demo's dialogues where the model has a tokenizer, else random ones."""
    if model.tokenizer is None:
        return rng.integers(0, model.config.vocab_size, (ROWS, LENGTH))
    lines = [json.loads(line) for line in (HERE / "data" / "keeper.jsonl").read_text().splitlines()]
    flat = [token for line in lines[:400] for token in model.tokenizer.render(line["messages"])[0]]
    return np.resize(np.asarray(flat, np.int32), (ROWS, LENGTH))


def weight_errors(low: dict, whole: dict) -> dict[str, list[float]]:
    """Root mean square of the difference over that of the weight, by projection and layer."""
    held, leaves, found = flatten_dict(low, sep="/"), flatten_dict(whole, sep="/"), {}
    for path in held:
        base, form, part = path.rsplit("/", 2) if path.count("/") > 1 else ("", "", "")
        if part != "codes":
            continue
        weight = leaves[f"{base}/weight"].astype(jnp.float32)
        stack = weight if weight.ndim == 3 else weight[None]
        parts = {name: held[f"{base}/{form}/{name}"].reshape(len(stack), *held[f"{base}/{form}/{name}"].shape[-2:])
                 for name in ("codes", "scales")}
        found[base] = []
        for layer in range(len(stack)):
            meant = lowbit.dequantise(form, {n: a[layer] for n, a in parts.items()}, stack.shape[-1], jnp.float32)
            found[base].append(float(jnp.linalg.norm(meant - stack[layer]) / jnp.linalg.norm(stack[layer])))
    return found


def measure(directory: Path, console: Console):
    with kjax.load(directory, progress=False) as model:
        whole, tokens = model.params, tokens_of(model, np.random.default_rng(1))
        expected = np.asarray(model.logits(tokens), np.float64)
    table = Table(title=f"{directory}: against bf16", title_justify="left")
    for name in ("weights", "linear layers, by layer", "output head", "logits", "KL", "same best token"):
        table.add_column(name, justify="left" if name == "weights" else "right")
    for weights in lowbit.SETTINGS[1:]:
        with kjax.load(directory, weights=weights, progress=False) as model:
            errors = weight_errors(model.params, whole)
            logits = np.asarray(model.logits(tokens), np.float64)
        head = errors.pop("lm_head", [0.0])[0]
        layers = [error for layers in errors.values() for error in layers]
        p, q = (np.exp(x - x.max(-1, keepdims=True)) for x in (expected, logits))
        p, q = (x / x.sum(-1, keepdims=True) for x in (p, q))
        divergence = (p * (np.log(p + 1e-30) - np.log(q + 1e-30))).sum(-1).mean()
        same = (expected.argmax(-1) == logits.argmax(-1)).mean()
        table.add_row(weights, f"{min(layers):.2%} to {max(layers):.2%}", f"{head:.2%}",
                      f"{np.linalg.norm(logits - expected) / np.linalg.norm(expected):.2%}", f"{divergence:.2g}",
                      f"{same:.1%}")
    console.print(table)


def main(argv: list[str]) -> None:
    console = Console()
    measure(Path(argv[0]) if argv else HERE / "tiny_base", console)
    with tempfile.TemporaryDirectory() as directory:
        measure(random_checkpoint(Path(directory) / "random_512_wide"), console)


if __name__ == "__main__":
    main(sys.argv[1:])
