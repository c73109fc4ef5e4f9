"""What a step costs on machines that are not here: time to compute, to read memory and to send, by formula.

Assumptions, all of them: weak scaling, a fixed number of requests a device; the shares below of what the
vendors state; a collective runs at the speed of the slowest link that it crosses, by the ring algorithm, an
all-to-all as if all were neighbours; nothing overlaps but computing and memory. Numbers are float32:
bfloat16 would halve what activations read. Bytes of memory are those that a step cannot avoid (tables,
moments and gradients by row) plus what XLA counts for the rest of the step on CPU, which fuses less than it
would on an accelerator. Statistics of codebooks (the same on any number of devices) and revival (at most
65,536 latents, now and then) are left out.
"""

from typing import Any, NamedTuple

from tarq_jax.training import exchange

FLOAT = 4  # bytes
COMPUTE_SHARE, MEMORY_SHARE, LINK_SHARE = 0.3, 0.7, 0.7  # of the stated peak that is reached


class Chip(NamedTuple):
    """One accelerator, as its vendor states it."""

    flops: float  # a second, dense bfloat16
    memory: float  # bytes
    memory_bandwidth: float  # bytes a second
    link: float  # bytes a second that it sends to others in its island, one direction
    island: int  # devices that such links join
    beyond: float  # bytes a second that it sends out of its island, one direction


CHIPS = {
    # cloud.google.com/tpu/docs/v5e: 400 GB/s both ways; 6.4 Tb/s of data-centre network a pod of 256
    "TPU v5e": Chip(197e12, 16e9, 819e9, 200e9, 256, 3.1e9),
    # cloud.google.com/tpu/docs/v5p: 4,800 Gb/s each way; a pod holds more than is looked at here, so that
    # `beyond`, a host's 200 Gb/s for 4 chips, does not matter
    "TPU v5p": Chip(459e12, 95e9, 2765e9, 600e9, 8960, 6.2e9),
    # cloud.google.com/tpu/docs/v6e: 800 GB/s both ways; 25.6 Tb/s of data-centre network a pod of 256
    "TPU v6e": Chip(918e12, 32e9, 1640e9, 400e9, 256, 12.5e9),
    # nvidia.com H100 SXM: NVLink 900 GB/s both ways between 8; one 400 Gb/s NIC a GPU beyond
    "H100": Chip(989e12, 80e9, 3350e9, 450e9, 8, 50e9),
    "H200": Chip(989e12, 141e9, 4800e9, 450e9, 8, 50e9),
}
# Passes over a table of an optimizer that looks at every row: gradient made and read, parameters and what
# is kept of them read and written.
TABLE_PASSES = {"adamw": 3 + 2 + 4, "lazy_adam": 3 + 2 + 4, "rowwise_adagrad": 3 + 2}


class Workload(NamedTuple):
    """What a step does on each device."""

    flops: float  # a request
    activation_bytes: float  # read and written a request, tables aside
    ids: int  # looked up a request
    width: int  # D
    rows: int  # of the table
    dense_parameters: int  # of everything else
    table_optimizer: str


class Split(NamedTuple):
    """A mesh, and the devices along its axes that split a table."""

    data: int
    model: int
    table: int  # `model`, or all

    @property
    def devices(self) -> int:
        """All of them."""
        return self.data * self.model


def lookup_bytes(work: Workload, split: Split, requests: int) -> dict[str, tuple[float, int]]:
    """Bytes that a device sends for look-ups and their gradient, with the devices that take part in each.

    As `tarq_jax.training.lookup` does it: over the devices that split the table ids are gathered and rows
    reduced, or, where these are many, both exchanged with owners, in one round, as ids are different and
    spread evenly; gradients are gathered over copies besides, or blocks summed over them, whichever is less.
    """
    ids, row, copies = requests * work.ids, FLOAT * (work.width + 1), split.devices // split.table
    asked = exchange.capacity(ids, split.table)  # of each device by each
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
    """`lookup_bytes`, and the all-reduce of the gradient of everything else."""
    share = 2 * (split.devices - 1) / split.devices
    dense = {"dense_gradient": (share * work.dense_parameters * FLOAT, split.devices)}
    return lookup_bytes(work, split, requests) | dense


def roofline(chip: Chip, work: Workload, split: Split, requests: int) -> dict[str, Any]:
    """Milliseconds of a step of `requests` a device, its efficiency, and the memory that a device needs.

    Efficiency is the time without a network over the time with it.
    """
    block = work.rows / split.table * work.width * FLOAT
    moved = network_bytes(work, split, requests)
    compute = requests * work.flops / (COMPUTE_SHARE * chip.flops)
    passes = TABLE_PASSES[work.table_optimizer]
    memory = (requests * work.activation_bytes + passes * block) / (MEMORY_SHARE * chip.memory_bandwidth)
    network = sum(sent / (LINK_SHARE * (chip.link if group <= chip.island else chip.beyond))
                  for sent, group in moved.values())
    alone = max(compute, memory)
    kept = {"adamw": 4, "lazy_adam": 4, "rowwise_adagrad": 2}[work.table_optimizer]  # gradient included
    return {
        "compute_ms": 1e3 * compute, "memory_ms": 1e3 * memory, "network_ms": 1e3 * network,
        "network_mb": sum(sent for sent, _ in moved.values()) / 1e6,
        "step_ms": 1e3 * (alone + network), "efficiency": alone / (alone + network),
        "requests_per_second": split.devices * requests / (alone + network),
        "table_gb": kept * block / 1e9, "fits": "yes" if kept * block < chip.memory else "no",
    }
