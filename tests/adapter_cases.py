"""Adapters of every kind of module for the tiny models of make_goldens, routed experts included."""

import zlib

import make_goldens
import numpy as np
from flax.traverse_util import unflatten_dict

from kjax import lora
from kjax.models import ModelConfig, linears
from kjax.weights.save import save_checkpoint


def sizes(content: dict) -> dict:
    return linears(ModelConfig.from_json(content))


def spec_of(content: dict, groups=("attention", "experts"), ranks=(), alpha=6.0, rank=3, rslora=False):
    """A spec over whole groups; ranks: a projection's own rank."""
    own = dict(ranks)
    return lora.LoraSpec(tuple(sorted(
        (path, lora.Adapter(own.get(path.split("/")[-1], rank), alpha, 0.0, rslora))
        for path in sizes(content) if lora.group(path) in groups)))


def random_tree(spec: lora.LoraSpec, found: dict, seed: int = 0, size: float = 0.1) -> dict:
    """A and B that both matter."""
    leaves = {}
    for path, adapter in spec.entries:
        linear = found[path]
        for name, shape in (("lora_A", (adapter.rank, linear.width_in)), ("lora_B", (linear.width_out, adapter.rank))):
            random = np.random.RandomState([seed, zlib.crc32(f"{path}/{name}".encode())])
            noise = random.standard_normal((*linear.stack, *shape)).astype(np.float32)
            leaves[f"{path}/{name}"] = noise * np.float32(shape[1] ** -0.5 if name == "lora_A" else size)
    return unflatten_dict(leaves, sep="/")


def write_base(directory, content: dict, seed: int, shards: int = 1):
    """A fp32 checkpoint of the seed's random weights."""
    params = make_goldens.random_params(ModelConfig.from_json(content), seed)
    return save_checkpoint(directory, params, content, shards=shards)
