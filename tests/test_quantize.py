"""`kjax quantize`: what is written, that kjax and compressed-tensors read it, interruptions, damage and memory."""

import json
import os
import shutil
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import quantised_cases as cases
import weights_cases
from safetensors.numpy import save_file

import kjax
from kjax import quantize as module
from kjax.errors import CheckpointError, ConfigError
from kjax.models import ModelConfig
from kjax.offload.formats import FORMATS, decode
from kjax.quantize import quantize
from kjax.weights import encode, rewrite, stored, writer
from kjax.weights.safetensors import Checkpoint

BF16 = ml_dtypes.bfloat16
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 19))
# Rounding to 255 or 16 codes under a scale of the absmax, of normally distributed numbers: a step is 2 absmax / codes,
# the error step / sqrt(12); the absmax of 128 or 32 numbers is about 2.7 or 2.1 deviations.
ERROR = {"int8": (0.005, 0.009), "int4": (0.08, 0.11)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """bf16, sizes that leave partial groups, three shards, with a multi-token prediction layer and small files."""
    directory = tmp_path_factory.mktemp("whole") / "model"
    weights_cases.write(directory, cases.SIZES | {"vocab_size": 260}, "bfloat16")
    tensors = weights_cases.tensors_of(directory)
    tensors |= {name.replace("layers.1.", "layers.2."): array for name, array in tensors.items() if "layers.1." in name}
    tensors["model.layers.2.eh_proj.weight"] = np.ones((4, 8), BF16)
    weights_cases.rewrite(directory, tensors, shards=3)
    weights_cases.write_tokenizer(directory)
    (directory / "LICENSE").write_text("free")
    (directory / "old.bin").write_bytes(b"pickle")
    return directory


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("shape", [(256, 256), (128, 130), (257, 37), (1, 1)])
def test_encode_rounds_to_the_nearest_code(format_, shape):
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    weight.flat[:5] = 0, 1e-30, -3, 3, 0
    made = FORMATS[format_]
    codes, scales = encode.encode(format_, weight)
    assert codes.shape == made.shape(*shape) and scales.shape == made.scales_shape(*shape)
    got = np.empty(shape, np.float32)
    decode(format_, codes, scales, got)
    block = (made.block[0], made.block[1] or shape[1])
    step = cases.blockwise(scales.astype(np.float32), block, shape)
    if made.dtype == "F8_E4M3":
        step = np.maximum(np.abs(weight) / 8, step * 2**-9)  # three bits after the leading one
    # Half a step; scales and what codes mean are rounded to bf16, a relative 2^-8 each.
    assert (np.abs(got - weight) <= step * 0.5 + np.abs(weight) * 2**-7).all()
    # Numbers that have codes keep them, whatever their block's absmax would say.
    again, same = encode.encode(format_, got, kept=scales)
    np.testing.assert_array_equal(again.view(np.uint8), codes.view(np.uint8))
    np.testing.assert_array_equal(same, scales)


@pytest.mark.parametrize("format_", FORMATS)
def test_random_rounding_is_right_on_average(format_):
    base = np.random.default_rng(0).standard_normal((128, 128)).astype(np.float32)
    codes, scales = encode.encode(format_, base)
    decode(format_, codes, scales, base, exact=True)
    change = np.full_like(base, 0.002)  # far less than a step of most numbers
    def kept(random):
        got = np.empty_like(base)
        decode(format_, *encode.encode(format_, base + change, kept=scales, random=random), got, exact=True)
        return np.mean(got - base) / 0.002
    assert abs(kept(np.random.default_rng(1)) - 1) < 0.25  # 16,384 draws
    again = [encode.encode(format_, base + change, kept=scales, random=np.random.default_rng(2))[0] for _ in range(2)]
    np.testing.assert_array_equal(*(codes.view(np.uint8) for codes in again))
    untouched = encode.encode(format_, base, kept=scales, random=np.random.default_rng(3))[0]
    np.testing.assert_array_equal(untouched.view(np.uint8), codes.view(np.uint8))


def test_scales_that_are_powers_of_two():
    weight = np.zeros((128, 256), np.float32)
    weight[3, 4], weight[5, 200] = 448, 449
    codes, scales = encode.encode("fp8_block", weight, power_of_two=True)
    assert scales.tolist() == [[1, 2]] and codes[3, 4] == 448


@pytest.mark.parametrize("format_", ("int8", "int4"))
def test_from_bf16(whole, tmp_path, format_):
    made = quantize(whole, tmp_path / "q", format_, progress=False)
    assert all(ERROR[format_][0] < np.sqrt(error / size) < ERROR[format_][1]
               for error, size, _ in made.errors.sums.values()) and len(made.errors.sums) == 3
    assert made.after < made.before and "relative error" in str(made)
    names = {path.name for path in whole.iterdir()} - {"old.bin"} | {rewrite.MANIFEST}
    assert {path.name for path in (tmp_path / "q").iterdir()} == names
    before, after = (json.loads((directory / "config.json").read_text()) for directory in (whole, tmp_path / "q"))
    assert after.pop("quantization_config")["quant_method"] == "compressed-tensors" and after == before
    with Checkpoint(whole) as source, Checkpoint(tmp_path / "q") as result:
        scheme = ModelConfig.from_json(result.config_json).quantization
        found = stored.weights(result, scheme)
        assert found.keys() == set(source.names())  # of the layer behind the last one too
        for name, weight in found.items():
            shard = next(key for key, path in source.shards.items() if path == source.entry(name).path)
            got, wanted = (stored.numbers(*of, 0, of[1].shape[0]) for of in (
                (result, weight), (source, source.entry(name))))
            assert (weight.codes if ".experts." in name else weight).path.name == shard
            if ".experts." in name:
                assert weight.format == scheme.format and 0 < np.abs(got - wanted).max() < 0.1 * np.abs(wanted).max()
            else:
                np.testing.assert_array_equal(got, wanted)
    with kjax.load(whole, progress=False) as base, kjax.load(tmp_path / "q", progress=False) as model:
        expected, got = (np.asarray(m.logits(TOKENS)) for m in (base, model))
        assert model.store.format == scheme.format
    assert 0 < np.abs(got - expected).max() / np.abs(expected).max() < 20 * ERROR[format_][1]


@pytest.mark.parametrize("kind", ("fp8", "ue8m0", "channel"))
def test_from_fp8(tmp_path, kind):
    source = weights_cases.write(tmp_path / "whole", cases.SIZES)[0]
    fp8, meant, _, _ = cases.write(tmp_path, source, kind)
    quantize(fp8, tmp_path / "a", "int4", progress=False)
    quantize(meant, tmp_path / "b", "int4", progress=False)
    a, b = (weights_cases.tensors_of(tmp_path / name) for name in "ab")
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("format_", ("int8", "int4"))
def test_compressed_tensors_reads_it(tmp_path, format_):
    """The library that Kimi's layout comes from decodes our files to the numbers that our kernels multiply."""
    pytest.importorskip("compressed_tensors")
    torch = pytest.importorskip("torch")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    sizes = cases.SIZES | {"hidden_size": 256, "moe_intermediate_size": 128}
    source = weights_cases.write(tmp_path / "model", sizes, "bfloat16")[0]
    quantize(source, tmp_path / "q", format_, progress=False)
    with Checkpoint(tmp_path / "q") as result:
        settings = result.config_json["quantization_config"]
        QuantizationConfig.model_validate(settings)
        args = QuantizationArgs(**settings["config_groups"]["group_0"]["weights"])
        for name, weight in stored.weights(result, ModelConfig.from_json(result.config_json).quantization).items():
            if ".experts." not in name:
                continue
            made = module.SCHEMES[format_].made
            state = {"weight" + part: torch.from_numpy(np.ascontiguousarray(result.read(name + part).view(view))).view(
                dtype) for part, view, dtype in ((made.codes, np.int32 if made.shape else np.int8,
                                                 torch.int32 if made.shape else torch.int8),
                                                (made.scales, np.int16, torch.bfloat16))}
            if made.shape:
                state["weight_shape"] = torch.from_numpy(result.read(name + made.shape))
            compressor = BaseCompressor.get_value_from_registry(settings["format"])
            got = compressor.decompress(state, QuantizationScheme(targets=["Linear"], weights=args))["weight"]
            np.testing.assert_array_equal(got.float().numpy(), stored.numbers(result, weight, 0, weight.shape[0]))


def test_interrupted_and_gone_on_with(whole, tmp_path, monkeypatch, capfd):
    quantize(whole, tmp_path / "straight", "int4", progress=False)
    straight = contents(tmp_path / "straight")
    write_file, calls = rewrite.write_file, []

    def interrupted(path, parts, advance):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(path.name)
        return write_file(path, parts, advance)

    monkeypatch.setattr(rewrite, "write_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(whole, tmp_path / "q", "int4", progress=False)
    assert not (tmp_path / "q").exists() and len(calls) == 2
    partial = tmp_path / "q.partial"
    with pytest.raises(CheckpointError):
        Checkpoint(partial)  # nobody takes it for a model
    # One bit of a finished shard, and half a shard that was being written.
    damaged = partial / calls[0]
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    (partial / "model-00003-of-00003.safetensors.partial").write_bytes(b"half")
    before = (partial / calls[1]).stat().st_mtime_ns
    again = []
    monkeypatch.setattr(rewrite, "write_file",
                        lambda path, *rest: (again.append(path.name), write_file(path, *rest))[1])
    quantize(whole, tmp_path / "q", "int4", progress=False)
    assert calls[0] in again and calls[1] not in again and len(again) == 2
    assert f"{calls[0]}: missing or damaged, made again" in capfd.readouterr().out
    assert contents(tmp_path / "q") == straight and not partial.exists()
    assert (tmp_path / "q" / calls[1]).stat().st_mtime_ns == before


def test_what_is_not_mixed_or_overwritten(whole, tmp_path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(rewrite, "write_file", stopped)
    with pytest.raises(KeyboardInterrupt):
        quantize(whole, tmp_path / "q", "int4", progress=False)
    with pytest.raises(CheckpointError, match=r"q.partial: was begun with another 'format'; remove .*q.partial"):
        quantize(whole, tmp_path / "q", "int8", progress=False)
    copy = shutil.copytree(whole, tmp_path / "copy")
    with pytest.raises(CheckpointError, match="was begun with another 'source'"):
        quantize(copy, tmp_path / "q", "int4", progress=False)
    lock = os.open(tmp_path / "q.partial/.lock", os.O_RDWR)
    rewrite.fcntl.flock(lock, rewrite.fcntl.LOCK_EX)
    with pytest.raises(CheckpointError, match="another process is making it"):
        quantize(whole, tmp_path / "q", "int4", progress=False)
    os.close(lock)
    (tmp_path / "mine.partial").mkdir()
    (tmp_path / "mine.partial/notes.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="holds 'notes.txt' but no kjax_manifest.json"):
        quantize(whole, tmp_path / "mine", "int4", progress=False)
    for target in (whole, whole / "q"):
        with pytest.raises(CheckpointError, match="already exists|lies in the source"):
            quantize(whole, target, "int4", progress=False)
    monkeypatch.setattr(rewrite.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(CheckpointError, match="GB are to be written and 0.00 GB are free"):
        quantize(whole, tmp_path / "full", "int4", progress=False)


def test_a_full_disk_keeps_what_is_finished(whole, tmp_path, monkeypatch):
    put, written = writer._put, []
    total = os.path.getsize(whole / "model-00001-of-00003.safetensors")

    def full(handle, view, offset):
        written.append(len(view))
        if sum(written) > total:
            raise OSError(28, "No space left on device")
        return put(handle, view, offset)

    monkeypatch.setattr(writer, "_put", full)
    with pytest.raises(CheckpointError, match=r"q.partial: cannot be written \(No space left on device\)"):
        quantize(whole, tmp_path / "q", "int8", progress=False)
    manifest = json.loads((tmp_path / "q.partial" / rewrite.MANIFEST).read_text())
    assert 0 < len(manifest["shards"]) < 3
    assert not [path for path in (tmp_path / "q.partial").iterdir() if path.name.endswith(".safetensors.partial")]
    monkeypatch.undo()
    quantize(whole, tmp_path / "q", "int8", progress=False)


def test_what_cannot_be_quantised(whole, tmp_path):
    with pytest.raises(ConfigError, match="int8 or int4"):
        quantize(whole, tmp_path / "q", "int3")
    quantize(whole, tmp_path / "q", "int4", progress=False)
    with pytest.raises(CheckpointError, match=r"quantised already \(int4_group32\)"):
        quantize(tmp_path / "q", tmp_path / "again", "int8")
    source = weights_cases.write(tmp_path / "w32", cases.SIZES)[0]
    fp8 = cases.write(tmp_path, source, "fp8")[0]
    tensors = weights_cases.tensors_of(fp8)
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"]
    weights_cases.rewrite(fp8, tensors)
    with pytest.raises(CheckpointError, match=r"experts.3.up_proj.weight' has no .*weight_scale_inv"):
        quantize(fp8, tmp_path / "no", "int8")
    tensors = weights_cases.tensors_of(source)
    tensors["model.layers.1.mlp.experts.3.up_proj.weight"][0, 0] = np.nan
    weights_cases.rewrite(source, tensors)
    with pytest.raises(CheckpointError, match=r"experts.3.up_proj.weight' holds NaN or Inf"):
        quantize(source, tmp_path / "no", "int8", progress=False)


def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    """200 MB of experts and a table of 100 MB, with far less memory than either."""
    directory = tmp_path / "large"
    directory.mkdir()
    weight = np.random.default_rng(0).standard_normal((1024, 4096), np.float32).astype(BF16)
    tensors = {f"model.layers.1.mlp.experts.{e}.up_proj.weight": weight for e in range(24)}
    save_file(tensors | {"model.embed_tokens.weight": np.tile(weight, (12, 1))}, directory / "model.safetensors")
    del tensors, weight
    (directory / "config.json").write_text(json.dumps(weights_cases.V3))
    tracemalloc.start()  # numpy tells it of every array
    try:
        quantize(directory, tmp_path / "q", "int8", progress=False)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # WORKERS bands of 2 M numbers, as fp32 with some six temporaries each.
    assert peak < writer.WORKERS * 7 * 4 * stored.NUMBERS, f"{peak / 1e6:.0f} MB"
