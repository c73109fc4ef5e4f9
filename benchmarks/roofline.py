"""What a step costs on other machines: time to compute, to read memory and to communicate, by formula.

These are all assumptions. Scaling is weak: the number of requests per device is fixed. Devices reach the
shares below of the vendors' stated peaks. A collective runs at the speed of the slowest link that it crosses,
by the ring algorithm; an all-to-all runs as if all devices were neighbours. Only computing and memory access
overlap. Numbers are float32: bfloat16 would halve the bytes of activations. Bytes of memory are those that a
step cannot avoid (tables, moments and gradients by row) plus XLA's count for the rest of the step on CPU,
where XLA fuses less than on an accelerator. Statistics of codebooks (the same on any number of devices) and
revival (at most 65,536 latents, occasionally) are left out.
"""

import math
from typing import Any, NamedTuple

from tarq_jax.training import exchange

FLOAT = 4  # bytes
COMPUTE_SHARE, MEMORY_SHARE, LINK_SHARE = 0.3, 0.7, 0.7  # reached shares of the stated peaks


class Chip(NamedTuple):
    """One accelerator, with its vendor's numbers."""

    flops: float  # per second, dense bfloat16
    memory: float  # bytes
    memory_bandwidth: float  # bytes per second
    link: float  # bytes per second that it sends to devices in its island, one direction
    island: int  # devices that such links connect
    beyond: float  # bytes per second that it sends out of its island, one direction
    exponentials: float = math.inf  # per second; infinite where the vendor publishes no number


# Exponentials per second: 16 per clock and multiprocessor (CUDA C++ Programming Guide, throughput of
# arithmetic), on 132 multiprocessors at 1.83 GHz, the clock that gives 989 TFLOP/s.
HOPPER = 132 * 16 * 1.83e9
CHIPS = {
    # cloud.google.com/tpu/docs/v5e: 400 GB/s both ways; 6.4 Tb/s of data-centre network per pod of 256
    "TPU v5e": Chip(197e12, 16e9, 819e9, 200e9, 256, 3.1e9),
    # cloud.google.com/tpu/docs/v5p: 4,800 Gb/s each way; a pod has more chips than are considered here, so
    # `beyond`, a host's 200 Gb/s for 4 chips, does not matter
    "TPU v5p": Chip(459e12, 95e9, 2765e9, 600e9, 8960, 6.2e9),
    # cloud.google.com/tpu/docs/v6e: 800 GB/s both ways; 25.6 Tb/s of data-centre network per pod of 256
    "TPU v6e": Chip(918e12, 32e9, 1640e9, 400e9, 256, 12.5e9),
    # nvidia.com H100 SXM: NVLink 900 GB/s both ways between 8 GPUs; beyond, one 400 Gb/s NIC per GPU
    "H100": Chip(989e12, 80e9, 3350e9, 450e9, 8, 50e9, HOPPER),
    "H200": Chip(989e12, 141e9, 4800e9, 450e9, 8, 50e9, HOPPER),
}
# Passes over a table by an optimizer that visits every row: the gradient is made, read for its norm and read
# for the update, parameters and optimizer state are read and written.
TABLE_PASSES = {"adamw": 3 + 2 + 4, "lazy_adam": 3 + 2 + 4, "rowwise_adagrad": 3 + 2}
# Passes over the looked-up rows by an optimizer that visits only these: parameters and state are also copied
# out of the table and back. Sorting of ids is not counted.
ROW_PASSES = {"lazy_adam": 3 + 6 + 12, "rowwise_adagrad": 3 + 6}
KEPT = {"adamw": 3, "lazy_adam": 3, "rowwise_adagrad": 1}  # arrays like the table, without the gradient


class Workload(NamedTuple):
    """The work of a step on each device."""

    flops: float  # per request
    activation_bytes: float  # read and written per request, without tables
    ids: int  # looked up per request
    width: int  # D
    rows: int  # of the table
    dense_parameters: int  # all parameters outside the table
    table_optimizer: str


class Split(NamedTuple):
    """A mesh, and the number of devices that split a table."""

    data: int
    model: int
    table: int  # `model`, or all devices

    @property
    def devices(self) -> int:
        """Number of devices of the mesh."""
        return self.data * self.model


def table_cost(work: Workload, split: Split, requests: int) -> tuple[float, float]:
    """Bytes of memory that a step reads and writes for its optimizer of the table, and bytes that it needs.

    Row-wise optimizers visit the rows that the batch of all devices looks up, if a device keeps twice as many
    or more (`tarq_jax.training.table_rows`).
    """
    optimizer, block = work.table_optimizer, work.rows / split.table
    looked_up, row = split.devices * requests * work.ids, work.width * FLOAT
    if optimizer in ROW_PASSES and 2 * looked_up <= block:
        return (ROW_PASSES[optimizer] * looked_up * row,
                (KEPT[optimizer] * block + (KEPT[optimizer] + 1) * looked_up) * row)
    return TABLE_PASSES[optimizer] * block * row, (KEPT[optimizer] + 1) * block * row


def lookup_bytes(work: Workload, split: Split, requests: int) -> dict[str, tuple[float, int]]:
    """Bytes that a device sends for look-ups and their gradients, with the number of devices that take part.

    The formula follows `tarq_jax.training.sharded_embedding`. The devices that split the table gather ids and
    reduce rows. If these devices are many, they exchange ids and rows with the owners instead; the formula
    assumes one round, for distinct and evenly spread ids. If the table has copies, gradients are also
    gathered over the copies, or blocks are summed over them, whichever is less.
    """
    ids, row, copies = requests * work.ids, FLOAT * (work.width + 1), split.devices // split.table
    asked = exchange.capacity(ids, split.table)  # ids that each device sends to each owner
    exchanged = 2 * asked <= ids
    between = (split.table - 1) * (asked if exchanged else ids) * row
    brought = split.table * (asked if exchanged else ids) * row
    block = 2 * (copies - 1) / copies * work.rows / split.table * work.width * FLOAT
    return {
        "look_up": (between, split.table),
        "table_gradient": (between, split.table),
        "copies": (min((copies - 1) * brought, block), split.devices),
    }


def network_bytes(work: Workload, split: Split, requests: int) -> dict[str, tuple[float, int]]:
    """`lookup_bytes`, and the all-reduce of the other parameters' gradient."""
    share = 2 * (split.devices - 1) / split.devices
    dense = {"dense_gradient": (share * work.dense_parameters * FLOAT, split.devices)}
    return lookup_bytes(work, split, requests) | dense


def roofline(chip: Chip, work: Workload, split: Split, requests: int) -> dict[str, Any]:
    """Time of a step with `requests` per device in milliseconds, its efficiency, and a device's memory.

    Efficiency is the time without communication divided by the time with it.
    """
    moved = network_bytes(work, split, requests)
    compute = requests * work.flops / (COMPUTE_SHARE * chip.flops)
    passes, kept = table_cost(work, split, requests)
    memory = (requests * work.activation_bytes + passes) / (MEMORY_SHARE * chip.memory_bandwidth)
    network = sum(sent / (LINK_SHARE * (chip.link if group <= chip.island else chip.beyond))
                  for sent, group in moved.values())
    alone = max(compute, memory)
    return {
        "compute_ms": 1e3 * compute, "memory_ms": 1e3 * memory, "network_ms": 1e3 * network,
        "network_mb": sum(sent for sent, _ in moved.values()) / 1e6,
        "step_ms": 1e3 * (alone + network), "efficiency": alone / (alone + network),
        "requests_per_second": split.devices * requests / (alone + network),
        "table_gb": kept / 1e9, "fits": "yes" if kept < chip.memory else "no",
    }
