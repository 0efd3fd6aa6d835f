"""The expert store over safetensors files: in place, checked, and named in every complaint."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import experts_cases as cases
import numpy as np
import psutil
import pytest
from safetensors.numpy import save_file

from kjax.errors import CheckpointError
from kjax.offload import ExpertStore, host_experts

NAMES = ("gate_proj", "up_proj", "down_proj")
LAYERS, EXPERTS, D, F = 2, 3, 24, 20


@dataclass(frozen=True)
class Entry:
    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def entries(path: Path) -> dict[str, Entry]:
    """Where each tensor of a good safetensors file lies."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:8 + size])
    return {name: Entry(name, path, e["dtype"], tuple(e["shape"]), *(8 + size + o for o in e["data_offsets"]))
            for name, e in header.items() if name != "__metadata__"}


def tensors(weights):
    return {f"layers.{layer}.experts.{e}.{name}": np.ascontiguousarray(weights[i][layer, e])
            for layer in range(weights[0].shape[0]) for e in range(weights[0].shape[1]) for i, name in enumerate(NAMES)}


def projections(found, layers=LAYERS, experts=EXPERTS):
    return [[{name: found[f"layers.{layer}.experts.{e}.{name}"] for name in NAMES} for e in range(experts)]
            for layer in range(layers)]


@pytest.fixture
def saved(tmp_path):
    """weights, and the entries of two shards that hold them."""
    weights, *_ = cases.problem(np.random.default_rng(0), layers=LAYERS, e=EXPERTS, d=D, f=F)
    named = sorted(tensors(weights).items())
    save_file(dict(named[::2]), tmp_path / "a.safetensors")
    save_file(dict(named[1::2]), tmp_path / "b.safetensors")
    return weights, entries(tmp_path / "a.safetensors") | entries(tmp_path / "b.safetensors")


def is_mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


def test_reads_shards_where_they_are(saved):
    weights, found = saved
    with ExpertStore(projections(found)) as store:
        assert (store.layers, store.experts, store.width, store.hidden, store.format) == (LAYERS, EXPERTS, D, F, "fp32")
        for layer in range(LAYERS):
            for e in range(EXPERTS):
                for i, name in enumerate(NAMES):
                    assert np.array_equal(store.decode(layer, e, name), weights[i][layer, e])


def test_costs_no_memory_of_its_own(tmp_path):
    """A 96 MB store adds less than a tenth of that to the process besides the page cache, also after it was used."""
    weights, x, idx, gate, _ = cases.problem(np.random.default_rng(0), layers=1, e=8, d=1024, f=1024)
    save_file(tensors(weights), tmp_path / "model.safetensors")
    found = entries(tmp_path / "model.safetensors")
    size = sum(w.nbytes for w in weights)
    del weights

    def anonymous():
        status = dict(line.split(":\t") for line in Path(f"/proc/{os.getpid()}/status").read_text().splitlines())
        return int(status["RssAnon"].split()[0]) * 1024
    with ExpertStore(projections(found, 1, 8)) as warm:  # the pool's scratch belongs to the process
        host_experts(warm, 0, x, idx, gate).block_until_ready()
    before = anonymous()
    with ExpertStore(projections(found, 1, 8)) as store:
        host_experts(store, 0, x, idx, gate).block_until_ready()
        assert anonymous() - before < size / 10
        maps = [m for m in psutil.Process().memory_maps() if m.path.endswith("model.safetensors")]
        assert maps and all(m.anonymous == 0 for m in maps)


def change(entry, **what):
    return Entry(**(entry.__dict__ | what))


@pytest.mark.parametrize("what, message", [
    (dict(dtype="I8"), r"layers.1.experts.2.up_proj: I8 experts are not supported"),
    (dict(dtype="BF16"), r"layers.1.experts.2.up_proj: BF16\[20, 24\], expected F32\[20, 24\]"),
    (dict(shape=(24, 20)), r"layers.1.experts.2.up_proj: F32\[24, 20\], expected F32\[20, 24\]"),
])
def test_misfits_are_named(saved, what, message):
    _, found = saved
    name = "layers.1.experts.2.up_proj"
    with pytest.raises(CheckpointError, match=message):
        ExpertStore(projections(found | {name: change(found[name], **what)}))


def test_a_place_outside_the_file_is_refused(saved):
    _, found = saved
    name = "layers.0.experts.0.gate_proj"
    size = found[name].path.stat().st_size
    for begin in (size - 8, size + 4096, -8, 2**62):
        with pytest.raises(Exception, match="buffer|offset|end") as error:
            ExpertStore(projections(found | {name: change(found[name], begin=begin)}))
        assert error.traceback and not is_mapped(found[name].path), "what the traceback holds is closed"


def test_nan_and_inf_are_named(tmp_path):
    weights, *_ = cases.problem(np.random.default_rng(0), layers=LAYERS, e=EXPERTS, d=D, f=F, dtype=cases.BF16)
    weights[2][1, 0, 3, 5] = np.nan
    weights[0][0, 1, -1, -1] = -np.inf
    save_file(tensors(weights), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        ExpertStore(projections(entries(tmp_path / "model.safetensors")))
    assert not is_mapped(tmp_path / "model.safetensors")
    named = str(error.value).splitlines()[1:]
    assert [n.strip() for n in named] == ["layers.0.experts.1.gate_proj", "layers.1.experts.0.down_proj"]


def test_nothing_to_store():
    with pytest.raises(CheckpointError, match="no routed experts"):
        ExpertStore([])


def test_arrays_must_agree():
    weights, *_ = cases.problem(np.random.default_rng(0))
    with pytest.raises(ValueError, match="down_proj: expected"):
        ExpertStore.from_arrays(weights[0], weights[1], weights[2][:, :-1])
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        ExpertStore.from_arrays(*(w.astype(np.float16) for w in weights))
