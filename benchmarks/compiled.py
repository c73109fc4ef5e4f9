"""What each operation costs on other chips: memory of its program compiled for a TPU, and rooflines.

    pip install -e '.[tpu]'
    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python -m benchmarks.compiled --json=FILE

First table: every operation at the sizes of `--workload`, compiled by XLA and Mosaic for each `--topology`
without a device: temporary memory, and the bytes that XLA counts as read and written. XLA programs are those
without blocks, which an accelerator takes at these sizes. Second table: lower bounds on the time in bfloat16
in milliseconds, from the least FLOPs and exponentials of any form without loops, and from the bytes of
arguments and results. `benchmarks.roofline` lists the chips. Third table: the largest size that each kernel
accepts, the others as in a request; if one does not compile, the exit code is 1.
"""

import bisect
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from rich.console import Console
from rich.progress import track

from benchmarks import measuring, operations
from benchmarks.machine import Peaks, highest
from benchmarks.measuring import Key
from benchmarks.operations import OPERATIONS
from benchmarks.roofline import CHIPS
from benchmarks.workloads import WORKLOADS, Sizes
from tarq_jax import cli, reporting

TOPOLOGY = flags.DEFINE_list("topology", ["v5e:2x2", "v6e:2x2"], "TPUs to compile for, by libtpu's names.")
WORKLOAD = flags.DEFINE_list(
    "workload", ["paper", "config"], "Workloads of `benchmarks.workloads`.", allow_override=True)
JSON = cli.json_flag()

IMPLEMENTATIONS = ["plain", "xla", "xla_whole", "pallas"]
FIRST = ("chip", "operation", "workload", "direction", "implementation", "temporary_mb", "bytes_accessed_mb")
SECOND = ("chip", "operation", "workload", "direction", "flop_bound_ms", "byte_bound_ms", "exp_bound_ms",
          "bound_ms", "bound")
THIRD = ("chip", "operation", "axis", "largest", "note")
GROWING = {"encode": "K", "attend": "D", "personalize": "D", "expand": "D", "look_up": "K",
           "look_up_expansion": "K", "align": "K"}  # the axis that a kernel holds whole, in steps of `STEP`
STEP = 64


def compiled_keys(workloads: Sequence[str]) -> list[Key]:
    """The programs to compile. None where XLA chooses blocks: it would choose those of this machine."""
    keys = measuring.keys(list(OPERATIONS), list(workloads), IMPLEMENTATIONS)
    return [key for key in keys if key.implementation != "xla" or key._replace(implementation="xla_whole")
            not in keys]


def chip_of(topology: str) -> Any:
    """A device that can be compiled for.

    Raises:
      ValueError: libtpu does not know the topology, or is not installed.
    """
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, chips_per_host_bounds=(2, 2, 1))
    except RuntimeError as error:
        raise ValueError(f"cannot compile for {topology!r}, expected a topology of libtpu, which "
                         f"`pip install -e '.[tpu]'` installs: {error}") from None
    return description.devices[0]


def compile_for(chip: Any, function: operations.Function, shapes: Any) -> Any:
    """The program for this chip."""
    placed = [jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=SingleDeviceSharding(chip))
              for shape in shapes]
    return jax.jit(function).lower(*placed).compile()


def for_tpu(keys: list[Key], chip: Any, console: Console) -> Iterator[dict[str, Any]]:
    """A row per program."""
    for key in track(keys, f"compiling for {chip.device_kind}", console=console):
        shapes = operations.specs(OPERATIONS[key.operation], WORKLOADS[key.workload])
        compiled = compile_for(chip, measuring.function_of(key), shapes)
        yield key._asdict() | {
            "chip": chip.device_kind, "temporary_mb": measuring.memory_of(compiled)["temporary_mb"],
            "bytes_accessed_mb": measuring.cost_of(compiled).get("bytes_accessed", math.nan) / 1e6}


def largest(operation: str) -> Sizes:
    """The sizes of a request, with the largest axis of `GROWING` that the kernel does not refuse."""
    sizes, axis = WORKLOADS["paper"], GROWING[operation]

    def takes(steps: int) -> bool:
        shapes = operations.specs(OPERATIONS[operation], sizes._replace(**{axis: steps * STEP}))
        try:
            jax.eval_shape(OPERATIONS[operation].implementations["pallas"], *shapes)
        except NotImplementedError:
            return False
        return True

    refused = next(2**power for power in range(20) if not takes(2**power))
    steps = bisect.bisect_left(range(refused), True, key=lambda steps: steps > 0 and not takes(steps)) - 1
    return sizes._replace(**{axis: steps * STEP})


def at_the_limits(chip: Any, console: Console) -> Iterator[dict[str, Any]]:
    """A row per kernel; `note` says why it does not compile at the largest size that it accepts."""
    for operation, axis in track(GROWING.items(), f"limits on {chip.device_kind}", console=console):
        sizes, note = largest(operation), ""
        try:
            compile_for(chip, OPERATIONS[operation].implementations["pallas"],
                        operations.specs(OPERATIONS[operation], sizes))
        except jax.errors.JaxRuntimeError as error:
            note = str(error).splitlines()[0]
        yield {"chip": chip.device_kind, "operation": operation, "axis": axis,
               "largest": getattr(sizes, axis), "note": note}


def rooflines(keys: list[Key]) -> Iterator[dict[str, Any]]:
    """A row per chip and `plain` program, whose operations XLA counts on CPU; nothing is run.

    Operations are counted in float32, because XLA adds conversions to programs in bfloat16.
    """
    def compiled(key, dtype):
        shapes = operations.specs(OPERATIONS[key.operation], WORKLOADS[key.workload], dtype)
        return jax.jit(measuring.function_of(key)).lower(*shapes).compile()

    for key in keys:
        cost = measuring.least(measuring.cost_of(compiled(form, jnp.float32))
                               for form in measuring.counted(key))
        moved = measuring.memory_of(compiled(key, jnp.bfloat16))["bytes"]
        for name, chip in CHIPS.items():
            peaks = Peaks(chip.flops, chip.memory_bandwidth, chip.exponentials)
            found = peaks.bounds(moved=moved, **cost)
            yield {"chip": name} | key._asdict() | found | highest(found)


def main() -> None:
    """Compiles what the flags ask for and prints the tables."""
    jax.config.update("jax_enable_compilation_cache", False)  # it cannot read TPU programs without a TPU
    console = Console()
    keys = compiled_keys(cli.names(WORKLOAD, WORKLOADS))
    chips = [chip_of(topology) for topology in TOPOLOGY.value]
    first = [row for chip in chips for row in for_tpu(keys, chip, console)]
    third = [row for chip in chips for row in at_the_limits(chip, console)]
    second = list(rooflines([key for key in keys if key.implementation == "plain"]))
    reporting.print_table(first, "compiled for a TPU", FIRST)
    reporting.print_table(second, "bounds", SECOND)
    reporting.print_table(third, "largest sizes that kernels accept", THIRD)
    if JSON.value:
        reporting.write_rows(first + second + third, JSON.value)
    if failed := [f"{row['operation']} on {row['chip']}: {row['note']}" for row in third if row["note"]]:
        raise ValueError("; ".join(failed))


if __name__ == "__main__":
    cli.run(main)
