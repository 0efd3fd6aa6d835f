"""Tiny random models fine-tuned by transformers, peft and torch.optim; run it to remake tests/goldens_peft.

    python tests/make_peft_goldens.py

Weights, adapters and tokens come from a seed and a generator whose stream numpy has frozen, so that a golden holds
only what torch made of them: the loss and gradient norm of each step, and how far each adapter went.
"""

import copy
import json
import tempfile
import zlib
from pathlib import Path

import jax
import make_goldens
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from kjax import adapters, config, lora, lora_targets
from kjax.models import ModelConfig, linears

GOLDENS = Path(__file__).parent / "goldens_peft"
STEPS, ROWS, LENGTH = 10, 3, 16

# Every kind of module is adapted, with ranks and alphas that differ between groups and projections.
LORA = {
    "v2_greedy": config.Lora(targets=("attention", "shared", "dense"), rank=4, alpha=8.0,
                             rank_pattern={"shared": 2, "kv_b_proj": 3}, alpha_pattern={"dense": 3.0}),
    "v3": config.Lora(targets=("attention", "shared", "dense"), rank=3, alpha=4.0, rslora=True,
                      rank_pattern={"attention": 4, "q_a_proj": 2},
                      alpha_pattern={r"layers\.[12]\.self_attn\..*": 6.5}),
}
# Rates that change the loss a lot in ten steps, decay that matters, and a clip that some steps feel and others do not.
OPTIMIZER = {
    "v2_greedy": config.Optimizer(learning_rate=2e-2, schedule="cosine", warmup_steps=2, weight_decay=0.1,
                                  clip_norm=1.8),
    "v3": config.Optimizer(learning_rate=2e-2, schedule="linear", warmup_steps=3, weight_decay=0.1, clip_norm=2.2,
                           beta2=0.99),
}


def content(case: str) -> dict:
    """A config.json's content; a copy, as transformers writes into what it is given."""
    return copy.deepcopy(make_goldens.CASES[case])


def spec_of(case: str) -> tuple[lora.LoraSpec, dict]:
    """The adapters of a case, and the model's linears."""
    found = linears(ModelConfig.from_json(content(case)))
    return lora_targets.resolve(LORA[case], found), found


def random_lora(case: str, seed: int, b: float) -> dict:
    """A lora tree: A uniform as at a start, B normal with standard deviation `b` (0: as at a start)."""
    leaves = flatten_dict(lora.abstract(*spec_of(case)), sep="/")
    for path, leaf in leaves.items():
        random = np.random.RandomState([seed, zlib.crc32(path.encode())])
        if path.endswith("lora_A"):
            leaves[path] = random.uniform(-1, 1, leaf.shape).astype(np.float32) * np.float32(leaf.shape[-1] ** -0.5)
        else:
            leaves[path] = (b * random.standard_normal(leaf.shape)).astype(np.float32)
    return unflatten_dict(leaves, sep="/")


def batches(case: str, seed: int, steps: int) -> list[dict[str, np.ndarray]]:
    """Batches of ROWS x LENGTH: sequences that can be learned (each step repeats three of five), prompts untrained."""
    random = np.random.RandomState(seed)
    pool = random.randint(0, content(case)["vocab_size"], (5, LENGTH + 1))
    made = []
    for _ in range(steps):
        rows = pool[random.permutation(5)[:ROWS]]
        targets = np.where(np.arange(LENGTH) < random.randint(2, 6, (ROWS, 1)), -100, rows[:, 1:])
        positions = np.tile(np.arange(LENGTH), (ROWS, 1))
        batch = {"tokens": rows[:, :-1], "targets": targets, "positions": positions, "segments": np.ones_like(targets)}
        made.append({name: array.astype(np.int32) for name, array in batch.items()})
    return made


def by_name(case: str, tree) -> dict[str, np.ndarray]:
    """A lora tree, or its gradients, as {"model.layers.0.self_attn.o_proj.lora_A": [R,I], ...}."""
    found, named = spec_of(case)[1], {}
    for path, leaf in flatten_dict(tree, sep="/").items():
        path, matrix = path.rsplit("/", 1)
        named |= {f"{module}.{matrix}": np.asarray(array)
                  for module, array in zip(lora.module_names(path, found), leaf, strict=True)}
    return named


def peft_parameters(model) -> dict:
    """The adapter's torch parameters of a PeftModel, under the names of by_name."""
    return {name.removeprefix("base_model.model.").replace(".default.weight", ""): parameter
            for name, parameter in model.named_parameters() if ".lora_" in name}


def peft_model(case: str, params: dict, tree: dict):
    """transformers' model with kjax's adapter files put on it by PEFT.

    Under its own model_type PEFT would move shared and dense targets to the routed experts (kjax.adapters.notes).
    """
    import peft

    spec, found = spec_of(case)
    model = make_goldens.torch_model(content(case), params)
    model.config.model_type = "a_type_peft_does_not_convert"
    with tempfile.TemporaryDirectory() as directory:
        adapters.save(directory, tree, spec, found, base=adapters.Base(directory))
        return peft.PeftModel.from_pretrained(model, directory, is_trainable=True).eval()


def torch_loss(model, batch):
    """The mean cross-entropy of the trained tokens, with its graph."""
    import torch

    logits = model(input_ids=torch.from_numpy(batch["tokens"]).long()).logits
    targets = torch.from_numpy(batch["targets"]).long()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


def torch_steps(case: str, model, data, *, margin: float | None = None):
    """Trains the PeftModel on the batches; returns losses and gradient norms (before clipping), one per step.

    With `margin`, None in place of both where a route came closer than that to a tie.
    """
    import torch
    import transformers

    settings = OPTIMIZER[case]
    parameters = list(peft_parameters(model).values())
    optimizer = torch.optim.AdamW(parameters, settings.learning_rate, (settings.beta1, settings.beta2),
                                  settings.epsilon, settings.weight_decay)
    schedule = getattr(transformers, f"get_{settings.schedule}_schedule_with_warmup")(
        optimizer, settings.warmup_steps, len(data))
    losses, norms = [], []
    for batch in data:
        if margin and near_tie(case, model, batch) < margin:
            return None
        optimizer.zero_grad()
        loss = torch_loss(model, batch)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)))
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses, norms


def near_tie(case: str, model, batch) -> float:
    """The least margin of the model's routers on a batch."""
    base = ModelConfig.from_json(content(case))
    return make_goldens.least_margin(model.base_model.model, base, batch["tokens"])


def draw_steps(case: str, seed: int):
    """A seed all of whose training steps keep clear of ties, and what torch made of it."""
    base = ModelConfig.from_json(content(case))
    for attempt in range(seed * 1000, seed * 1000 + 1000):
        model = peft_model(case, make_goldens.random_params(base, attempt), random_lora(case, attempt, 0.0))
        made = torch_steps(case, model, batches(case, attempt, STEPS), margin=make_goldens.MARGIN)
        if made is not None:
            return attempt, model, *made
    raise AssertionError(f"{case}: a thousand draws with ties")


def main():
    GOLDENS.mkdir(exist_ok=True)
    for case in LORA:
        seed, model, losses, norms = draw_steps(case, 1)
        final = {name: parameter.detach().numpy() for name, parameter in peft_parameters(model).items()}
        np.savez_compressed(
            GOLDENS / f"{case}.npz", config=json.dumps(content(case)), seed=seed, losses=losses, norms=norms,
            names=sorted(final), lengths=[float(np.linalg.norm(final[name])) for name in sorted(final)])
        print(case, seed, losses, norms)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
