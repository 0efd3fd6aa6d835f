"""Fuzzes the reader of safetensors headers: python tests/fuzz_headers.py [SECONDS [SEED]].

Mutated files must be refused with a CheckpointError or read as the safetensors library reads them. Each case depends on
its seed alone, which is printed with what is wrong.
"""

import json
import math
import os
import random
import struct
import sys
import time
from pathlib import Path

import safetensors

from kjax.errors import CheckpointError
from kjax.weights import safetensors as reader

DTYPES = [*reader.DTYPES, "F4", "f32", "", "C64"]
NUMBERS = [0, 1, -1, 2, 7, 8, 255, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**30, -2**63, 0.5, 1e400, True,
           None, "1", [], {}]  # fmt: skip


def good(rng: random.Random) -> tuple[dict, bytes]:
    """A header as it should be, and the bytes behind it."""
    header, at = {}, 0
    for number in range(rng.randint(0, 4)):
        dtype = rng.choice(list(reader.DTYPES))
        shape = [rng.choice((0, 1, 2, 3, 5)) for _ in range(rng.randint(0, 3))]
        size = math.prod(shape) * reader.ITEMSIZE[dtype]
        header[f"t{number}"] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    if rng.random() < 0.3:
        header["__metadata__"] = {"format": "pt"}
    return header, rng.randbytes(at)


def mutate_header(header: dict, rng: random.Random):
    """Change one thing that a header says."""
    names = [name for name, entry in header.items() if isinstance(entry, dict) and len(entry) == 3
             and isinstance(entry["shape"], list) and isinstance(entry["data_offsets"], list)
             and all(type(offset) is int for offset in entry["data_offsets"]) and len(entry["data_offsets"]) == 2]
    if not names:
        header[rng.choice(("a", "", "__metadata__"))] = rng.choice(NUMBERS)
        return
    entry = header[rng.choice(names)]
    kind = rng.randrange(9)
    if kind < 3:
        offsets, which = entry["data_offsets"], rng.randrange(2)
        step = rng.choice((-8, -4, -1, 1, 2, 4, 8))
        if kind == 0:
            offsets[which] = rng.choice(NUMBERS)
        elif kind == 1:
            offsets[which] += step
        else:  # moved as a whole: its size still fits
            entry["data_offsets"] = [offset + step for offset in offsets]
    elif kind == 3 and entry["shape"]:
        entry["shape"][rng.randrange(len(entry["shape"]))] = rng.choice((*NUMBERS, 1, 2, 3))
    elif kind == 4:
        entry["dtype"] = rng.choice(DTYPES)
    elif kind == 5:
        entry.pop(rng.choice(list(entry)))
    elif kind == 6:
        header[rng.choice(names)] = rng.choice(NUMBERS)
    elif kind == 7:  # over a neighbour, or away from it, with a shape that fits
        entry["data_offsets"][rng.randrange(2)] += rng.choice((-8, -4, -1, 1, 4, 8))
        begin, end = entry["data_offsets"]
        entry["dtype"], entry["shape"] = "U8", [abs(end - begin)]
    else:
        entry[rng.choice(("shape", "data_offsets"))] = rng.choice(NUMBERS)


def mutate_bytes(data: bytearray, rng: random.Random):
    """Change some bytes, wherever they lie."""
    if not data:
        return
    at = rng.randrange(min(len(data), 300))
    kind = rng.randrange(5)
    if kind == 0:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[at:at + rng.randint(1, 9)]
    elif kind == 2:
        data[at:at] = rng.choice((b"[" * 2000, b'"t0":1,', b"\0", b"\xff", b"NaN", b"-", b"9" * 30, b"\\ud800"))
    elif kind == 3:
        del data[-rng.randint(1, 9):]
    else:
        data += rng.randbytes(rng.randint(1, 9))


def case(seed: int) -> bytes:
    """A file that is good, or nearly so."""
    rng = random.Random(seed)
    header, body = good(rng)
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        mutate_header(header, rng)
    text = json.dumps(header, allow_nan=True)
    if rng.random() < 0.1 and len(header) > 1:  # one name for two tensors
        text = text.replace('"t1"', '"t0"')
    head = text.encode()
    length = len(head)
    if rng.random() < 0.15:
        length = rng.choice((0, 1, length - 1, length + 1, 2**31, reader.MAX_HEADER, reader.MAX_HEADER + 1, 2**64 - 1))
    data = bytearray(struct.pack("<Q", max(length, 0)) + head + body)
    for _ in range(rng.choice((0, 0, 0, 1, 2))):
        mutate_bytes(data, rng)
    return bytes(data)


def problem(data: bytes, path: Path, module=reader) -> str | None:
    """What is wrong with how `module` reads a file."""
    path.write_bytes(data)
    handle = os.open(path, os.O_RDONLY)
    try:
        entries = module.read_header(handle, len(data), path, str(path))
    except CheckpointError as error:
        return None if len(str(error)) < 3000 else f"a message of {len(str(error))} characters"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        os.close(handle)
    try:
        theirs = dict(safetensors.deserialize(data))
    except safetensors.SafetensorError as error:
        return f"read, though the safetensors library refuses it: {error}"
    if theirs.keys() != {entry.name for entry in entries} or len(theirs) != len(entries):
        return f"tensors {[entry.name for entry in entries]}, not {list(theirs)}"
    for entry in entries:
        other = theirs[entry.name]
        if entry.dtype != other["dtype"] or list(entry.shape) != list(other["shape"]):
            return f"{entry} is {other['dtype']} {other['shape']}"
        if data[entry.begin:entry.end] != bytes(other["data"]):
            return f"{entry} has other bytes"
    return None


def fuzz(cases, path: Path, module=reader) -> str | None:
    """The first problem among cases of these seeds."""
    for seed in cases:
        if found := problem(case(seed), path, module):
            return f"case {seed}: {found}"
    return None


def main(seconds: float = 60, seed: int = 0) -> int:
    import tempfile

    end, first = time.monotonic() + seconds, seed
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.safetensors"
        while True:
            if found := fuzz(range(seed, seed + 100), path):
                print(found)
                return 1
            seed += 100
            if time.monotonic() > end:
                break
    print(f"headers: {seed - first} files, cases {first} to {seed - 1}, nothing wrong")
    return 0


if __name__ == "__main__":
    sys.exit(main(*(kind(text) for kind, text in zip((float, int), sys.argv[1:], strict=False))))
