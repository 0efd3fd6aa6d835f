"""Makes a small DeepSeek-V3 base that answers short questions: tokenizer, pretraining, Hugging Face layout.

Claim: with every part of the architecture (MLA with q-LoRA, sigmoid router with bias and groups, shared experts, a
dense first layer) 3.2 M parameters learn the bundled dialogues in 400 steps.
Command, about 10 minutes on 2 cores; experiments/tiny_base holds its result:

    python experiments/make_tiny_base.py runs/tiny_base

The same seed gives the same bits on one machine and set of versions, whatever the number of cores; another
processor rounds sums in another order and gives another base of the same quality. With --tokenizer the base takes
over that tokenizer and its chat template, and is left untrained unless --steps says otherwise:

    python experiments/make_tiny_base.py runs/tiny_base_r1 --tokenizer path/to/deepseek_r1
"""

import argparse
import json
import random
import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import small_talk
import tiny_tokenizer
from flax.traverse_util import flatten_dict, unflatten_dict

from kjax import config as settings
from kjax import data
from kjax.data.batches import Batches
from kjax.data.tokenizer import Tokenizer
from kjax.errors import KjaxError
from kjax.loss import cross_entropy
from kjax.models import ModelConfig, Transformer, abstract_params, head, unembed
from kjax.weights.save import save_checkpoint

PLAIN = Path(__file__).parent / "data" / "plain.jsonl"
VOCABULARY = 1536  # below it words of the dialogues fall apart, above it most tokens are too rare to learn
CONTEXT = 512
TOKENIZER_FILES = ("tokenizer.json", "tiktoken.model", "tokenizer_config.json", "special_tokens_map.json",
                   "chat_template.jinja")
ROW, ROWS = 128, 16  # tokens per row: the longest conversation; 16 rows fill 2 cores
STEPS, PEAK_RATE = 400, 4e-3
TALKS = 6000  # generated conversations, a third of all


def model_json(vocab_size: int, bos: int | None, eos: int) -> dict:
    """config.json: DeepSeek-V3 in small; ratios of its widths are kept where they matter."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": vocab_size,
        "hidden_size": 192, "intermediate_size": 448, "num_hidden_layers": 4, "first_k_dense_replace": 1,
        "num_attention_heads": 6, "num_key_value_heads": 6, "q_lora_rank": 96, "kv_lora_rank": 64,
        "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "attention_bias": False,
        "n_routed_experts": 16, "n_shared_experts": 1, "num_experts_per_tok": 4, "moe_intermediate_size": 64,
        "moe_layer_freq": 1, "n_group": 4, "topk_group": 2, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
        "norm_topk_prob": True, "routed_scaling_factor": 2.5, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "max_position_embeddings": CONTEXT, "rope_theta": 10000.0, "rope_scaling": None,
        "tie_word_embeddings": False, "bos_token_id": bos, "eos_token_id": eos, "torch_dtype": "bfloat16",
    }


def initial_params(config: ModelConfig, key) -> dict:
    """fp32 values for every leaf: norms 1, matrices normal with variance 1/in, so that activations keep their size."""
    leaves = flatten_dict(abstract_params(config, jnp.float32, experts="device"), sep="/")
    values = {}
    for (path, leaf), k in zip(sorted(leaves.items()), jax.random.split(key, len(leaves)), strict=True):
        if "norm" in path:
            values[path] = jnp.ones(leaf.shape, jnp.float32)
        elif path.endswith("e_score_correction_bias"):
            # Fixed, not balanced while training; about the spread that balancing leaves among sigmoid scores.
            values[path] = 0.02 * jax.random.normal(k, leaf.shape)
        else:
            deviation = 0.02 if path == "embed_tokens/weight" else leaf.shape[-1] ** -0.5
            values[path] = deviation * jax.random.normal(k, leaf.shape)
    return unflatten_dict(values, sep="/")


def conversations(rng: random.Random) -> list[tuple[str, ...]]:
    """The text to learn: the bundled dialogues as written, as people type them and in voices, among generated ones."""
    plain = [tuple(m["content"] for m in json.loads(line)["messages"]) for line in PLAIN.read_text().splitlines()]
    talks = small_talk.generate(rng, TALKS)
    voiced = [small_talk.voiced(rng, *turns) for turns in 10 * plain if len(turns) == 2]
    return talks + voiced + 6 * plain + [_typed(rng, turns) for turns in 4 * plain]


def _typed(rng: random.Random, turns: tuple[str, ...]) -> tuple[str, ...]:
    """The first question without capital, without its mark, or both; sometimes with a polite opening."""
    question = turns[0]
    style = rng.randrange(4)
    if style == 0:
        return (f"Please tell me: {question}", *turns[1:]) if question.endswith("?") else turns
    if style in (1, 3):
        question = question[0].lower() + question[1:]
    if style in (2, 3):
        question = question.rstrip("?.!")
    return (question, *turns[1:])


def as_rows(turns: list[tuple[str, ...]]) -> str:
    """JSON Lines of OpenAI messages."""
    roles = ("user", "assistant")
    rows = ([{"role": roles[i % 2], "content": text} for i, text in enumerate(talk)] for talk in turns)
    return "".join(json.dumps({"messages": row}) + "\n" for row in rows)


def pretrain(config: ModelConfig, params: dict, dataset, steps: int, seed: int) -> dict:
    """All parameters but the router's bias, AdamW with warm-up and a cosine, fp32."""
    model = Transformer(config, dtype=jnp.float32)
    batches = Batches(dataset, ROWS, ROW, "packed", seed)
    rate = optax.warmup_cosine_decay_schedule(0.0, PEAK_RATE, max(1, steps // 20), steps, PEAK_RATE / 20)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.05))

    @jax.jit
    def step(params, state, batch):
        def mean_loss(params):
            hidden = model.apply({"params": params}, batch["tokens"], batch["positions"], batch["segments"])
            total, count = cross_entropy(unembed, head(params), hidden, batch["targets"], ROWS * ROW)
            return total / count

        loss, grads = jax.value_and_grad(mean_loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, fixed_bias(updates)), state, loss

    def fixed_bias(updates):  # it has no gradient, and weight decay would shrink it
        leaves = flatten_dict(updates, sep="/")
        return unflatten_dict({path: jnp.zeros_like(leaf) if path.endswith("bias") else leaf
                               for path, leaf in leaves.items()}, sep="/")

    state, recent = optimizer.init(params), []
    for number in range(steps):
        params, state, loss = step(params, state, batches.batch(number))
        recent = (recent + [float(loss)])[-50:]
        if number + 1 in (1, steps) or (number + 1) % 50 == 0:
            print(f"step {number + 1} of {steps}: loss {np.mean(recent):.3f}", flush=True)
    return params


def stored(params: dict) -> dict:
    """As DeepSeek stores it: bf16, the router's bias fp32."""
    leaves = flatten_dict(jax.device_get(params), sep="/")
    return unflatten_dict({path: leaf if path.endswith("bias") else leaf.astype(ml_dtypes.bfloat16)
                           for path, leaf in leaves.items()}, sep="/")


def make(directory: Path, tokenizer_from: Path | None, steps: int | None, seed: int):
    """Writes the base; a directory that already holds weights is refused."""
    turns = conversations(random.Random(seed))
    directory.mkdir(parents=True, exist_ok=True)
    if tokenizer_from is None:
        text = (text for talk in turns for text in talk)
        tiny_tokenizer.save(tiny_tokenizer.train(text, VOCABULARY), directory, CONTEXT)
        steps = STEPS if steps is None else steps
    else:
        for name in TOKENIZER_FILES:
            if (tokenizer_from / name).is_file():
                shutil.copyfile(tokenizer_from / name, directory / name)
        steps = steps or 0
    tokenizer = Tokenizer.load(directory)
    vocab_size = -(-tokenizer.vocab_size // 64) * 64  # a multiple of 64 suits every kernel
    bos, eos = tokenizer.bos_id, min(tokenizer.eos_ids)
    content = model_json(vocab_size, bos, eos)
    config = ModelConfig.from_json(content)
    params = initial_params(config, jax.random.key(seed))
    print(f"{sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6:.2f} M parameters, vocabulary {vocab_size}")
    if steps:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "corpus.jsonl"
            file.write_text(as_rows(turns))
            chosen = settings.Data(dataset=str(file), max_length=ROW, train_on_prompt=True)
            dataset, _ = data.load(chosen, tokenizer)
        params = pretrain(config, params, dataset, steps, seed)
    save_checkpoint(directory, stored(params), content)
    generation = {"bos_token_id": bos, "eos_token_id": eos, "do_sample": False, "max_new_tokens": 100}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    print(f"wrote {directory}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="a directory with tokenizer.json and tokenizer_config.json")
    parser.add_argument("--steps", type=int, help=f"of pretraining; {STEPS}, or 0 with --tokenizer")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        make(args.directory, args.tokenizer, args.steps, args.seed)
    except KjaxError as error:
        raise SystemExit(f"make_tiny_base: {error}") from None


if __name__ == "__main__":
    main()
