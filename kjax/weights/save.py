"""A parameter tree into a checkpoint directory in the Hugging Face layout, one tensor per layer and expert."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict

from kjax.errors import CheckpointError
from kjax.weights import names
from kjax.weights.safetensors import INDEX, SINGLE
from kjax.weights.writer import Part, in_memory, write_error, write_file


def save_checkpoint(directory: str | os.PathLike, params: Mapping, config_json: Mapping, *, shards: int = 1) -> Path:
    """Writes `params` (a whole tree, with the routed experts in it) and config.json; returns the directory.

    The tensors keep their dtypes. With several shards each gets about the same number of bytes and an index says what
    lies where. A directory that already holds weights is refused.
    """
    directory = Path(directory)
    taken = [name for name in (INDEX, SINGLE) if (directory / name).exists()]
    if taken:
        raise CheckpointError(f"{directory}: already holds {taken[0]}; give a new directory")
    leaves = flatten_dict(params, sep="/")
    places = names.places(params)
    sizes = {name: int(np.prod(place.shape)) * leaves[place.leaf].dtype.itemsize for name, place in places.items()}
    total = sum(sizes.values())
    if not 1 <= shards <= len(places):
        raise ValueError(f"shards = {shards}: must be between 1 and the number of tensors, {len(places)}")

    files: dict[str, list[Part]] = {}
    weight_map, written = {}, 0
    for number, (name, place) in enumerate(places.items()):
        # By bytes, but so that every shard gets at least one tensor.
        shard = min(max(shards * written // max(total, 1), number - (len(places) - shards)), shards - 1, number)
        file = SINGLE if shards == 1 else f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        files.setdefault(file, []).append(in_memory(name, leaves[place.leaf], place.index))
        weight_map[name], written = file, written + sizes[name]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for file, parts in files.items():
            write_file(directory / file, parts)
        if shards > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (directory / INDEX).write_text(json.dumps(index, indent=2))
        (directory / "config.json").write_text(json.dumps(dict(config_json), indent=2) + "\n")
    except OSError as error:
        raise write_error(directory, error) from error
    return directory
