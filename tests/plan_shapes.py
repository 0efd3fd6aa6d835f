"""Random training runs of the size that compiles in seconds, and their planned memory over what XLA allocates.

    python tests/plan_shapes.py                  # every kind, seeds 0 to 3: ten minutes on two cores
    python tests/plan_shapes.py 5/3 7            # seed 5's number 3, all of seed 7
"""

import random
import sys

import jax

from kjax import gin_config, job, models, plan, step
from kjax.models import ModelConfig
from kjax.planning import memory

KINDS = ("wide mlp", "long rows", "no q_lora", "chunked loss", "grouped queries", "grouped queries, long rows",
         "nf4", "8 bits")
MORE = ("one dense layer", "one group", "dropout", "adapters everywhere", "expert adapters",
        "expert adapters on the host", "4 bits")  # too slow to compile in every test run
LOW, HIGH = 0.97, 1.10  # planned over compiled


def draw(seed: int, number: int) -> tuple[str, dict, list[str]]:
    """(name, config.json, gin bindings) of one run; the kind follows from the number, the sizes from both."""
    rng, kind = random.Random(f"{seed}/{number}"), (*KINDS, *MORE)[number]
    heads, nope = rng.choice((4, 8)), rng.choice((32, 64))
    content = {
        "model_type": "deepseek_v3", "vocab_size": rng.choice((2048, 4096)), "hidden_size": rng.choice((256, 384, 512)),
        "intermediate_size": rng.choice((512, 1024)), "num_hidden_layers": rng.choice((5, 6)),
        "num_attention_heads": heads, "q_lora_rank": rng.choice((64, 96)), "kv_lora_rank": rng.choice((64, 128)),
        "qk_nope_head_dim": nope, "qk_rope_head_dim": rng.choice((16, 32)), "v_head_dim": nope,
        "first_k_dense_replace": rng.choice((2, 3)), "moe_intermediate_size": rng.choice((128, 256)),
        "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
        "max_position_embeddings": 8192, "rope_theta": 10000.0, "torch_dtype": "float32"}
    rows = rng.choice((4, 8))
    train = {"Train.rows_per_step": rows, "Data.max_length": rng.choice((128, 256)), "Train.loss_chunk": 256,
             "Train.micro_rows": rng.choice((1, 2, rows))}
    if kind == "no q_lora":
        content |= {"q_lora_rank": None}
    elif kind == "chunked loss":
        content |= {"vocab_size": rng.choice((16384, 24576))}
        train |= {"Train.loss_chunk": rng.choice((128, 256, 512))}
    elif kind == "wide mlp":
        content |= {"intermediate_size": 4096}
    elif kind in ("nf4", "8 bits"):
        train |= {"Model.weights": kind.replace(" bits", "bit")}
    elif kind == "4 bits":
        train |= {"Model.weights": "int4"}
    elif kind == "one dense layer":
        content |= {"first_k_dense_replace": 1}
    elif kind == "one group":
        train |= {"Train.micro_rows": rows, "Data.max_length": 512}
    elif kind == "dropout":
        train |= {"Lora.dropout": 0.1}
    elif kind == "adapters everywhere":
        train |= {"Lora.targets": ("attention", "shared", "dense"), "Lora.rank": rng.choice((16, 32))}
    elif kind.startswith("expert adapters"):
        train |= {"Lora.targets": ("attention", "experts"), "Lora.rank": rng.choice((8, 16)),
                  "Lora.dropout": rng.choice((0.0, 0.1)),
                  "Lora.experts_home": "host" if kind.endswith("host") else "device"}
    if kind.startswith("grouped queries"):
        content |= {"model_type": "glm4_moe", "num_attention_heads": 2 * heads, "num_key_value_heads": heads // 2,
                    "head_dim": nope, "attention_bias": True, "use_qk_norm": rng.choice((True, False)),
                    "partial_rotary_factor": 0.5, "n_group": 1}
    if kind.endswith("long rows"):
        train |= {"Train.rows_per_step": 2, "Train.micro_rows": 1, "Data.max_length": rng.choice((1024, 1536))}
    return kind, content, [f"{name}={value!r}" for name, value in train.items()]


def settings(path, bindings, dtype: str = "float32"):
    return gin_config.load((), [f"Model.directory={str(path)!r}", f"Model.dtype={dtype!r}", *bindings],
                           fallback={"Data.dataset": "x", "Train.run_dir": "x"})


def ratio(config, content) -> tuple[float, str]:
    """Planned over compiled: arguments, outputs that are not written over arguments, and temporaries."""
    on_cpu = jax.default_backend() == "cpu"
    model = ModelConfig.from_json(content)
    run, args = plan.abstract_step(config, model, job.lora_spec(config, models.linears(model)), on_cpu)
    planned = memory.usage(jax.make_jaxpr(run)(*args), [True] * len(jax.tree.leaves(args[0])), merge=on_cpu)
    # Memory is assigned before code is generated: without optimising that, compilation takes half as long.
    options = step.compiler_options() | ({"xla_backend_optimization_level": 0} if on_cpu else {})
    jitted = jax.jit(run, donate_argnums=0, keep_unused=True, compiler_options=options)
    found = jitted.lower(*args).compile().memory_analysis()
    compiled = found.argument_size_in_bytes + found.temp_size_in_bytes + found.output_size_in_bytes \
        - found.alias_size_in_bytes
    assert planned.arguments == found.argument_size_in_bytes
    return planned.peak / compiled, f"planned {planned}, compiled {found}"


def main():
    for chosen in sys.argv[1:] or "0123":
        seed, _, only = chosen.partition("/")
        for number in [int(only)] if only else range(len(KINDS + MORE)):
            kind, content, bindings = draw(int(seed), number)
            found, _ = ratio(settings("config.json", bindings), content)
            print(f"{seed}/{number} {kind}: {found:.3f}{'' if LOW <= found <= HIGH else ' OUT OF BOUNDS'}", flush=True)


if __name__ == "__main__":
    main()
