"""How weights are read: each shard opened once and read from begin to end, with little memory beside the result."""

import json
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import quantised_cases
import weights_cases

from kjax.models import ModelConfig, abstract_params
from kjax.weights import load, lowbit, safetensors
from kjax.weights.safetensors import Checkpoint
from kjax.weights.save import save_checkpoint


@pytest.mark.parametrize("weights", lowbit.SETTINGS)
@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_each_shard_is_opened_once_and_read_in_order(tmp_path, monkeypatch, weights, backend):
    """Of an FP8 checkpoint whose scales lie in other shards than their weights."""
    source, _ = weights_cases.write(tmp_path / "model", quantised_cases.SIZES)
    directory, *_ = quantised_cases.write(tmp_path, source, "fp8")
    opened, read, plain_open, plain_read = [], [], safetensors._open, Checkpoint.read_bytes
    monkeypatch.setattr(safetensors, "_open", lambda path, shown: opened.append(path) or plain_open(path, shown))
    monkeypatch.setattr(Checkpoint, "read_bytes", lambda self, entry, out, offset=0: read.append(
        (entry, offset)) or plain_read(self, entry, out, offset))
    monkeypatch.setattr(load, "WORKERS", 1)
    monkeypatch.setattr(load, "BLOCK", 1 << 14)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    with Checkpoint(directory) as checkpoint:
        config = ModelConfig.from_json(checkpoint.config_json)
        read.clear()
        load.load_params(checkpoint, config, abstract_params(config, "bfloat16"), weights)
    shards = [path for path in opened if path.suffix == ".safetensors"]
    assert len(shards) == len(set(shards)) == 3
    places = [(entry.path, entry.begin + offset) for entry, offset in read if not entry.name.endswith("_scale_inv")]
    assert len(places) >= 40 and places == sorted(places)
    shard_of = {entry.name: entry.path for entry, _ in read}
    assert any(shard_of[name.removesuffix("_scale_inv")] != path for name, path in shard_of.items()), "scales elsewhere"


def test_shards_are_read_by_number(tmp_path):
    directory, _ = weights_cases.write(tmp_path / "model", weights_cases.V3)
    tensors = weights_cases.tensors_of(directory)
    weights_cases.rewrite(directory, tensors, shards=12)
    weight_map = json.loads((directory / safetensors.INDEX).read_text())["weight_map"]
    short = {name: f"model-{int(name[6:11])}-of-12.safetensors" for name in set(weight_map.values())}
    for name, other in short.items():
        (directory / name).rename(directory / other)
    (directory / safetensors.INDEX).write_text(json.dumps({"weight_map": {k: short[v] for k, v in weight_map.items()}}))
    with Checkpoint(directory) as checkpoint:
        seen = list(dict.fromkeys(checkpoint.entry(name).path.name for name in checkpoint.names()))
    assert seen == [f"model-{number}-of-12.safetensors" for number in range(1, 13)]


# About 330 MB in bf16, of which the largest tensors have 64.
WIDE = weights_cases.V3 | {
    "vocab_size": 31250, "hidden_size": 1024, "intermediate_size": 10240, "num_hidden_layers": 3,
    "first_k_dense_replace": 3, "q_lora_rank": 256, "kv_lora_rank": 128, "tie_word_embeddings": False,
}  # fmt: skip

MEASURE = """
import gc, json, re, sys
import jax
import kjax
from kjax.models import ModelConfig, abstract_params
from kjax.weights import load
from kjax.weights.safetensors import Checkpoint

def kilobytes(name):
    return int(re.search(rf"{name}:\\s+(\\d+)", open("/proc/self/status").read())[1])

load.BLOCK = int(sys.argv[2])
found = {}
for turn in range(2):  # the first warms compiled code and the allocator up
    for fill in ("cpu", "gpu"):
        jax.default_backend = lambda: fill
        for weights in ("full", "8bit", "nf4", "int4"):
            gc.collect()
            open("/proc/self/clear_refs", "w").write("5")  # resets the peak
            before = kilobytes("VmRSS")
            with Checkpoint(sys.argv[1]) as checkpoint:
                config = ModelConfig.from_json(checkpoint.config_json)
                params = load.load_params(checkpoint, config, abstract_params(config, "bfloat16"), weights)
            result = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
            found[f"{fill} {weights}"] = [(kilobytes("VmHWM") - before) * 1024 - result, result]
            del params
print(json.dumps(found))
"""


def test_memory_beside_the_result_is_that_of_the_blocks_in_flight(tmp_path):
    """The peak of a process that loads a checkpoint of several shards, in every format and by both ways.

    With the blocks of 32 MiB that are used, the same bound is 0.75 GiB.
    """
    shapes = abstract_params(ModelConfig.from_json(WIDE), "bfloat16", "device")
    noise = np.random.default_rng(0).standard_normal(1 << 16, np.float32).astype(ml_dtypes.bfloat16)
    params = jax.tree.map(lambda leaf: np.resize(noise, leaf.shape).astype(leaf.dtype), shapes)
    directory = tmp_path / "model"
    save_checkpoint(directory, params, WIDE, shards=4)
    stored = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    assert stored > 300e6
    block = 2 << 20
    made = subprocess.run([sys.executable, "-c", MEASURE, str(directory), str(block)], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    found = json.loads(made.stdout.splitlines()[-1])
    print({name: [round(number / 1e6, 1) for number in pair] for name, pair in found.items()})
    bound = 2 * load.WORKERS * 3 * block
    assert bound * load.BLOCK / block <= 1e9
    for name, (beside, result) in found.items():
        assert result > 0.3 * stored, name
        # 16 MB for what the allocator keeps of one load while the next one is measured.
        assert beside <= bound + 16e6, (name, beside, found)
