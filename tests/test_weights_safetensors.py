"""The checkpoint reader: what is read is what the safetensors library wrote, and every damage has its message."""

import json
import os
import random
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from kjax.errors import CheckpointError
from kjax.weights.files import parse_json
from kjax.weights.safetensors import DTYPES, INDEX, SINGLE, Checkpoint, TensorEntry


def container(header, data: bytes) -> bytes:
    """A safetensors file from a header (an object, or raw bytes) and the tensors' bytes."""
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + data


def item(dtype="F32", shape=(2,), begin=0, end=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.fixture
def sharded(tmp_path):
    """Three shards with two tensors each, and their index."""
    weight_map = {}
    for shard in range(3):
        file = f"model-{shard + 1:05}-of-00003.safetensors"
        save_file({f"t{shard}.{part}": np.full((2, 3), shard, np.float32) for part in "ab"}, tmp_path / file)
        weight_map |= {f"t{shard}.{part}": file for part in "ab"}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tmp_path


def set_map(directory, **changes):
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"].update(changes)
    (directory / INDEX).write_text(json.dumps(index))


def test_reads_what_the_library_wrote(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        code: rng.integers(0, 2, (3, 5)).astype(dtype)
        for code, dtype in DTYPES.items()
        if code in ("BOOL", "U8", "I8", "I16", "I32", "I64", "F16", "F32", "F64")
    }
    arrays |= {"scalar": np.array(7, np.float32), "empty": np.zeros((0, 4), np.float32)}
    save_file(arrays, tmp_path / SINGLE, metadata={"format": "pt"})
    with Checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.names()) == set(arrays)
        for name, array in arrays.items():
            found = checkpoint.read(name)
            assert found.dtype == array.dtype and found.shape == array.shape
            np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("code", ["BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "U16", "U32", "U64"])
def test_reads_dtypes_that_numpy_lacks(tmp_path, code):
    dtype = np.dtype(DTYPES[code])
    values = np.array([1, 2, 4], dtype)
    (tmp_path / SINGLE).write_bytes(container({"x": item(code, (3,), 0, values.nbytes)}, values.tobytes()))
    found = Checkpoint(tmp_path).read("x")
    assert found.dtype == dtype
    np.testing.assert_array_equal(found.astype(np.float32), [1, 2, 4])


def test_entry_gives_the_place_in_the_file(tmp_path):
    values = np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3)
    (tmp_path / SINGLE).write_bytes(
        container({"a": item("U8", (3,), 0, 3), "b": item("BF16", (2, 3), 3, 15)}, b"abc" + values.tobytes())
    )
    entry = Checkpoint(tmp_path).entry("b")
    raw = (tmp_path / SINGLE).read_bytes()
    assert entry == TensorEntry("b", tmp_path / SINGLE, "BF16", (2, 3), len(raw) - 12, len(raw))
    assert raw[entry.begin : entry.end] == values.tobytes()


def test_parts_of_a_tensor(tmp_path):
    save_file({"x": np.arange(12, dtype=np.float32).reshape(4, 3)}, tmp_path / SINGLE)
    checkpoint = Checkpoint(tmp_path)
    rows = np.empty((2, 3), np.float32)
    checkpoint.read_bytes(checkpoint.entry("x"), rows, offset=12)
    np.testing.assert_array_equal(rows, [[3, 4, 5], [6, 7, 8]])
    with pytest.raises(ValueError, match="reach past the tensor"):
        checkpoint.read_bytes(checkpoint.entry("x"), rows, offset=36)


def test_shards_are_opened_once_and_closed(sharded, monkeypatch):
    opened, plain = [], os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: opened.append(os.path.basename(path)) or plain(path, *rest))
    before = len(os.listdir("/proc/self/fd"))
    with Checkpoint(sharded) as checkpoint:
        for name in list(checkpoint.names()) * 2:
            np.testing.assert_array_equal(checkpoint.read(name), np.full((2, 3), int(name[1]), np.float32))
        assert sorted(opened) == sorted([INDEX, *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))])
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(CheckpointError, match="closed"):
        checkpoint.read("t0.a")


def test_files_are_closed_when_a_shard_is_bad(sharded):
    (sharded / "model-00003-of-00003.safetensors").write_bytes(b"short")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CheckpointError, match="5 bytes are no safetensors file") as caught:
        Checkpoint(sharded)
    assert len(os.listdir("/proc/self/fd")) == before, caught  # whose traceback keeps the object itself alive


F32x2 = bytes(8)
DEEP = b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
DAMAGED = {
    "empty file": (b"", "0 bytes are no safetensors file"),
    "text": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    "header past the end": (struct.pack("<Q", 1000) + b"{}", "header ends at byte 1008, past .* at 10"),
    "absurd header": (struct.pack("<Q", 1 << 62) + b"{}", "header of 4611686018427387904 bytes"),
    "not json": (container(b"{nonsense", b""), "header: not valid JSON"),
    "not utf-8": (container(b'{"\xff": 1}', b""), "header: not valid JSON"),
    "nan": (container(b'{"x": NaN}', b""), "header: not valid JSON"),
    "list": (container(b"[]", b""), "header: expected a JSON object, found list"),
    "deep": (container(DEEP, b""), "header: not valid JSON"),
    "duplicate tensor": (
        container(b'{"x": %s, "x": %s}' % ((json.dumps(item()).encode(),) * 2), F32x2), "key 'x' appears twice"),
    "duplicate key": (
        container(b'{"x": {"dtype": "F32", "dtype": "U8", "shape": [2], "data_offsets": [0, 8]}}', F32x2),
        "key 'dtype' appears twice"),
    "metadata": (container({"__metadata__": 3}, b""), "__metadata__ is not an object"),
    "no dtype": (container({"x": {"shape": [2], "data_offsets": [0, 8]}}, F32x2), "needs dtype, shape and"),
    "not an object": (container({"x": 5}, F32x2), "tensor 'x': needs dtype"),
    "unknown dtype": (container({"x": item("F12")}, F32x2), "tensor 'x': unknown dtype 'F12'"),
    "dtype no text": (container({"x": item(["F32"])}, F32x2), "unknown dtype"),
    "negative size": (container({"x": item(shape=(-2,))}, F32x2), "shape .* is not a list of sizes"),
    "fraction": (container({"x": item(shape=(2.0,))}, F32x2), "shape .* is not a list of sizes"),
    "boolean": (container({"x": item(shape=(True,))}, F32x2), "shape .* is not a list of sizes"),
    "huge shape": (container({"x": item(shape=(1 << 40, 1 << 40, 0), end=0)}, b""), "larger than any memory"),
    "many dimensions": (container({"x": item(shape=(1,) * 40, end=4)}, bytes(4)), "is not a list of sizes"),
    "offsets": (container({"x": item() | {"data_offsets": [0]}}, F32x2), "are not two integers"),
    "negative offset": (container({"x": item(begin=-8, end=0)}, F32x2), "negative or reversed"),
    "reversed": (container({"x": item(begin=8, end=0)}, F32x2), "negative or reversed"),
    "truncated": (container({"x": item()}, bytes(7)), "tensor 'x': its bytes end at .* the shard is truncated"),
    "out of range": (container({"x": item(begin=1 << 60, end=(1 << 60) + 8)}, F32x2), "past the end of the file"),
    "wrong size": (container({"x": item(shape=(3,))}, F32x2), r"F32 \[3\] takes 12 bytes, data_offsets span 8"),
    "overlap": (
        container({"x": item(), "y": item(begin=4, end=12)}, bytes(12)), "tensors 'x' and 'y' overlap"),
    "same bytes": (container({"x": item(), "y": item()}, F32x2), "tensors 'x' and 'y' overlap"),
    "gap": (container({"x": item(begin=4, end=12)}, bytes(12)), "4 bytes before tensor 'x' belong to no tensor"),
    "tail": (container({"x": item()}, bytes(20)), "12 bytes after the last tensor"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_file_is_refused_by_name(tmp_path, damage):
    content, message = DAMAGED[damage]
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint(tmp_path)
    assert str(tmp_path / SINGLE) in str(caught.value)
    assert len(str(caught.value)) < 2000


def test_names_cannot_write_to_the_terminal(tmp_path):
    (tmp_path / SINGLE).write_bytes(container({"\x1b[2J\ud800" + "x" * 10_000: item("F12")}, F32x2))
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(tmp_path)
    str(caught.value).encode("utf-8")
    assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 1000


def test_mutated_headers_give_checkpoint_errors_only(tmp_path):
    """A bounded fuzz of the reader: any byte string is read or refused with a CheckpointError."""
    rng = random.Random(0)
    good = container(
        {"__metadata__": {"format": "pt"}, "a.0.weight": item("BF16", (2, 3), 0, 12), "b": item("F32", (1,), 12, 16)},
        bytes(range(16)),
    )
    tokens = [b"-1", b"1e9", b"null", b"[]", b"{}", b'"F64"', b"99999999999999999999", b"\\ud800", b"\x00", b"0", b"]"]
    path, outcomes = tmp_path / SINGLE, {True: 0, False: 0}
    for _ in range(1500):
        data = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            where = rng.randrange(len(data))
            kind = rng.randrange(4)
            if kind == 0:
                data[where] = rng.randrange(256)
            elif kind == 1:
                data[where : where + rng.randint(1, 4)] = rng.choice(tokens)
            elif kind == 2:
                del data[where : where + rng.randint(1, 8)]
                data = data or bytearray(b"\0")
            else:
                data[where:where] = data[rng.randrange(len(data)) :][: rng.randint(1, 30)]
        if rng.random() < 0.5 and len(data) > 24:  # half of the time with a length that fits, to get beyond it
            data[:8] = struct.pack("<Q", max(len(data) - 24, 0))
        path.write_bytes(data)
        try:
            with Checkpoint(tmp_path) as checkpoint:
                for name in checkpoint.names():
                    entry = checkpoint.entry(name)
                    assert 0 <= entry.begin <= entry.end <= len(data)
                    assert checkpoint.read(name).shape == entry.shape
            outcomes[True] += 1
        except CheckpointError as error:
            str(error).encode("utf-8")
            outcomes[False] += 1
    assert min(outcomes.values()) > 20, outcomes


def test_missing_shards_are_all_named(sharded):
    for shard in (1, 3):
        (sharded / f"model-0000{shard}-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="2 of 3 shards missing: 'model-00001-of-00003.*model-00003-of-00003"):
        Checkpoint(sharded)


def test_truncated_shard_is_named(sharded):
    path = sharded / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="model-00002-of-00003.*tensor 't1.b'.*truncated"):
        Checkpoint(sharded)


def test_shard_that_shrinks_while_it_is_read(sharded):
    checkpoint = Checkpoint(sharded)
    os.truncate(sharded / "model-00002-of-00003.safetensors", 100)
    with pytest.raises(CheckpointError, match="t1.b.*became shorter"):
        checkpoint.read("t1.b")


def test_tensor_in_two_shards(sharded):
    save_file({"t0.a": np.zeros(1, np.float32), "t1.a": np.zeros(1), "t1.b": np.zeros(1)},
              sharded / "model-00002-of-00003.safetensors")
    with pytest.raises(CheckpointError, match="'t0.a' is in two shards, 'model-00001-of.*' and 'model-00002-of"):
        Checkpoint(sharded)


@pytest.mark.parametrize("indexed", [False, True])
def test_another_spelling_of_the_text_layers(tmp_path, indexed):
    """What transformers 5.23 saves of Kimi-K2.5; the vision part has blocks of its own."""
    vision, file = "vision_tower.encoder.blocks.0.w", "a.safetensors" if indexed else "model.safetensors"
    stored = {"language_model.model.blocks.3.mlp.blocks.w": np.arange(3.0), vision: np.zeros(1)}
    save_file(stored, tmp_path / file)
    if indexed:
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(stored, file)}))
    with Checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.names()) == {"language_model.model.layers.3.mlp.blocks.w", vision}
        np.testing.assert_array_equal(checkpoint.read("language_model.model.layers.3.mlp.blocks.w"), np.arange(3.0))


def test_index_that_names_a_tensor_twice(sharded):
    (sharded / INDEX).write_text('{"weight_map": {"t0.a": "model-00001-of-00003.safetensors", "t0.a": "other"}}')
    with pytest.raises(CheckpointError, match="'t0.a' appears twice"):
        Checkpoint(sharded)


def test_tensor_missing_from_its_shard(sharded):
    set_map(sharded, **{"t0.b": "model-00002-of-00003.safetensors", "t9": "model-00001-of-00003.safetensors"})
    with pytest.raises(CheckpointError, match=r"2 tensors are not in .*t0\.b \(model-00002.*t9 \(model-00001"):
        Checkpoint(sharded)


@pytest.mark.parametrize("name", ["../secret.safetensors", "a/../../secret.safetensors", "", "a\0b", "/etc/passwd"])
def test_weight_map_that_leads_out(sharded, name):
    save_file({"t0.a": np.zeros(1)}, sharded.parent / "secret.safetensors")
    set_map(sharded, **{"t0.a": name})
    with pytest.raises(CheckpointError, match="leads out of the directory"):
        Checkpoint(sharded)


@pytest.mark.parametrize("entry", [3, None, ["x"]])
def test_weight_map_of_no_names(sharded, entry):
    set_map(sharded, **{"t0.a": entry})
    with pytest.raises(CheckpointError, match=r"weight_map\['t0.a'\] is .*, not a file name"):
        Checkpoint(sharded)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_index_without_a_map(sharded, index):
    (sharded / INDEX).write_text(index)
    with pytest.raises(CheckpointError, match="no weight_map"):
        Checkpoint(sharded)


def test_links_out_of_the_directory_are_refused(sharded, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "x.safetensors"
    shard = sharded / "model-00001-of-00003.safetensors"
    shard.rename(elsewhere)
    shard.symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match="is a link to .*elsewhere.*outside the directory"):
        Checkpoint(sharded)


def test_config_that_links_out_is_refused(sharded, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "secret.json"
    elsewhere.write_text("{}")
    (sharded / "config.json").symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match="outside the directory"):
        _ = Checkpoint(sharded).config_json


def test_circle_of_links(tmp_path):
    (tmp_path / SINGLE).symlink_to(tmp_path / "other")
    (tmp_path / "other").symlink_to(tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=SINGLE):
        Checkpoint(tmp_path)


def test_links_within_the_directory_and_a_linked_directory_are_followed(sharded, tmp_path_factory):
    shard = sharded / "model-00001-of-00003.safetensors"
    shard.rename(sharded / "first")
    shard.symlink_to("first")
    link = tmp_path_factory.mktemp("links") / "model"
    link.symlink_to(sharded)
    assert Checkpoint(link).read("t0.a").shape == (2, 3)


def hub_cache(root, model):
    """A snapshot whose files are links into the blobs of `model`."""
    snapshot, blobs = root / "models--org--name/snapshots/abc", root / model / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir(parents=True)
    save_file({"x": np.zeros(3, np.float32)}, blobs / "0123")
    (snapshot / SINGLE).symlink_to(os.path.relpath(blobs / "0123", snapshot))
    return snapshot


def test_hub_cache_links_to_its_own_blobs_only(tmp_path):
    entry = Checkpoint(hub_cache(tmp_path / "good", "models--org--name")).entry("x")
    assert entry.path == tmp_path / "good/models--org--name/blobs/0123"
    with pytest.raises(CheckpointError, match="outside the directory"):
        Checkpoint(hub_cache(tmp_path / "bad", "models--org--other"))


def test_pipe_in_place_of_a_shard_does_not_block(tmp_path):
    os.mkfifo(tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match="not a regular file"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(("files", "message"), [
    ([], "no safetensors file at all"),
    (["pytorch_model.bin"], "PyTorch pickles, which kjax does not open"),
    (["model-00001-of-00002.safetensors"], "safetensors files but no model.safetensors.index.json"),
])  # fmt: skip
def test_no_weights(tmp_path, files, message):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path)


def test_no_directory(tmp_path):
    with pytest.raises(CheckpointError, match="no such directory"):
        Checkpoint(tmp_path / "nothing")


def test_config_json(sharded):
    checkpoint = Checkpoint(sharded)
    with pytest.raises(CheckpointError, match="no config.json"):
        _ = checkpoint.config_json
    (sharded / "config.json").write_text('{"model_type": "deepseek_v3"}')
    assert checkpoint.config_json == {"model_type": "deepseek_v3"}
    (sharded / "config.json").write_text('{"model_type": "a", "model_type": "b"}')
    with pytest.raises(CheckpointError, match="config.json: the key 'model_type' appears twice"):
        _ = checkpoint.config_json


def test_unknown_tensor(sharded):
    with pytest.raises(CheckpointError, match="no tensor 'nothing'"):
        Checkpoint(sharded).read("nothing")


def test_json_numbers_of_any_length_are_bounded():
    with pytest.raises(CheckpointError, match="not valid JSON"):
        parse_json(b'{"x": ' + b"9" * 100_000 + b"}", "here")
