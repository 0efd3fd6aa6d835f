"""The fuzzer of safetensors headers: finds nothing in the reader, and each check that is taken out of it."""

import inspect
import re
import sys
import types

import fuzz_headers
import pytest

from kjax.weights import files
from kjax.weights import safetensors as reader

CHECKS = [  # those that no later check makes up for
    (reader, "if end - begin != math.prod(shape) * ITEMSIZE[dtype]:"),
    (reader, "if entry.begin < cursor:"),
    (reader, "if entry.begin > cursor:"),
    (reader, "if cursor != size:"),
    (files, "if len(found) != len(pairs):"),
    (reader, "if not isinstance(dtype, str) or dtype not in DTYPES:"),
    (reader, "if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(o) is int for o in offsets):"),
    (files, "if not isinstance(found, dict):"),
]


def test_nothing_is_wrong(tmp_path):
    assert fuzz_headers.fuzz(range(3000), tmp_path / "f") is None


def test_a_good_share_of_the_cases_is_read(tmp_path):
    """A fuzzer whose files are all refused at the first check would find nothing either."""
    path, read, refused = tmp_path / "f", 0, set()
    for seed in range(1000):
        path.write_bytes(data := fuzz_headers.case(seed))
        with open(path, "rb") as file:
            try:
                reader.read_header(file.fileno(), len(data), path, "f")
                read += 1
            except reader.CheckpointError as error:
                refused.add(re.sub(r"'.*?'|[^a-z ]", "", str(error))[:50])
    assert 100 < read < 900 and len(refused) > 12, (read, refused)


@pytest.mark.parametrize("module, check", CHECKS)
def test_a_check_taken_out_is_found(tmp_path, monkeypatch, module, check):
    source = inspect.getsource(module)
    assert source.count(check) == 1
    broken = types.ModuleType("kjax.weights.broken")
    monkeypatch.setitem(sys.modules, broken.__name__, broken)  # dataclasses look their module up
    exec(compile(source.replace(check, "if False:"), "broken", "exec"), broken.__dict__)
    if module is files:
        monkeypatch.setattr(reader, "parse_json", broken.parse_json)
        broken = reader
    assert fuzz_headers.fuzz(range(5000), tmp_path / "f", broken) is not None
