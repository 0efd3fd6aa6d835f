"""What a run is planned for: memory, and, where they are known, speeds; named machines, this one, or a JSON file."""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

import jax

from kjax.errors import ConfigError
from kjax.offload import storage
from kjax.startup import CONTEXT, DEVICE_SHARE, FRACTION

JAX_SHARE = 0.75  # of a GPU that JAX takes where nothing says otherwise


@dataclass(frozen=True)
class Machine:
    """Bytes, operations and bytes per second; a speed that is None is not known, and no time is predicted.

    Attributes:
      host, device: bytes of memory that are free. device None: the CPU is JAX's device and shares the main memory.
      share: the part of the device's memory that JAX takes.
      cores: of the host, for the record: the peaks are those of all cores.
      host_peak: operations per second of the experts' kernels.  host_bandwidth: bytes per second read from memory.
      disk_bandwidth: bytes per second of experts that main memory cannot hold.
      device_peak, device_bandwidth: of matrix products outside the experts, wherever they run.
      pcie: bytes per second between main memory and device, each way.
      source: where the figures come from.
    """

    host: int
    device: int | None
    share: float = DEVICE_SHARE
    cores: int | None = None
    host_peak: float | None = None
    host_bandwidth: float | None = None
    disk_bandwidth: float | None = None
    device_peak: float | None = None
    device_bandwidth: float | None = None
    pcie: float | None = None
    source: str = ""

    @property
    def usable(self) -> int:
        """Bytes of the device that arrays can take: JAX's share, and never what the CUDA context needs."""
        return int(min(self.device * self.share, self.device - CONTEXT))

    @property
    def timed(self) -> bool:
        """Whether all the speeds that a step needs are known."""
        needed = [self.host_peak, self.host_bandwidth, self.device_peak, self.device_bandwidth]
        return None not in needed and (self.device is None or self.pcie is not None)


# Peaks that the kernels reach on real shapes lie at 0.8 and more of what a CPU can do (docs/performance.md); a GPU's
# matrix products in a layer at half of its data sheet. Both are in these figures: what can be expected, not the most.
HOST_SHARE, DEVICE_SHARE_OF_PEAK = 0.8, 0.5
# Of a PCIe link's nominal rate, copies from pageable memory reach about this much.
PCIE_SHARE = 0.4


def _machine(host_gb, cores, core_gflops, host_gbs, device=None, source="") -> dict:
    """core_gflops: bf16 operations of a core, 1e9 a second, before HOST_SHARE."""
    made = {"host": int(host_gb * 1e9), "device": None, "cores": cores, "disk_bandwidth": 6e9,
            "host_peak": cores * core_gflops * 1e9 * HOST_SHARE, "host_bandwidth": host_gbs * 1e9 * HOST_SHARE,
            "source": source}
    if device is not None:
        gb, tflops, gbs, pcie = device
        made |= {"device": int(gb * 1e9), "device_peak": tflops * 1e12 * DEVICE_SHARE_OF_PEAK,
                 "device_bandwidth": gbs * 1e9 * HOST_SHARE, "pcie": pcie * 1e9 * PCIE_SHARE}
    return made


# (GB, dense bf16 TFLOPS with fp32 sums, GB/s, PCIe GB/s each way), from NVIDIA's data sheets.
RTX_4090, RTX_4090_48, RTX_5090, H100 = (24, 165, 1008, 32), (48, 165, 1008, 32), (32, 209, 1792, 64), \
    (80, 989, 3350, 64)
# A core: vdpbf16ps does 64 operations a clock on Zen 4 (measured 220 GFLOP/s) and 128 on Zen 5; AMX was measured at
# 21.3 TFLOPS for a socket of 48 cores in training, 444 a core. Memory: channels x 8 bytes x transfers a second.
PRESETS = {
    "xeon-8488c-2s-4090": _machine(1300, 96, 444 / HOST_SHARE, 2 * 307, RTX_4090_48,
                                   "2 x Xeon 8488C (AMX, 8 x DDR5-4800 each), RTX 4090 48 GB"),
    "xeon-w9-3595x-5090": _machine(1000, 60, 444 / HOST_SHARE, 307, RTX_5090,
                                   "Xeon w9-3595X (AMX, 8 x DDR5-4800), RTX 5090"),
    "epyc-9654-4090": _machine(750, 96, 220, 461, RTX_4090, "EPYC 9654 (Zen 4, 12 x DDR5-4800), RTX 4090"),
    "threadripper-9980x-5090": _machine(256, 64, 440, 205, RTX_5090,
                                        "Threadripper 9980X (Zen 5, 4 x DDR5-6400), RTX 5090"),
    "ryzen-9950x-4090": _machine(192, 16, 440, 80, RTX_4090, "Ryzen 9950X (Zen 5, 2 x DDR5-5600), RTX 4090"),
}


def machine(name: str | None = None, host_gb: float | None = None, device_gb: float | None = None,
            **speeds: float | None) -> Machine:
    """The machine to plan for.

    name: one of PRESETS, a JSON file with the fields of Machine, "here" (this one, its speeds measured now), or None:
      the free memory of this one.
    host_gb, device_gb and speeds (fields of Machine, per second) replace what the name says; device_gb 0 means none.
    """
    if name is None or name == "here":
        made = _here(name == "here" and device_gb is None, described=host_gb is not None or device_gb is not None)
    elif name in PRESETS:
        made = Machine(**PRESETS[name])
    else:
        made = _from_file(name)
    changes: dict = {key: value for key, value in speeds.items() if value is not None}
    if host_gb is not None:
        changes["host"] = int(host_gb * 1e9)
    if device_gb is not None:
        changes["device"] = int(device_gb * 1e9) or None
    if FRACTION in os.environ:
        changes["share"] = _share()
    return dataclasses.replace(made, **changes)


def _share() -> float:
    try:
        return min(1.0, float(os.environ[FRACTION]))
    except ValueError:
        raise ConfigError(f"{FRACTION}={os.environ[FRACTION]}: expected a number such as 0.9") from None


def _here(measure: bool, described: bool) -> Machine:
    host, _ = storage.available()
    device = None
    if not described and jax.default_backend() != "cpu":
        limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
        share = _share() if FRACTION in os.environ else JAX_SHARE
        device = None if limit is None else int(limit / share)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if not measure:
        return Machine(host, device, cores=cores)
    from kjax.planning import probe
    return Machine(host, device, cores=cores, source="measured now", **probe.speeds())


def _from_file(name: str) -> Machine:
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"machine {name!r}: expected {', '.join(PRESETS)}, here, or a JSON file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    fields = {f.name for f in dataclasses.fields(Machine)}
    if not isinstance(content, dict) or not content.keys() <= fields or "host" not in content:
        raise ConfigError(f"{path}: expected an object with host and any of {', '.join(sorted(fields - {'host'}))}")
    for key, value in content.items():
        if key != "source" and not (value is None or (isinstance(value, (int, float)) and value >= 0)):
            raise ConfigError(f"{path}: {key} = {value!r}: expected a number")
    return Machine(**({"device": None} | content))
