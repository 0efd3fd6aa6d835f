"""Checkpoints of full size without data: shards made from names, shapes and dtypes, with holes in place of numbers."""

import json
import math
import os
import struct

from flax.traverse_util import flatten_dict

from kjax.models import abstract_params
from kjax.offload.formats import Quantised
from kjax.weights import names
from kjax.weights.account import account, expert_sources
from kjax.weights.safetensors import INDEX, ITEMSIZE


def write(directory, tensors: dict):
    """tensors: name -> {"shape", "dtype", "file", and "data" where its bytes matter}."""
    shards = {}
    for name, tensor in tensors.items():
        shards.setdefault(tensor["file"], {})[name] = tensor
    for file, content in shards.items():
        header, data, end = {}, [], 0
        for name, tensor in content.items():
            begin, end = end, end + math.prod(tensor["shape"]) * ITEMSIZE[tensor["dtype"]]
            header[name] = {"dtype": tensor["dtype"], "shape": tensor["shape"], "data_offsets": [begin, end]}
            if "data" in tensor:
                data.append((begin, tensor["data"]))
        text = json.dumps(header).encode()
        (directory / file).write_bytes(struct.pack("<Q", len(text)) + text)
        os.truncate(directory / file, 8 + len(text) + end)
        with open(directory / file, "r+b") as out:
            for begin, content in data:
                out.seek(8 + len(text) + begin)
                out.write(content)
    (directory / INDEX).write_text(json.dumps({"weight_map": {name: t["file"] for name, t in tensors.items()}}))


def accounted(checkpoint, config) -> tuple[set[str], dict[str, str], set[str]]:
    """By kjax itself, reading no data: weights that are loaded or opened, scale -> weight, and what is left.

    Checks that every parameter of the model is filled, and that nothing that is used is on the skip list.
    """
    abstract = abstract_params(config, "bfloat16", "host")
    loaded = account(checkpoint, config, abstract)
    opened = [source for layer in expert_sources(checkpoint, config) for expert in layer for source in expert.values()]
    assert len(opened) == config.num_moe_layers * config.n_routed_experts * 3
    filled = {}
    for _, place in loaded:
        filled[place.leaf] = filled.get(place.leaf, 0) + math.prod(place.shape)
    assert filled == {path: leaf.size for path, leaf in flatten_dict(abstract, sep="/").items()}

    weights, scales = set(), {}
    for source in [source for source, _ in loaded] + opened:
        if isinstance(source, Quantised):
            scales[source.scales.name] = source.codes.name
            source = source.codes
        weights.add(source.name)
    assert not weights & scales.keys()
    assert not any(names.skipped(name, config) for name in weights | scales.keys())
    return weights, scales, set(checkpoint.names()) - weights - scales.keys()
