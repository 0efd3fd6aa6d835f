"""The time of a step on a described machine: a sum of four parts, each bound by arithmetic or by memory.

    experts     for each direction and layer, the longer of operations / host_peak and bytes read / host_bandwidth;
                experts that main memory cannot hold come from disk instead
    device      operations / device_peak, and then / device_bandwidth the bytes that the traced step writes and reads,
                or three reads of its weights (forward, recompute, backward) where these are more
    transfers   x and y, then x, dy and dx, of each layer over PCIe
    optimiser   seven accesses to each trained number: gradient, master and moments read, three of them written

Nothing overlaps: a call to the host stops the device until it returns.
"""

from kjax.planning.machine import Machine
from kjax.planning.report import Row
from kjax.planning.sizes import Sizes


def step(sizes: Sizes, on: Machine, device_operations: float, device_bytes: float, stash: float, cached: float
         ) -> tuple[Row, ...]:
    """Seconds per part; empty where a speed is not known. cached: bytes of main memory that experts can take."""
    if not on.timed:
        return ()
    rows = []
    if sizes.hosted:
        rows += [Row("experts, forward", _direction(sizes, on, sizes.route_operations, 1.0, cached), _bound(sizes, on)),
                 Row("experts, backward", _direction(sizes, on, sizes.route_operations, 1.0, cached))]
        if missed := sizes.missed(stash):
            rows.append(Row("experts, again", missed * _direction(sizes, on, sizes.route_operations * 2 / 3, 2 / 3,
                                                                  cached), "gate and up, where the stash is full"))
        if sizes.expert_adapters:
            rows.append(Row("expert adapters", sizes.adapter_operations() / on.host_peak))
    rows += [Row("device, products", device_operations / on.device_peak, "attention, shared experts, head"),
             Row("device, memory", device_bytes / on.device_bandwidth, "what lies between them")]
    if sizes.hosted and on.device is not None:
        moved = 5.0 * sizes.tokens * sizes.model.hidden_size * sizes.itemsize * sizes.model.num_moe_layers
        rows.append(Row("transfers", moved / on.pcie))
    here = sizes.host_adapters
    there = sum(sizes.trained.values()) - here
    rows.append(Row("optimiser", 7 * 4 * (here / on.host_bandwidth + there / on.device_bandwidth)))
    return tuple(rows)


def _direction(sizes: Sizes, on: Machine, operations: float, part: float, cached: float) -> float:
    """part: of the weights that are read."""
    read = part * sizes.share_met * sizes.experts
    seconds = max(operations / on.host_peak, read / on.host_bandwidth)
    if sizes.experts > cached and on.disk_bandwidth is not None:
        seconds = max(seconds, read * (1 - cached / sizes.experts) / on.disk_bandwidth)
    return seconds


def _bound(sizes: Sizes, on: Machine) -> str:
    memory = sizes.share_met * sizes.experts / on.host_bandwidth
    return "bound by memory" if memory > sizes.route_operations / on.host_peak else "bound by arithmetic"
