"""Which kernels run on which CPU: what CPUID means, the choice and its reason, tiles that the system does not grant."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kjax import _ext

WIDE = {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vbmi", "avx512_bf16"}
FULL = WIDE | {"amx_tile", "amx_bf16", "amx_permission"}

# Bits of CPUID as Intel's manual numbers them, by leaf and register.
FMA, F16C, OSXSAVE = 1 << 12, 1 << 29, 1 << 27
AVX2, AVX512F, AVX512DQ, AVX512BW, AVX512VL = (1 << n for n in (5, 16, 17, 30, 31))
VBMI, BF16, AMX_BF16, AMX_TILE = 1 << 1, 1 << 5, 1 << 22, 1 << 24
AVX512 = AVX512F | AVX512DQ | AVX512BW | AVX512VL
YMM, ZMM, TILES = 0x7, 0xE7, 0x600E7  # states that the operating system saves
SERVER = dict(leaf1_ecx=FMA | F16C | OSXSAVE, leaf7_ebx=AVX2 | AVX512, leaf7_ecx=0, leaf7_edx=0, leaf7_1_eax=0,
              xcr0=ZMM)  # fmt: skip
COOPER_LAKE = SERVER | dict(leaf7_1_eax=BF16)  # bf16 dot products without byte permutes
ICE_LAKE = SERVER | dict(leaf7_ecx=VBMI)
ZEN4 = SERVER | dict(leaf7_ecx=VBMI, leaf7_1_eax=BF16)
SAPPHIRE_RAPIDS = ZEN4 | dict(leaf7_edx=AMX_BF16 | AMX_TILE, xcr0=TILES)
HASWELL = SERVER | dict(leaf7_ebx=AVX2, xcr0=YMM)


def in_child(code, **env):
    """The last line a child process prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, env={**os.environ, **env},
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("cpu, name, reason", [
    (SAPPHIRE_RAPIDS, "amx", "the best"),
    (SAPPHIRE_RAPIDS | dict(xcr0=ZMM), "avx512bf16", "amx: this CPU lacks amx_tile, amx_bf16"),  # an old system
    (SAPPHIRE_RAPIDS | dict(leaf7_edx=AMX_TILE), "avx512bf16", "lacks amx_bf16"),
    (ZEN4, "avx512bf16", "amx: this CPU lacks"),
    (COOPER_LAKE, "avx512", "avx512bf16: this CPU lacks avx512_vbmi$"),
    (ICE_LAKE, "avx512", "avx512bf16: this CPU lacks avx512_bf16$"),
    (ZEN4 | dict(xcr0=YMM), "avx2", "avx512: this CPU lacks avx512f, "),
    (HASWELL, "avx2", "avx512: this CPU lacks avx512f, avx512bw, avx512dq, avx512vl$"),
    (HASWELL | dict(leaf1_ecx=F16C | OSXSAVE), "scalar", "avx2: this CPU lacks fma$"),
    (HASWELL | dict(leaf1_ecx=FMA | OSXSAVE), "scalar", "avx2: this CPU lacks f16c$"),
    (SAPPHIRE_RAPIDS | dict(leaf1_ecx=FMA | F16C), "scalar", "lacks avx2, fma, f16c"),  # no state is saved at all
    (dict.fromkeys(SERVER, 0), "scalar", "lacks avx2, fma, f16c"),
])  # fmt: skip
def test_made_up_cpus(cpu, name, reason):
    chosen, why = _ext.choose_isa(_ext.features_of(**cpu, ask_for_tiles=lambda: True), None)
    assert chosen == name and re.search(reason, why), why


def test_tiles_that_the_system_refuses():
    """Other kernels and the reason, not an illegal instruction; by name they are an error that says so."""
    features = _ext.features_of(**SAPPHIRE_RAPIDS, ask_for_tiles=lambda: False)
    assert set(features) == FULL - {"amx_permission"}
    refused = "amx: Linux does not grant this process the tile registers"
    assert _ext.choose_isa(features, None) == ("avx512bf16", refused)
    with pytest.raises(ValueError, match=f"KJAX_ISA={refused}; available here: avx512bf16, amx_soft, avx512, avx2"):
        _ext.choose_isa(features, "amx")


def test_tiles_are_asked_for_where_there_are_any():
    asked = []
    for cpu in (SAPPHIRE_RAPIDS, SAPPHIRE_RAPIDS | dict(xcr0=ZMM), ZEN4, HASWELL):
        _ext.features_of(**cpu, ask_for_tiles=lambda: asked.append(1) or True)
    assert len(asked) == 1


NO_ARCH_PRCTL = """
import ctypes, struct
# A seccomp filter: arch_prctl (158 on x86-64) fails with EPERM, everything else passes.
program = b"".join(struct.pack("HBBI", *line) for line in (
    (0x20, 0, 0, 0), (0x15, 0, 1, 158), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7fff0000)))
lines = ctypes.create_string_buffer(program)
class Filter(ctypes.Structure):
    _fields_ = [("count", ctypes.c_ushort), ("lines", ctypes.c_void_p)]
libc = ctypes.CDLL(None, use_errno=True)
filter = Filter(4, ctypes.cast(lines, ctypes.c_void_p))
installed = libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, ctypes.byref(filter), 0, 0) == 0
from kjax import _ext
print(installed and libc.syscall(158, 0x1023, 18) != 0 and ctypes.get_errno() == 1, _ext.isa()["name"], "|",
      _ext.isa()["available"]["amx"])
"""


@pytest.mark.skipif(os.uname().machine != "x86_64" or os.uname().sysname != "Linux", reason="arch_prctl of x86-64")
def test_a_refusal_by_the_kernel_itself():
    """On CPUs with tiles this is the path that a sandbox takes; on others the reason stays the CPU."""
    said = in_child(NO_ARCH_PRCTL, KJAX_ISA="")
    if said.startswith("False"):
        pytest.skip("no seccomp filter can be installed here")
    _, name, _, *reason = said.split(" ", 3)
    assert name != "amx" and re.search("tile registers|lacks|left out", reason[0])


@pytest.mark.parametrize(
    "features, name",
    [(FULL, "amx"), (WIDE, "avx512bf16"), (WIDE - {"avx512_bf16"}, "avx512"), (WIDE - {"avx512_vbmi"}, "avx512"),
     (FULL - {"avx512bw"}, "avx2"), ({"avx2", "fma", "f16c"}, "avx2"), ({"avx2", "fma"}, "scalar"), (set(), "scalar")],
)  # fmt: skip
def test_best_isa_of_a_cpu(features, name):
    chosen, reason = _ext.choose_isa(features, None)
    assert chosen == name and reason
    if name != "amx":
        assert "lacks" in reason


def test_reasons_name_what_is_missing():
    name, reason = _ext.choose_isa([], "")
    assert name == "scalar" and reason.endswith("avx2: this CPU lacks avx2, fma, f16c")
    assert "avx512: this CPU lacks avx2, fma, f16c, avx512f, avx512bw, avx512dq, avx512vl" in reason
    refused = _ext.choose_isa(FULL - {"amx_permission"}, "")
    assert refused == ("avx512bf16", "amx: Linux does not grant this process the tile registers")


def test_override_of_the_isa():
    assert _ext.choose_isa(FULL, "avx2") == ("avx2", "asked for by KJAX_ISA")
    with pytest.raises(ValueError, match="KJAX_ISA=avx512: this CPU lacks avx512f.*; available here: avx2, scalar"):
        _ext.choose_isa({"avx2", "fma", "f16c"}, "avx512")
    with pytest.raises(ValueError, match="KJAX_ISA=mmx is not an instruction set kjax knows; available here: scalar"):
        _ext.choose_isa(set(), "mmx")


def test_kjax_isa_in_the_environment():
    code = (
        "from kjax import _ext\ntry: print(_ext.isa()['name'], _ext.isa()['reason'])\nexcept ValueError as e: print(e)"
    )
    assert in_child(code, KJAX_ISA="scalar") == "scalar asked for by KJAX_ISA"
    assert "KJAX_ISA=sse9 is not" in in_child(code, KJAX_ISA="sse9")
    store = "from kjax import _ext\ntry: _ext.Store(1, 1, 4, 4, 'bf16')\nexcept ValueError as e: print(e)"
    assert "KJAX_ISA=sse9 is not" in in_child(store, KJAX_ISA="sse9")
