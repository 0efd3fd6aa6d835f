"""
What the AMX kernels cost per tile, from their compiled code, for machines that cannot run them.

    python experiments/bench/amx_estimate.py [--mca llvm-mca-19] [--core-gbs 6.5]

Compiles ext/gemm_amx.cpp with the flags of ext/CMakeLists.txt, finds the loops around the tile products, and follows
one unit of the decoding between them instruction by instruction (it needs AVX-512 VBMI and BF16, not AMX: a product
of zero rows decodes and multiplies nothing). llvm-mca's model of Sapphire Rapids gives the cycles of what was
followed. A tile is 512 weights. The products of a tile take rows / 0.85 cycles (16 per 16 rows, 85 % of the tile unit).
"""

import argparse
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

EXT = Path(__file__).parents[2] / "ext"
FORMATS = {"bf16": 0, "fp8_block": 2, "fp8_channel": 3, "int4_group32": 4, "int8_group128": 5}
UNIT = 1024  # weights decoded at a time: 128 columns of 8 rows, or 64 of 16
BITS = {"bf16": 16, "fp8_block": 8, "fp8_channel": 8, "int4_group32": 4.5, "int8_group128": 8.125}
GHZ, ROWS = 2.0, (16, 64, 256, 1024)

DRIVER = """
#include <cstdlib>
#include <cstring>
#include "kernels.h"
using namespace kjax;
int main(int, char** argv) {
  const int format = std::atoi(argv[1]), across = std::atoi(argv[2]);
  uint8_t* bytes = static_cast<uint8_t*>(std::aligned_alloc(64, 8 << 20));
  std::memset(bytes, 0x38, 8 << 20);
  const Strip strip{{bytes, bytes, across ? 512 : 64, across ? 256 : 1024}, 0, across ? 256 : 64};
  std::byte* const scratch = reinterpret_cast<std::byte*>(bytes + (4 << 20));
  const Product product{bytes, 1024, 0, strip, {}, nullptr, 256, false, scratch};
  __asm__ volatile("int3");
  (across ? kAmxGemm.across : kAmxGemm.along)[format](product);
}
"""
PTRACE_TRACEME, PTRACE_PEEKUSER, PTRACE_CONT, PTRACE_SINGLESTEP, RIP = 0, 3, 7, 9, 16 * 8


def run(*command, text=None) -> str:
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def build(folder: Path) -> Path:
    flags = re.search(r'kjax_kernel\(gemm_amx\.cpp "([^"]*)"\)', (EXT / "CMakeLists.txt").read_text())[1].split(";")
    (folder / "driver.cpp").write_text(DRIVER)
    common = ["c++", "-std=c++20", "-O3", "-ffp-contract=off", "-w", f"-I{EXT}"]
    sources = ["gemm_amx.cpp", "gemm_avx512bf16.cpp"]  # the second for few rows
    run(*common, *flags, "-no-pie", str(folder / "driver.cpp"), *(str(EXT / s) for s in sources),
        "-o", str(folder / "driver"))  # fmt: skip
    return folder / "driver"


def disassemble(binary: Path) -> dict[str, dict[int, str]]:
    """Functions by name, their instructions by address."""
    functions, current = {}, None
    for line in run("objdump", "-d", "-C", "--no-show-raw-insn", str(binary)).splitlines():
        if head := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            current = functions.setdefault(head[1], {})
        elif body := re.match(r"\s*([0-9a-f]+):\t(.*)", line):
            current[int(body[1], 16)] = re.sub(r"\s*#.*|<.*>", "", body[2]).strip()
    return functions


def follow(driver: Path, arguments: list[str], steps: int) -> list[int]:
    """Addresses of the instructions that the driver executes from its breakpoint on."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.restype = ctypes.c_long
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    child = os.fork()
    if child == 0:
        libc.ptrace(PTRACE_TRACEME, 0, None, None)
        os.execv(driver, [str(driver), *arguments])
    os.waitpid(child, 0)
    libc.ptrace(PTRACE_CONT, child, None, None)
    status, path = os.waitpid(child, 0)[1], []
    while len(path) < steps and os.WIFSTOPPED(status) and os.WSTOPSIG(status) == signal.SIGTRAP:
        path.append(libc.ptrace(PTRACE_PEEKUSER, child, RIP, None))
        libc.ptrace(PTRACE_SINGLESTEP, child, None, None)
        status = os.waitpid(child, 0)[1]
    if os.WIFSTOPPED(status):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return path


def one_unit(path: list[int], unit: dict[int, str]) -> list[str]:
    """Instructions of the shortest whole pass through a function among the first calls."""
    entry, passes, current = min(unit), [], None
    for address in path:
        if address == entry:
            current = []
        if address in unit and current is not None:
            current.append(unit[address])
            if unit[address].startswith("ret"):
                passes.append(current)
                current = None
    if not passes:
        sys.exit("the decoding could not be followed: does this CPU have AVX-512 VBMI and BF16?")
    return min(passes, key=len)


def cycles(mca: str, instructions: list[str]) -> tuple[float, float]:
    """(cycles, micro-operations) of a pass when many follow each other."""
    body = [i for i in instructions if not re.match(r"(j|call|ret|nop|data16|cs nop)", i)]
    out = run(mca, "-mcpu=sapphirerapids", "-iterations=200", text="\n".join(body) + "\n")
    number = lambda name: float(re.search(rf"{name}:\s+([\d.]+)", out)[1])  # noqa: E731
    return number("Total Cycles") / 200, number("Total uOps") / 200


def tile_loops(functions: dict) -> list[tuple[int, int, int]]:
    """(products, tile loads, other instructions at most) of every innermost loop around tile products."""
    found = []
    for code in functions.values():
        jumps = [(int(m[1], 16), at) for at, i in code.items() if (m := re.match(r"j\w+\s+([0-9a-f]+)", i))]
        backward = sorted(((at - to, to, at) for to, at in jumps if to <= at))
        tiles = [at for at, i in code.items() if i.startswith("tdpbf16ps")]
        taken = set()
        for _, first, last in backward:
            inside = [at for at in tiles if first <= at <= last and at not in taken]
            if not inside:
                continue
            taken.update(inside)
            body = [i for at, i in code.items() if first <= at <= last]
            loads = sum(i.startswith("tileload") for i in body)
            if loads >= len(inside):  # not a piece of a loop that was cut in two
                found.append((len(inside), loads, len(body) - loads - len(inside)))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--mca", default=next(filter(shutil.which, ("llvm-mca-19", "llvm-mca-18", "llvm-mca")), "llvm-mca")
    )
    parser.add_argument("--core-gbs", type=float, default=6.5, help="memory bandwidth of a core when all of them read")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        driver = build(Path(folder))
        functions = disassemble(driver)
        loops = tile_loops(functions)
        print(f"{len(loops)} loops around tile products: {min(o / n for n, _, o in loops):.0f} to "
              f"{max(o / n for n, _, o in loops):.0f} other instructions per product at most, of 96 that six ports a "
              f"cycle have room for in its 16 cycles; {min(x / n for n, x, _ in loops):.2f} to "
              f"{max(x / n for n, x, _ in loops):.2f} tile loads per product\n")  # fmt: skip
        print(f"| decode of a tile | instructions | micro-operations | cycles | memory at {options.core_gbs} GB/s | "
              + " | ".join(f"{r} rows" for r in ROWS) + " |")  # fmt: skip
        print("| --- " * (5 + len(ROWS)) + "|")
        for fmt, number in FORMATS.items():
            for direction, name in (("forward", "TilesAhead"), ("backward", "PanelAhead")):
                memory = 512 * BITS[fmt] / 8 / options.core_gbs * GHZ
                instructions = operations = decode = 0.0
                if (fmt, direction) != ("bf16", "forward"):  # read in place
                    unit = next(
                        code for head, code in functions.items() if f"{name}<(kjax::Format){number}>::unit" in head
                    )
                    path = follow(driver, [str(number), str(int(direction == "backward"))], 6000)
                    followed = one_unit(path, unit)
                    per_tile = 512 / UNIT
                    decode, operations = (per_tile * n for n in cycles(options.mca, followed))
                    instructions = per_tile * len(followed)
                cells = []
                for rows in ROWS:
                    products = rows / 0.85
                    limit = max(memory, products)
                    cells.append(f"{limit / max(limit, decode):.2f} ({limit / max(memory, products + decode):.2f})")
                print(f"| {fmt} {direction} | {instructions:.0f} | {operations:.0f} | {decode:.0f} | {memory:.0f} | "
                      + " | ".join(cells) + " |")  # fmt: skip
    print("\nRows: share of max(memory, products) with decoding between products (in turns with them).")


if __name__ == "__main__":
    main()
