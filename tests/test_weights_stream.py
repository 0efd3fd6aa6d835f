"""How weights are read: each shard opened once and read from begin to end, with little memory beside the result."""

import json
import os
import subprocess
import sys
from pathlib import Path

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
    opened, read, plain_open, plain_read = [], [], os.open, Checkpoint.read_bytes
    monkeypatch.setattr(os, "open", lambda path, *rest: opened.append(Path(path)) or plain_open(path, *rest))
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


# About 280 MB in bf16, of which the largest tensors have 98.
WIDE = weights_cases.V3 | {
    "vocab_size": 48000, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 3,
    "first_k_dense_replace": 3, "q_lora_rank": 256, "kv_lora_rank": 128, "tie_word_embeddings": False,
}  # fmt: skip

MEASURE = """
import ctypes, gc, json, re, sys
import jax
import kjax
from kjax.models import ModelConfig, abstract_params
from kjax.weights import load
from kjax.weights.safetensors import Checkpoint

def kilobytes(name):
    return int(re.search(rf"{name}:\\s+(\\d+)", open("/proc/self/status").read())[1])

load.BLOCK = int(sys.argv[2])
found = {}
ways = [(fill, weights) for fill in ("cpu", "gpu") for weights in ("full", "8bit", "nf4", "int4")]
for fill, weights in [ways[-1], *ways]:  # once to compile
    jax.default_backend = lambda: fill
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed does not count as there before
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

    Each of the readers has a block as stored, as fp32 and as the mask of its exponents, and six bands of rows while it
    quantises; finished blocks wait. By the same sum DeepSeek-V3 with the blocks of 32 MiB that are used takes 0.9 GB.
    """
    shapes = abstract_params(ModelConfig.from_json(WIDE), "bfloat16", "device")
    noise = np.random.default_rng(0).standard_normal(1 << 16, np.float32).astype(ml_dtypes.bfloat16)
    params = jax.tree.map(lambda leaf: np.resize(noise, leaf.shape).astype(leaf.dtype), shapes)
    directory = tmp_path / "model"
    save_checkpoint(directory, params, WIDE, shards=4)
    stored = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    assert stored > 250e6
    block = 4 << 20
    made = subprocess.run([sys.executable, "-c", MEASURE, str(directory), str(block)], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    found = json.loads(made.stdout.splitlines()[-1])
    print({name: [round(number / 1e6, 1) for number in pair] for name, pair in found.items()})

    def bound(block, widest):
        return load.WORKERS * (3 * block + 6 * 128 * widest * 4) + 2 * load.WORKERS * block

    assert bound(load.BLOCK, 18432) <= 0.9e9, "DeepSeek-V3"
    assert bound(block, 4096) < 0.6 * stored, "a copy of the checkpoint would show"
    for name, (beside, result) in found.items():
        assert result > 0.3 * stored, name
        assert beside <= bound(block, 4096) + 16e6, (name, found)  # 16 MB: pages that the allocators keep
