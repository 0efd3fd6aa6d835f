"""Saved states: whole or absent, checked file by file, and what differs between one and a run."""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kjax import checkpoint, config, step
from kjax.errors import RunError
from kjax.identity import Identity, differences
from kjax.lora import Adapter, LoraSpec
from kjax.optimizer import optimizer

CONFIG = config.Config(model=config.Model(directory="base"), data=config.Data(dataset="rows.jsonl"),
                       train=config.Train(run_dir="run"))
SPEC = LoraSpec((("moe_layers/self_attn/q_proj", Adapter(2, 4.0)),))
IDENTITY = Identity.of(CONFIG, "b" * 64, "d" * 64, SPEC)


def make_state(number=3, seed=0, rank=2):
    key = jax.random.key(seed)
    adapter = {"lora_A": jax.random.normal(key, (2, rank, 5)), "lora_B": jnp.ones((2, 5, rank))}
    tree = {"moe_layers": {"q_proj": adapter}}
    state = step.initial_state(tree, optimizer(CONFIG.optimizer, 10))
    return state._replace(step=jnp.int32(number))


def write_adapter(directory):
    directory.mkdir()
    (directory / "adapter_model.safetensors").write_bytes(b"weights")


@pytest.fixture
def checkpoints(tmp_path):
    return checkpoint.Checkpoints(tmp_path / "checkpoints", keep=2)


def save(checkpoints, number, seed=0):
    return checkpoints.save(number, make_state(number, seed), write_adapter, IDENTITY)


def test_restores_the_same_bits_and_structure(checkpoints):
    save(checkpoints, 3, seed=7)
    number, manifest = checkpoints.latest()
    like = make_state(0, seed=1)
    restored = checkpoints.restore(number, like)
    assert jax.tree.structure(restored) == jax.tree.structure(like) and number == 3
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(make_state(3, seed=7)), strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b)
    assert manifest["base"] == "b" * 64 and manifest["versions"]["jax"] == jax.__version__
    assert "adapter/adapter_model.safetensors" in manifest["files"]


def test_keeps_the_newest(checkpoints):
    for number in (1, 2, 10, 9 + 2):
        save(checkpoints, number)
    assert checkpoints.steps() == [10, 11]
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == ["10", "11"]


def files_of(checkpoints, number):
    return sorted(path for path in checkpoints.path(number).rglob("*") if path.is_file())


def test_a_flipped_bit_in_any_file_is_found_and_named(checkpoints):
    save(checkpoints, 1)
    save(checkpoints, 2)
    for path in files_of(checkpoints, 2):
        good = path.read_bytes()
        bad = bytearray(good)
        bad[len(bad) // 2] ^= 1
        path.write_bytes(bad)
        with pytest.raises(RunError) as caught:
            checkpoints.latest()
        assert str(path) in str(caught.value)
        assert "the state of step 1 is valid: remove" in str(caught.value)
        path.write_bytes(good)
    assert checkpoints.latest()[0] == 2


def test_missing_and_cut_files_are_named(checkpoints):
    save(checkpoints, 4)
    state = max((checkpoints.path(4) / "state" / "d").iterdir(), key=lambda path: path.stat().st_size)
    good = state.read_bytes()
    state.write_bytes(good[:-1])
    with pytest.raises(RunError, match=f"{state.name}: has {len(good) - 1} bytes.*start over with --overwrite"):
        checkpoints.latest()
    state.unlink()
    with pytest.raises(RunError, match=f"{state.name}: missing"):
        checkpoints.latest()


def test_a_manifest_cannot_name_files_elsewhere(checkpoints):
    save(checkpoints, 4)
    path = checkpoints.path(4) / checkpoint.MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    manifest["files"]["../../secret"] = {"size": 1, "sha256": ""}
    path.write_text(json.dumps({**manifest, "sha256": checkpoint.digest(manifest)}))
    with pytest.raises(RunError, match="outside"):
        checkpoints.latest()


def test_a_save_cut_short_is_not_a_state(checkpoints):
    save(checkpoints, 1)
    save(checkpoints, 2)
    (checkpoints.directory / ".3.partial" / "state").mkdir(parents=True)
    (checkpoints.path(2) / checkpoint.MANIFEST).unlink()  # a removal cut short
    assert checkpoints.steps() == [1] and checkpoints.latest()[0] == 1
    assert [path.name for path in checkpoints.unfinished()] == [".3.partial", "2"]
    save(checkpoints, 5)
    assert checkpoints.unfinished() == [] and checkpoints.steps() == [1, 5]


def test_a_state_of_another_shape_does_not_fit(checkpoints):
    save(checkpoints, 1)
    with pytest.raises(RunError, match="does not fit this run's adapter"):
        checkpoints.restore(1, make_state(rank=3))


def test_a_failing_adapter_leaves_the_state_before(checkpoints):
    save(checkpoints, 1)

    def fail(directory):
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match="No space left.*step 1 before it is intact") as caught:
        checkpoints.save(2, make_state(2), fail, IDENTITY)
    assert str(checkpoints.directory) in str(caught.value)
    assert checkpoints.latest()[0] == 1 and checkpoints.unfinished() == []


PROGRAM = """
    import os, resource, signal, sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    import test_checkpoint as t
    from kjax import checkpoint, adapters
    checkpoints = checkpoint.Checkpoints(Path({directory!r}), keep=2)
    t.save(checkpoints, 1)
"""


def run_program(tmp_path, body):
    program = textwrap.dedent(PROGRAM).format(tests=os.path.dirname(__file__), directory=str(tmp_path / "checkpoints"))
    return subprocess.run([sys.executable, "-c", program + textwrap.dedent(body)], capture_output=True, text=True,
                          timeout=120)


def test_a_full_disk_is_an_error_that_names_the_directory(tmp_path, checkpoints):
    done = run_program(tmp_path, """
        state = t.make_state(2, rank=5000)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        try:
            checkpoints.save(2, state, t.write_adapter, t.IDENTITY)
        except t.RunError as error:
            print("RunError:", error)
    """)
    assert "RunError:" in done.stdout, done.stderr
    assert str(checkpoints.directory) in done.stdout and "File too large" in done.stdout
    assert checkpoints.latest()[0] == 1 and checkpoints.unfinished() == []


@pytest.mark.parametrize("moment", ["_write_manifest", "_sync", "write_adapter"])
def test_a_kill_during_a_save_leaves_the_state_before(tmp_path, checkpoints, moment):
    done = run_program(tmp_path, f"""
        def die(*_):
            os.kill(os.getpid(), signal.SIGKILL)
        setattr(t if {moment!r} == "write_adapter" else checkpoint, {moment!r}, die)
        t.save(checkpoints, 2)
    """)
    assert done.returncode == -9, done.stderr
    assert checkpoints.latest()[0] == 1
    assert [path.name for path in checkpoints.unfinished()] == [".2.partial"]
    save(checkpoints, 2)
    assert checkpoints.latest()[0] == 2 and checkpoints.unfinished() == []


def test_differences_are_listed_and_weighed(checkpoints):
    save(checkpoints, 1)
    manifest = checkpoints.latest()[1]
    assert differences(manifest, IDENTITY) == ([], [])
    changed = dataclasses.replace(
        CONFIG, train=dataclasses.replace(CONFIG.train, run_dir="elsewhere", save_steps=5, seed=1),
        lora=dataclasses.replace(CONFIG.lora, targets=("shared",)))
    said, binding = differences(manifest, Identity.of(changed, "b" * 64, "e" * 64, SPEC))
    assert said == ["lora.targets: ['attention'] -> ['shared']", "train.save_steps: None -> 5", "train.seed: 0 -> 1",
                    "the dataset's tokens: dddddddddddd -> eeeeeeeeeeee (SHA-256)"]
    assert binding == [said[0], said[2], said[3]]


def test_a_scale_that_the_settings_do_not_tell_is_binding(checkpoints):
    """Of an adapter that a run goes on from, which may be replaced meanwhile."""
    save(checkpoints, 1)
    manifest = checkpoints.latest()[1]
    other = LoraSpec(((SPEC.paths[0], Adapter(2, 8.0)),))
    said, binding = differences(manifest, Identity.of(CONFIG, "b" * 64, "d" * 64, other))
    assert said == binding == ["the scale of the adapter of moe_layers/self_attn/q_proj: 2.0 -> 4.0"]
    del manifest["adapter"]  # of a state that was saved before they were recorded
    assert differences(manifest, Identity.of(CONFIG, "b" * 64, "d" * 64, other)) == ([], [])
