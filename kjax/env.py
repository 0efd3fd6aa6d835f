"""What this machine and installation are, and what is wrong with them: `kjax env`, and the checks before a run.

Everything read from the system goes through `root` (the file system's top), `environ` or a plain argument, so that
other machines can be made up.
"""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kjax.errors import ConfigError

PACKAGES = ("kjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "ml_dtypes", "gin-config",
            "tokenizers", "safetensors", "jinja2", "nanobind")
VARIABLES = ("NPROC", "KJAX_ISA", "KJAX_THREADS", "KJAX_TRANSPORT", "KJAX_DEBUG", "JAX_PLATFORMS", "XLA_FLAGS",
             "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE", "CUDA_VISIBLE_DEVICES",
             "JAX_DEFAULT_MATMUL_PRECISION", "OMP_NUM_THREADS")
GPU_PLATFORMS = {"cuda", "gpu", "rocm"}
NVIDIA = "dev/nvidia[0-9]*"

_told: set[str] = set()  # the warnings given so far in this process


def report(root: str | Path = "/", environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """All facts as a dictionary that JSON can hold; starts JAX's backend."""
    root = Path(root)
    return {
        "versions": versions(),
        "cpu": cpu(root),
        "kernels": kernels(),
        "memory": memory(root),
        "numa": numa(root),
        "gpus": gpus(root),
        "jax": backend(),
        "environment": {name: environ[name] for name in VARIABLES if name in environ},
        "warnings": problems(root, environ),
    }


def text(facts: Mapping[str, Any]) -> str:
    """The report for people, one fact a line."""
    lines = []
    for section, value in facts.items():
        if isinstance(value, Mapping):
            lines.append(f"{section}:")
            lines += [f"  {key}: {_plain(item)}" for key, item in value.items()]
        elif section == "warnings":
            lines += [f"warning: {item}" for item in value]
        else:
            lines.append(f"{section}: {_plain(value)}")
    return "\n".join(lines)


def _plain(value) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{key} {_plain(item)}" for key, item in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return "; ".join(map(_plain, value)) or "none"
    return "none" if value in ("", None) else str(value)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name != "nanobind":  # needed for building only
                found[name] = "not installed"
    return found


def cpu(root: Path) -> dict[str, Any]:
    """Model, features that decide between kernels, cores of the machine and those this process may use."""
    info = _read(root / "proc/cpuinfo")
    name = re.search(r"^model name\s*:\s*(.*)$", info, re.MULTILINE)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"model": name[1] if name else platform.processor() or platform.machine(), "cores": os.cpu_count(),
            "usable": usable, "limit": _cpu_limit(root),
            "features": sorted(f for f in features(root) if re.match(r"avx|amx|fma|f16c", f))}


def features(root: Path) -> set[str]:
    """The CPU features as the kernel lists them."""
    flags = re.search(r"^flags\s*:\s*(.*)$", _read(root / "proc/cpuinfo"), re.MULTILINE)
    return set(flags[1].split()) if flags else set()


def _cpu_limit(root: Path) -> float | None:
    """Cores granted by a control group, None without a limit."""
    quota = _read(root / "sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        return int(quota[0]) / int(quota[1])
    quota, period = (_read(root / f"sys/fs/cgroup/cpu/cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def kernels() -> dict[str, Any]:
    """The instruction set that runs and why, the others and why not, and the number of threads."""
    try:
        from kjax import _ext
    except ImportError as error:
        return {"isa": f"not built ({error}); `pip install .` in the source directory builds it"}
    isa = _ext.isa()
    return {"isa": isa["name"], "reason": isa["reason"],
            **{f"isa {name}": "runs here" if not why_not else f"no: {why_not}"
               for name, why_not in isa["available"].items()},
            "threads": _ext.threads(),
            "threads on memory nodes": ", ".join(
                f"node{number} {_ext.thread_nodes().count(index)}" for index, (number, _) in enumerate(_ext.nodes())
            ) if len(_ext.nodes()) > 1 else "one node"}


def memory(root: Path) -> dict[str, Any]:
    """Bytes of main memory, as the machine and as a control group sees it, and huge pages."""
    info = {key: int(value) * 1024 for key, value in
            re.findall(r"^(\w+):\s+(\d+) kB$", _read(root / "proc/meminfo"), re.MULTILINE)}
    limits = [int(value) for name in ("memory.max", "memory/memory.limit_in_bytes")
              if (value := _read(root / "sys/fs/cgroup" / name).strip()).isdigit()]
    limit = min(limits, default=None)
    total = info.get("MemTotal", 0)
    if limit is not None and limit >= total:  # the kernel's way of saying "no limit"
        limit = None
    thp = re.search(r"\[(\w+)\]", _read(root / "sys/kernel/mm/transparent_hugepage/enabled"))
    return {"total": total, "available": info.get("MemAvailable", 0), "limit": limit,
            "swap": info.get("SwapTotal", 0), "transparent huge pages": thp[1] if thp else "none",
            "huge pages": {_page_size(path.name): int(_read(path / "nr_hugepages") or 0)
                           for path in sorted((root / "sys/kernel/mm/hugepages").glob("hugepages-*"))}}


def _page_size(name: str) -> str:
    kilobytes = int(re.search(r"\d+", name)[0])
    return f"{kilobytes >> 20} GiB" if kilobytes >= 1 << 20 else f"{kilobytes >> 10} MiB"


def numa(root: Path) -> dict[str, str]:
    """{"node0": "cpus 0-31, 256.0 GB"}."""
    nodes = {}
    for path in sorted((root / "sys/devices/system/node").glob("node[0-9]*")):
        total = re.search(r"MemTotal:\s+(\d+) kB", _read(path / "meminfo"))
        nodes[path.name] = (f"cpus {_read(path / 'cpulist').strip() or 'none'}"
                            + (f", {int(total[1]) * 1024 / 1e9:.1f} GB" if total else ""))
    return nodes


def gpus(root: Path = Path("/"), smi: str | None = None) -> list[str]:
    """The NVIDIA GPUs of the machine whether or not JAX can use them: by nvidia-smi, else by device files."""
    if smi is None and Path(root) == Path("/"):
        smi = shutil.which("nvidia-smi")
    if smi:
        query = [smi, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        try:
            done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
            if done.returncode == 0 and done.stdout.strip():
                return [line.strip() for line in done.stdout.splitlines() if line.strip()]
        except (OSError, subprocess.TimeoutExpired):
            pass  # a broken driver: the device files still tell
    return [f"/{path.relative_to(root)}" for path in sorted(Path(root).glob(NVIDIA))]


def backend() -> dict[str, Any]:
    """The platform and devices as JAX sees them, and how compiled code reaches the kernels."""
    import jax

    try:
        devices = jax.devices()
        found = {"backend": jax.default_backend(),
                 "devices": [f"{d.device_kind} ({d.platform}:{d.id})" for d in devices]}
        stats = devices[0].memory_stats() or {}
        if "bytes_limit" in stats:
            found["memory"] = stats["bytes_limit"]
    except RuntimeError as error:
        return {"backend": f"cannot start: {str(error).splitlines()[0]}"}
    try:
        from kjax.offload import bridge
        found["transport"] = bridge.resolve("auto")
    except ImportError as error:
        found["transport"] = f"none: the kernels are not built ({error})"
    except ConfigError as error:
        found["transport"] = f"none: {error}"
    return found


def check(root: str | Path = "/", environ: Mapping[str, str] = os.environ):
    """Before anything long starts: raises ConfigError where a run cannot work, warns once where it will be slow."""
    check_platforms(_platforms(environ))
    for problem in problems(Path(root), environ):
        if problem not in _told:
            _told.add(problem)
            warnings.warn(problem, RuntimeWarning, stacklevel=2)


def _platforms(environ: Mapping[str, str]) -> str:
    """JAX_PLATFORMS as it stands, or as jax.config was told after the import."""
    if environ is os.environ and "jax" in sys.modules:
        return sys.modules["jax"].config.jax_platforms or ""
    return environ.get("JAX_PLATFORMS", "")


def check_platforms(platforms: str):
    """A list of JAX platforms without cpu: the host calls, which run beside the CPU backend, would hang or fail."""
    names = [name.strip() for name in platforms.split(",") if name.strip()]
    if names and "cpu" not in names:
        raise ConfigError(f"JAX_PLATFORMS={platforms} leaves out the CPU backend, which calls to the experts on the "
                          f"host need: set JAX_PLATFORMS={','.join(names)},cpu, or unset it")


def problems(root: Path, environ: Mapping[str, str] = os.environ) -> list[str]:
    """What works, but not as well as the machine could."""
    found = [unused_gpu(gpus(root), accelerator_plugins(), _platforms(environ), _driver_cuda(root)),
             slow_cpu(features(root), platform.machine())]
    return [problem for problem in found if problem]


def accelerator_plugins() -> list[str]:
    """The installed plugins through which jaxlib reaches accelerators: ["jax-cuda12-plugin 0.10.2"]."""
    return sorted(f"{name} {dist.version}" for dist in importlib.metadata.distributions()
                  if re.fullmatch(r"jax[-_](cuda|rocm)\d+[-_]plugin", name := dist.metadata["Name"] or ""))


def unused_gpu(found: list[str], plugins: list[str], platforms: str, cuda: int | None) -> str | None:
    """A GPU that a CPU-only jaxlib leaves idle; silent when the user chose the CPU."""
    chosen = {name.strip() for name in platforms.split(",") if name.strip()}
    if not found or plugins or (chosen and not chosen & GPU_PLATFORMS):
        return None
    extra = f"cuda{cuda}" if cuda else "cuda12"
    return (f"this machine has a GPU ({found[0]}), but the installed jaxlib is CPU-only and leaves it idle: "
            f"pip install \"jax[{extra}]=={_version('jax')}\", or set JAX_PLATFORMS=cpu to say that this is meant")


def _driver_cuda(root: Path) -> int | None:
    """The major CUDA version that the driver supports: CUDA 13 needs driver 580 or newer (NVIDIA's release notes)."""
    driver = re.search(r"Kernel Module.*?(\d+)\.\d+", _read(root / "proc/driver/nvidia/version"))
    return None if driver is None else 13 if int(driver[1]) >= 580 else 12


FAST = {"avx2", "fma", "f16c"}  # what the slowest kernels but the portable ones need


def slow_cpu(flags: set[str], machine: str) -> str | None:
    """A CPU on which only the portable kernels run."""
    if FAST <= flags or (not flags and machine in ("x86_64", "AMD64")):
        return None
    missing = ", ".join(sorted(FAST - flags))
    return (f"this CPU ({machine}) lacks {missing}: the experts run on the portable scalar kernels, about four times "
            "slower than with AVX2; use an x86 CPU from 2013 (Intel) or 2015 (AMD) on for real models")


def _version(package: str) -> str:
    return importlib.metadata.version(package)


def _read(path: Path) -> str:
    """A file of /proc or /sys, empty where there is none."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
