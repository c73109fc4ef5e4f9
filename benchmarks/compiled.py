"""What each operation costs on other chips: memory of its program compiled for a TPU, and rooflines.

    pip install -e '.[tpu]'
    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python -m benchmarks.compiled --json=FILE

First table: every operation at the sizes of `--workload`, compiled by XLA and Mosaic for each `--topology`
without a device: temporary memory, and the bytes that XLA counts as read and written. XLA programs are those
without blocks, which an accelerator takes at these sizes. Second table: lower bounds on the time in bfloat16
in milliseconds, from FLOPs and exponentials of the textbook form, and from the bytes of arguments and
results. `benchmarks.roofline` lists the chips.
"""

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
from benchmarks.workloads import WORKLOADS
from tarq_jax import cli, reporting

TOPOLOGY = flags.DEFINE_list("topology", ["v5e:2x2", "v6e:2x2"], "TPUs to compile for, by libtpu's names.")
WORKLOAD = flags.DEFINE_list(
    "workload", ["paper", "config"], "Workloads of `benchmarks.workloads`.", allow_override=True)
JSON = cli.json_flag()

IMPLEMENTATIONS = ["plain", "xla", "xla_whole", "pallas"]
FIRST = ("chip", "operation", "workload", "direction", "implementation", "temporary_mb", "bytes_accessed_mb")
SECOND = ("chip", "operation", "workload", "direction", "flop_bound_ms", "byte_bound_ms", "exp_bound_ms",
          "bound_ms", "bound")


def shapes_of(key: Key, dtype: Any = jnp.float32) -> Any:
    """Shapes of the arguments."""
    return jax.eval_shape(
        lambda: operations.make_arguments(OPERATIONS[key.operation], WORKLOADS[key.workload], dtype))


def compiled_keys(workloads: Sequence[str]) -> list[Key]:
    """The programs to compile. None where XLA chooses blocks: it would choose those of this machine."""
    keys = measuring.keys(list(OPERATIONS), list(workloads), IMPLEMENTATIONS)
    return [key for key in keys if key.implementation != "xla" or key._replace(implementation="xla_whole")
            not in keys]


def for_tpu(keys: list[Key], topology: str, console: Console) -> Iterator[dict[str, Any]]:
    """A row per program.

    Raises:
      ValueError: libtpu does not know the topology, or is not installed.
    """
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, chips_per_host_bounds=(2, 2, 1))
    except RuntimeError as error:
        raise ValueError(f"cannot compile for {topology!r}, expected a topology of libtpu, which "
                         f"`pip install -e '.[tpu]'` installs: {error}") from None
    chip: Any = description.devices[0]
    for key in track(keys, f"compiling for {topology}", console=console):
        placed = [jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=SingleDeviceSharding(chip))
                  for shape in shapes_of(key)]
        compiled = jax.jit(measuring.function_of(key)).lower(*placed).compile()
        yield key._asdict() | {
            "chip": chip.device_kind, "temporary_mb": measuring.memory_of(compiled)["temporary_mb"],
            "bytes_accessed_mb": measuring.cost_of(compiled)["bytes_accessed"] / 1e6}


def rooflines(keys: list[Key]) -> Iterator[dict[str, Any]]:
    """A row per chip and `plain` program, whose operations XLA counts on CPU; nothing is run.

    Operations are counted in float32, because XLA adds conversions to programs in bfloat16.
    """
    for key in keys:
        wide, narrow = (jax.jit(measuring.function_of(key)).lower(*shapes_of(key, dtype)).compile()
                        for dtype in (jnp.float32, jnp.bfloat16))
        cost, moved = measuring.cost_of(wide), measuring.memory_of(narrow)["bytes"]
        for name, chip in CHIPS.items():
            peaks = Peaks(chip.flops, chip.memory_bandwidth, chip.exponentials)
            found = peaks.bounds(cost.get("flops", 0.0), moved, cost["exponentials"])
            yield {"chip": name} | key._asdict() | found | highest(found)


def main() -> None:
    """Compiles what the flags ask for and prints both tables."""
    jax.config.update("jax_enable_compilation_cache", False)  # it cannot read TPU programs without a TPU
    console = Console()
    keys = compiled_keys(cli.names(WORKLOAD, WORKLOADS))
    first = [row for topology in TOPOLOGY.value for row in for_tpu(keys, topology, console)]
    second = list(rooflines([key for key in keys if key.implementation == "plain"]))
    reporting.print_table(first, "compiled for a TPU", FIRST)
    reporting.print_table(second, "bounds", SECOND)
    if JSON.value:
        reporting.write_rows(first + second, JSON.value)


if __name__ == "__main__":
    cli.run(main)
