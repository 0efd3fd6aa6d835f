"""The environment's report and checks, on this machine and on made-up ones."""

import json
import os
import stat
import subprocess
import sys
import warnings

import pytest

from kjax import env
from kjax.errors import ConfigError

HASWELL = "flags\t\t: fpu sse4_2 avx avx2 fma f16c\nmodel name\t: Some CPU\n"
OLD = "model name\t: Old CPU\nflags\t\t: fpu sse4_2 avx\n"


@pytest.fixture
def machine(tmp_path):
    """Makes a file system with the given files: machine({"proc/cpuinfo": text})."""
    def make(files):
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return tmp_path
    return make


def test_report_of_this_machine():
    report = json.loads(json.dumps(env.report()))
    assert report["versions"]["jax"] and report["versions"]["python"].startswith("3.")
    assert report["kernels"]["isa"] in {name.removeprefix("isa ") for name in report["kernels"] if " " in name}
    assert report["kernels"][f"isa {report['kernels']['isa']}"] == "runs here"
    assert report["jax"]["transport"] == ("ffi" if report["jax"]["backend"] == "cpu" else "pure_callback")
    assert report["memory"]["total"] > report["memory"]["available"] > 0
    assert report["environment"]["NPROC"] == os.environ["NPROC"]
    printed = env.text(report)
    assert all(section in printed for section in report if section != "warnings")
    assert report["cpu"]["model"] in printed


def test_a_made_up_machine(machine):
    root = machine({
        "proc/cpuinfo": HASWELL,
        "proc/meminfo": "MemTotal:       1000000 kB\nMemAvailable:    600000 kB\nSwapTotal:            8 kB\n",
        "sys/fs/cgroup/memory.max": "512000000\n", "sys/fs/cgroup/cpu.max": "150000 100000\n",
        "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
        "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages": "7\n",
        "sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages": "1\n",
        "sys/devices/system/node/node0/cpulist": "0-3\n",
        "sys/devices/system/node/node0/meminfo": "Node 0 MemTotal:  2000000 kB\n",
        "sys/devices/system/node/node1/cpulist": "4-7\n"})
    assert env.memory(root) == {"total": 1024000000, "available": 614400000, "limit": 512000000, "swap": 8192,
                                "transparent huge pages": "madvise", "huge pages": {"2 MiB": 7, "1 GiB": 1}}
    assert env.numa(root) == {"node0": "cpus 0-3, 2.0 GB", "node1": "cpus 4-7"}
    cpu = env.cpu(root)
    assert (cpu["model"], cpu["limit"], cpu["features"]) == ("Some CPU", 1.5, ["avx", "avx2", "f16c", "fma"])


def test_old_control_groups_and_no_limit(machine):
    root = machine({"proc/meminfo": "MemTotal: 1000 kB\n", "sys/fs/cgroup/cpu.max": "max 100000\n",
                    "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"})
    assert env.memory(root)["limit"] is None and env.cpu(root)["limit"] is None
    root = machine({"sys/fs/cgroup/memory/memory.limit_in_bytes": "4096\n", "sys/fs/cgroup/cpu.max": "",
                    "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
                    "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"})
    assert env.memory(root)["limit"] == 4096 and env.cpu(root)["limit"] == 2


def test_nothing_to_read(tmp_path):
    assert env.memory(tmp_path)["total"] == 0 and env.numa(tmp_path) == {} and env.features(tmp_path) == set()
    assert env.text({"numa": {}, "gpus": [], "memory": env.memory(tmp_path)})


@pytest.mark.parametrize("platforms", ["cuda", "gpu", "cuda,rocm", " cuda "])
def test_platforms_without_cpu_are_refused(platforms):
    with pytest.raises(ConfigError, match=r"leaves out the CPU backend.*set JAX_PLATFORMS=.*,cpu, or unset it"):
        env.check_platforms(platforms)


@pytest.mark.parametrize("platforms", ["", "cpu", "cuda,cpu", "cpu, cuda"])
def test_platforms_with_cpu_pass(platforms):
    env.check_platforms(platforms)


def test_the_check_comes_before_jax_fails():
    """JAX itself would fail on the missing plugin; loading says first what is wrong with the setting."""
    program = "import kjax\nkjax.load('.')\n"
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | {"JAX_PLATFORMS": "cuda"},
                          capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("kjax.errors.ConfigError: JAX_PLATFORMS=cuda leaves out the CPU")


def test_a_gpu_that_jaxlib_cannot_use():
    gpu = ["NVIDIA H100, 80 GiB, 580.1"]
    message = env.unused_gpu(gpu, [], "", 13)
    assert "CPU-only" in message and 'pip install "jax[cuda13]==' in message and "NVIDIA H100" in message
    assert "jax[cuda12]" in env.unused_gpu(gpu, [], "cuda,cpu", None)
    assert env.unused_gpu([], [], "", None) is None
    assert env.unused_gpu(gpu, ["jax-cuda12-plugin 0.10.2"], "", 12) is None
    assert env.unused_gpu(gpu, [], "cpu", 12) is None  # the user chose


def test_gpus_by_driver_and_by_device_files(machine, tmp_path):
    root = machine({"dev/nvidia0": "", "dev/nvidia1": "", "dev/nvidiactl": "",
                    "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module  580.65.06  Release\n"})
    assert env.gpus(root, smi="/nonexistent/nvidia-smi") == ["/dev/nvidia0", "/dev/nvidia1"]
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'Some GPU, 81559 MiB, 580.65'\n")
    smi.chmod(smi.stat().st_mode | stat.S_IXUSR)
    assert env.gpus(root, smi=str(smi)) == ["Some GPU, 81559 MiB, 580.65"]
    smi.write_text("#!/bin/sh\necho 'no driver' >&2\nexit 9\n")
    assert env.gpus(root, smi=str(smi)) == ["/dev/nvidia0", "/dev/nvidia1"]
    assert any("jax[cuda13]" in problem for problem in env.problems(root, {"JAX_PLATFORMS": ""}))


def test_a_cpu_below_avx2(machine):
    message = env.slow_cpu(env.features(machine({"proc/cpuinfo": OLD})), "x86_64")
    assert "lacks avx2, f16c, fma" in message and "scalar" in message and "slower" in message
    assert env.slow_cpu(env.features(machine({"proc/cpuinfo": HASWELL})), "x86_64") is None
    assert "aarch64" in env.slow_cpu(set(), "aarch64")
    assert env.slow_cpu(set(), "x86_64") is None  # nothing is known where /proc is hidden


def test_check_warns_once(machine, monkeypatch):
    root = machine({"proc/cpuinfo": OLD})
    monkeypatch.setattr(env, "_told", set())
    with pytest.warns(RuntimeWarning, match="lacks avx2"):
        env.check(root, {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env.check(root, {})
    with pytest.raises(ConfigError):
        env.check(root, {"JAX_PLATFORMS": "cuda"})


def test_missing_kernels_are_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "kjax._ext", None)
    monkeypatch.delattr("kjax._ext", raising=False)
    assert env.kernels()["isa"].startswith("not built")


def test_plugins_are_found(tmp_path, monkeypatch):
    info = tmp_path / "jax_cuda13_plugin-0.10.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: jax-cuda13-plugin\nVersion: 0.10.2\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "jax-cuda13-plugin 0.10.2" in env.accelerator_plugins()
