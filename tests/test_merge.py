"""`kjax merge`: every format merged in its own layout, what is copied, interruptions, small changes, bad input."""

import errno
import json
import os
import tracemalloc

import adapter_cases as cases
import ml_dtypes
import numpy as np
import pytest
import quantised_cases
import weights_cases
from safetensors.numpy import save_file

import kjax
from kjax import adapters, lora
from kjax.cli import main
from kjax.errors import CheckpointError, ConfigError
from kjax.merge import merge
from kjax.models import ModelConfig, linears
from kjax.weights import rewrite, stored, writer
from kjax.weights.safetensors import Checkpoint

KINDS = ("whole", "fp8", "ue8m0", "channel", "channel_bf16", "int8", "int4")
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 19))
EVERY = ("attention", "shared", "dense", "experts")
CONTENT = quantised_cases.SIZES | {"vocab_size": 260}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """fp32, with a multi-token prediction layer that has the names of a decoder layer."""
    directory = tmp_path_factory.mktemp("whole") / "model"
    weights_cases.write(directory, CONTENT)
    tensors = weights_cases.tensors_of(directory)
    weights_cases.rewrite(directory, tensors | {name.replace("layers.1.", "layers.2."): array
                                                for name, array in tensors.items() if "layers.1." in name}, shards=3)
    weights_cases.write_tokenizer(directory)
    return directory


@pytest.fixture(scope="module", params=KINDS)
def base(request, whole, tmp_path_factory):
    """A base in each format, in three shards, scales apart from what they scale."""
    if request.param == "whole":
        return whole
    return quantised_cases.write(tmp_path_factory.mktemp("base"), whole, request.param)[0]


def write_adapter(directory, base, groups=EVERY, size=0.1, **kwargs):
    spec = cases.spec_of(CONTENT, groups)
    found = linears(ModelConfig.from_json(CONTENT))
    tree = cases.random_tree(spec, found, size=size)
    with Checkpoint(base) as checkpoint:
        adapters.save(directory, tree, spec, found, base=adapters.identify(checkpoint), **kwargs)
    return directory


def numbers(directory) -> dict[str, np.ndarray]:
    with Checkpoint(directory) as checkpoint:
        quantization = ModelConfig.from_json(checkpoint.config_json).quantization
        return {name: stored.numbers(checkpoint, weight, 0, weight.shape[0], exact=True)
                for name, weight in stored.weights(checkpoint, quantization).items() if len(weight.shape) == 2}


def changes(adapter) -> dict[str, np.ndarray]:
    """scale * B A by the weight's name."""
    found = {}
    with adapters.opened(adapter, linears(ModelConfig.from_json(CONTENT))) as opened:
        for path, made in opened.spec.entries:
            for index, module in adapters.layouts.modules(path, opened.linears).items():
                a, b = (opened.matrix(path, matrix, index) for matrix in ("lora_A", "lora_B"))
                found[f"{module}.weight"] = made.scale * (b.astype(np.float64) @ a)
    return found


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("rounding", ("nearest", "stochastic"))
def test_merged_in_its_own_format(base, tmp_path, rounding):
    adapter = write_adapter(tmp_path / "a", base)
    made = merge(base, adapter, tmp_path / "m", rounding=rounding, progress=False)
    before, after = contents(base), contents(tmp_path / "m")
    assert after.keys() == before.keys() | {rewrite.MANIFEST}
    assert all(after[name] == before[name] for name in before if not name.endswith((".safetensors", "index.json")))
    wanted = changes(adapter)
    assert made.weights == len(wanted) and set(made.effect.sums) == set(EVERY)
    with Checkpoint(base) as old, Checkpoint(tmp_path / "m") as new:
        for name in old.names():
            a, b = old.entry(name), new.entry(name)
            assert (a.path.name, a.dtype, a.shape) == (b.path.name, b.dtype, b.shape)
            changed = name.split(".weight")[0] + ".weight" in wanted and not name.endswith("_shape")
            same = np.array_equal(old.read(name).view(np.uint8), new.read(name).view(np.uint8))
            assert same or changed, name  # the layer behind the last one among others
    old, new = numbers(base), numbers(tmp_path / "m")
    steps = {"fp8": 1 / 8, "ue8m0": 1 / 8, "channel": 1 / 8, "channel_bf16": 1 / 8, "int8": 1 / 126, "int4": 1 / 7}
    step = steps.get(base.name.removesuffix("-stored"), 2**-20)
    for name, change in wanted.items():
        target = old[name] + change
        largest = np.abs(target).max()  # of a block at most: a step there is at most this part of it
        assert np.abs(new[name] - target).max() <= step * largest * (0.55 if rounding == "nearest" else 1.01)
    assert all(0.9 < made.effect.kept(group) < 1.1 for group in EVERY)
    with kjax.load(tmp_path / "m", dtype="float32", progress=False) as merged:
        assert np.isfinite(merged.logits(TOKENS)).all()


def test_changes_below_half_a_step_are_kept_on_average(whole, tmp_path):
    for kind in ("fp8", "int4"):
        base = quantised_cases.write(tmp_path, whole, kind)[0]
        adapter = write_adapter(tmp_path / f"{kind}-a", base, ("experts",), size=1e-3)
        kept = {}
        for rounding in ("nearest", "stochastic"):
            made = merge(base, adapter, tmp_path / f"{kind}-{rounding}", rounding=rounding, progress=False)
            kept[rounding] = made.effect.kept("experts")
        # 196,608 numbers whose noise is some ten times the change: the mean is good to a few per cent.
        assert kept["nearest"] < 0.3 and 0.9 < kept["stochastic"] < 1.1, (kind, kept)
        assert "% of the adapter's change kept" in str(made)


def test_logits_are_the_adapters(whole, tmp_path):
    adapter = write_adapter(tmp_path / "a", whole, ("attention", "shared", "dense"), size=0.3)
    merge(whole, adapter, tmp_path / "m", progress=False)

    def logits(directory, adapter=None):
        with kjax.load(directory, adapter=adapter, dtype="float32", progress=False) as model:
            return np.asarray(model.logits(TOKENS))
    expected, got = logits(whole, adapter), logits(tmp_path / "m")
    error, effect = (np.linalg.norm(of - expected) / np.linalg.norm(expected) for of in (got, logits(whole)))
    assert error <= 1e-5 and effect > 0.5


def test_interrupted_and_gone_on_with(whole, tmp_path, monkeypatch):
    base = quantised_cases.write(tmp_path, whole, "fp8")[0]
    adapter = write_adapter(tmp_path / "a", base)
    merge(base, adapter, tmp_path / "straight", progress=False)
    write_file = rewrite.write_file

    def interrupted(path, parts, advance):
        if "00002" in path.name:
            raise KeyboardInterrupt
        return write_file(path, parts, advance)

    monkeypatch.setattr(rewrite, "write_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge(base, adapter, tmp_path / "m", progress=False)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="was begun with another 'rounding'"):
        merge(base, adapter, tmp_path / "m", rounding="nearest", progress=False)
    other = write_adapter(tmp_path / "b", base, size=0.2)
    with pytest.raises(CheckpointError, match="was begun with another 'adapter'"):
        merge(base, other, tmp_path / "m", progress=False)
    merge(base, adapter, tmp_path / "m", progress=False)
    assert contents(tmp_path / "m") == contents(tmp_path / "straight")


def test_only_a_held_lock_is_another_process(whole, tmp_path, monkeypatch):
    adapter = write_adapter(tmp_path / "a", whole, ("attention",))
    for number, message in ((errno.EWOULDBLOCK, "another process is making it"),
                            (errno.ENOLCK, "cannot be locked .No locks available.*has no locks; give a target on")):
        def refuse(*_, number=number):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(rewrite.fcntl, "flock", refuse)
        with pytest.raises(CheckpointError, match=message):
            merge(whole, adapter, tmp_path / "m", progress=False)


def test_a_multimodal_checkpoint(whole, tmp_path):
    """Kimi-K2.5 has its text model under language_model, and so have the keys of its adapters."""
    directory = tmp_path / "k25"
    directory.mkdir()
    tensors = {f"language_model.{name}": array for name, array in weights_cases.tensors_of(whole).items()
               if "layers.2." not in name}
    tensors["vision_tower.patch.weight"] = np.ones((3, 4), np.float32)
    text = CONTENT | {"model_type": "kimi_k2"}
    (directory / "config.json").write_text(json.dumps({"model_type": "kimi_k25", "text_config": text}))
    save_file(tensors, directory / "model.safetensors")
    adapter = write_adapter(tmp_path / "a", directory)
    with kjax.weights.safetensors.Checkpoint(directory) as checkpoint:
        assert adapters.identify(checkpoint).prefix == "language_model."
    with open(adapter / "adapter_model.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert "base_model.model.language_model.model.layers.1.mlp.experts.7.up_proj.lora_A.weight" in header
    assert merge(directory, adapter, tmp_path / "m", progress=False).weights == len(changes(adapter))
    old, new = weights_cases.tensors_of(directory), weights_cases.tensors_of(tmp_path / "m")
    for name, change in changes(adapter).items():
        name = f"language_model.{name}"
        np.testing.assert_allclose(new[name], old[name] + change, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(new["vision_tower.patch.weight"], old["vision_tower.patch.weight"])


def test_what_cannot_be_merged(whole, tmp_path):
    adapter = write_adapter(tmp_path / "a", whole)
    with pytest.raises(ConfigError, match="stochastic or nearest"):
        merge(whole, adapter, tmp_path / "m", rounding="up")
    with pytest.raises(CheckpointError, match="already exists"):
        merge(whole, adapter, whole)
    other = tmp_path / "other"
    weights_cases.write(other, CONTENT, seed=1)
    with pytest.raises(CheckpointError, match="trained on another base model"):
        merge(other, adapter, tmp_path / "m")
    (adapter / adapters.RECORD).unlink()
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors = weights_cases.tensors_of(other)
    weights_cases.rewrite(other, {key: array for key, array in tensors.items() if key != name})
    with pytest.raises(CheckpointError, match=f"no '{name}', which the adapter changes"):
        merge(other, adapter, tmp_path / "m")
    weights_cases.rewrite(other, tensors | {name: tensors[name][:-1]})
    with pytest.raises(CheckpointError, match=rf"'{name}' is \[135, 160\], config.json and the adapter need"):
        merge(other, adapter, tmp_path / "m")
    weights_cases.rewrite(other, tensors | {name: np.full_like(tensors[name], 65500).astype(np.float16)})
    with pytest.raises(CheckpointError, match=f"'{name}': with the adapter it has numbers beyond the range of F16"):
        big = write_adapter(tmp_path / "big", other, size=1e5)
        merge(other, big, tmp_path / "m", progress=False)
    assert not (tmp_path / "m").exists()


def test_memory_does_not_grow_with_a_weight(tmp_path):
    """An FP8 projection of 67 M numbers, 268 MB as fp32."""
    content = weights_cases.V3 | {"num_hidden_layers": 1, "num_attention_heads": 64, "num_key_value_heads": 64,
                                  "v_head_dim": 128, "hidden_size": 8192, "quantization_config": quantised_cases.FP8}
    directory, name = tmp_path / "large", "model.layers.0.self_attn.o_proj.weight"
    directory.mkdir()
    codes = np.random.default_rng(0).integers(0, 120, (8192, 8192), np.uint8).view(ml_dtypes.float8_e4m3fn)
    save_file({name: codes, f"{name}_scale_inv": np.ones((64, 64), np.float32)}, directory / "model.safetensors")
    del codes
    (directory / "config.json").write_text(json.dumps(content))
    found = linears(ModelConfig.from_json(content))
    spec = lora.LoraSpec((("dense_layers/self_attn/o_proj", lora.Adapter(8, 8.0)),))
    adapters.save(tmp_path / "a", cases.random_tree(spec, found), spec, found, base=adapters.Base("large"))
    tracemalloc.start()  # numpy tells it of every array
    try:
        made = merge(directory, tmp_path / "a", tmp_path / "m", progress=False)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 0.5 < made.effect.kept("attention") < 1.5
    # A band of 2 M numbers as fp32 with some twelve temporaries.
    assert peak < 13 * 4 * stored.NUMBERS, f"{peak / 1e6:.0f} MB"
    assert writer.WORKERS * 13 * 4 * stored.NUMBERS < 4e9


def test_the_command_line(whole, tmp_path, capsys):
    adapter = write_adapter(tmp_path / "a", whole)
    for verb, *options in (("export", "--adapter", adapter, "--layout", "fused"), ("merge", "--adapter", adapter),
                           ("quantize", "--format", "int8")):
        target = tmp_path / verb
        assert main([verb, "--model", str(whole), "--out", str(target), *map(str, options)]) == 0
        assert str(target) in capsys.readouterr().out and target.is_dir()
        assert main([verb, "--model", str(whole), "--out", str(target), *map(str, options)]) == 2
        assert "already exists" in capsys.readouterr().err
    assert main(["merge", "--model", str(whole), "--out", str(tmp_path / "no")]) == 2
    assert "--adapter DIR" in capsys.readouterr().err
