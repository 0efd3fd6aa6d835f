"""Memory nodes: topologies made up below a root; threads and experts spread over them; equal bits on all of them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kjax import _ext


def machine(root: Path, cpulists: dict[int, str], *, online=None, memory=None, allowed=None, distances=None) -> str:
    """A file system whose nodes have these CPUs; memory: kB of each; allowed: Mems_allowed_list of the process."""
    base = root / "sys/devices/system/node"
    base.mkdir(parents=True)
    (base / "online").write_text((online or ",".join(map(str, cpulists))) + "\n")
    for node, cpus in cpulists.items():
        (base / f"node{node}").mkdir()
        (base / f"node{node}/cpulist").write_text(cpus + "\n")
        (base / f"node{node}/meminfo").write_text(f"Node {node} MemTotal:       {(memory or {}).get(node, 1024)} kB\n"
                                                  f"Node {node} MemFree:        7 kB\n")
        if distances:
            (base / f"node{node}/distance").write_text(distances[node] + "\n")
    if allowed is not None:
        (root / "proc/self").mkdir(parents=True)
        (root / "proc/self/status").write_text(f"Name:\tpython\nMems_allowed:\t1\nMems_allowed_list:\t{allowed}\n")
    return str(root)


ALL = list(range(64))


@pytest.mark.parametrize("files, cpus, expected", [
    ({"cpulists": {0: "0-3"}}, ALL, [(0, [0, 1, 2, 3])]),
    ({"cpulists": {0: "0-1,4-5", 1: "2-3,6-7"}}, ALL, [(0, [0, 1, 4, 5]), (1, [2, 3, 6, 7])]),
    ({"cpulists": {0: "0", 1: "1", 2: "2", 3: "3"}}, ALL, [(n, [n]) for n in range(4)]),
    ({"cpulists": {0: "0-3", 8: "4-7"}, "online": "0,8"}, ALL, [(0, [0, 1, 2, 3]), (8, [4, 5, 6, 7])]),  # numbers apart
    ({"cpulists": {0: "0-3", 1: ""}}, ALL, [(0, [0, 1, 2, 3])]),  # node 1 has memory only, such as CXL
    ({"cpulists": {0: "0-3", 1: "4-7"}}, [0, 5, 6], [(0, [0]), (1, [5, 6])]),  # an affinity mask, or CPUs offline
    ({"cpulists": {0: "0-3", 1: "4-7"}}, [4, 5], [(1, [4, 5])]),
    ({"cpulists": {0: "0-3", 1: "4-7"}, "allowed": "1"}, ALL, [(1, [4, 5, 6, 7, 0, 1, 2, 3])]),  # a cpuset
    ({"cpulists": {0: "0-1", 1: "2-3", 2: "4-5"}, "memory": {1: 0}, "distances": {0: "10 20 30", 1: "30 10 20",
                                                                                 2: "30 20 10"}},
     ALL, [(0, [0, 1]), (2, [4, 5, 2, 3])]),  # node 1 has CPUs only; node 2 is nearest
    ({"cpulists": {0: "0-1"}, "online": "0-1"}, ALL, [(0, [0, 1])]),  # files of node 1 missing
    ({"cpulists": {0: "nonsense"}}, [0, 1], [(-1, [0, 1])]),
])  # fmt: skip
def test_topologies(tmp_path, files, cpus, expected):
    assert _ext.read_nodes(machine(tmp_path, **files), cpus) == expected


def test_without_topology_there_is_one_node(tmp_path):
    assert _ext.read_nodes(str(tmp_path), [2, 3]) == [(-1, [2, 3])]


def test_this_process_has_each_cpu_once():
    cpus = [cpu for _, cpus in _ext.nodes() for cpu in cpus]
    assert sorted(cpus) == sorted(os.sched_getaffinity(0))


def in_child(code: str, **env) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, env={**os.environ, **env},
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()


def test_threads_and_experts_follow_the_cpus():
    """Twelve CPUs against four: three quarters of the threads and of the experts, in turn."""
    code = """
from kjax import _ext
_ext.make_up_nodes([list(range(12)), list(range(12, 16))])
print(_ext.thread_nodes())
print(_ext.spread(8))
try: _ext.make_up_nodes([[0]])
except RuntimeError as error: print(error)
"""
    threads, experts, error = in_child(code, KJAX_THREADS="4")
    assert sorted(eval(threads)) == [0, 0, 0, 1]
    assert [eval(experts)[i:i + 4].count(1) for i in (0, 4)] == [1, 1]
    assert "before the first kernel call" in error


RESULTS = """
import sys, numpy as np
import experts_cases as cases
from kjax import _ext
nodes = {nodes}
if nodes: _ext.make_up_nodes(nodes)
_ext.set_row_memory({rows})
from test_storage import files, bits_of
print(bits_of(files(sys.argv[1]), "{storage}"))
print(len(_ext.nodes()), len(set(_ext.thread_nodes())))
"""


@pytest.fixture(scope="module")
def mapped(tmp_path_factory):
    """A directory with expert files, and the digest of all results in mapped mode on this machine."""
    from test_storage import bits_of, files, write
    directory = tmp_path_factory.mktemp("experts")
    write(directory)
    return directory, bits_of(files(directory), "mapped")


@pytest.mark.parametrize("nodes, threads, rows", [
    ([[0], [1]], 2, 0), ([[0], [1]], 1, 0), ([[0], [1]], 5, 1 << 20), ([[0, 1], [2, 3], [4, 5], [6, 7]], 8, 0),
    ([[0], [1], [2], [3]], 3, 0), ([[0, 1, 2], [3]], 4, 3000),
])  # fmt: skip
def test_bits_do_not_depend_on_the_nodes(mapped, nodes, threads, rows):
    """
    One queue of tasks per node, also where a node has no thread, or more threads than cores; all rows in memory at a
    time, and each expert's where those of another lay, which waits across the queues.
    """
    directory, expected = mapped
    code = RESULTS.format(nodes=nodes, rows=rows, storage="resident").replace("sys.argv[1]", repr(str(directory)))
    digest, counts = in_child(code, KJAX_THREADS=str(threads))
    assert digest == expected
    assert counts == f"{len(nodes)} {min(len(nodes), threads)}"


def test_memory_of_a_node_is_usable_where_the_system_cannot_place_it():
    code = """
from kjax import _ext
_ext.make_up_nodes([[0], [1]])
memory, refused = _ext.host_memory(5 << 20, 1)
memory[:] = 3
print(int(memory[-1]), memory.ctypes.data % (2 << 20), refused)
"""
    value, offset, *refused = in_child(code)[0].split(" ", 2)
    assert (value, offset) == ("3", "0") and (not refused or refused[0].startswith("mbind"))


def test_a_store_tells_what_the_system_would_not_place(tmp_path):
    """Of memory of its own, from a huge page on: less lies on the heap, of which the system is not asked."""
    if len(_ext.nodes()) > 1:
        pytest.skip("this machine has the nodes")
    code = f"""
from kjax import _ext
from test_storage import *
_ext.make_up_nodes([[0], [1]])
for name, size in (("small", 32), ("large", 512)):
    directory = Path({str(tmp_path)!r}) / name
    directory.mkdir()
    write(directory, layers=1, experts=8, d=size, f=size)
    print(name, ExpertStore(files(directory, layers=1, experts=8), storage="resident").refused)
"""
    small, large = in_child(code)[-2:]
    assert small == "small " and large.startswith("large mbind"), (small, large)


PLACED = """
import os, sys, threading
import numpy as np
from kjax import _ext
from kjax.offload import resident
from test_storage import *
_ext.make_up_nodes([[0], [1], [2]])
memory, told, pinned, copied = [], [], {}, []
host_memory, set_nodes, read = _ext.host_memory, _ext.Store.set_nodes, resident._read
def noted_memory(size, node):
    memory.append((node, host_memory(size, node)[0]))
    return memory[-1][1], ""
def noted_read(handle, out, *args):
    copied.append((pinned[threading.get_ident()], out.ctypes.data))
    read(handle, out, *args)
_ext.host_memory, resident._read = noted_memory, noted_read
_ext.Store.set_nodes = lambda store, nodes: told.append(nodes.tolist()) or set_nodes(store, nodes)
os.sched_setaffinity = lambda _, cpus: pinned.__setitem__(threading.get_ident(), cpus)
found = files(sys.argv[1])
store = ExpertStore(found, storage="resident")
nodes = _ext.spread(store.experts)
assert [node for node, _ in memory] == [0, 1, 2] and told == [nodes] and set(nodes) == {0, 1, 2}, (memory, told, nodes)
assert len(copied) >= 3 * store.experts
for cpus, at in copied:
    [node] = [node for node, array in memory if array.ctypes.data <= at < array.ctypes.data + array.size]
    assert cpus == [node], (cpus, node)
again = resident.Resident([[entry for layer in found for entry in layer[e].values()] for e in range(store.experts)])
for expert, node in enumerate(nodes):
    assert {again.place(entry)[0] for layer in found for entry in layer[expert].values()} == {node}
"""


def test_each_expert_is_copied_to_its_node_by_threads_there(mapped):
    in_child(PLACED.replace("sys.argv[1]", repr(str(mapped[0]))))


def test_nodes_of_a_store_are_checked():
    store = _ext.Store(1, 2, 4, 4, "bf16")
    with pytest.raises(ValueError, match="node 99 is not in 0"):
        store.set_nodes(np.array([0, 99], np.int32))
    with pytest.raises(ValueError, match="there is no node -1"):
        _ext.host_memory(10, -1)
