"""What each operation costs on other chips: memory of its program compiled for a TPU, and rooflines.

    pip install -e '.[tpu]'
    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python -m benchmarks.compiled --json=FILE

First table: every operation at the sizes of `--workload`, compiled by XLA and Mosaic for each `--topology`
without a device: temporary memory, and the bytes that XLA counts as read and written. XLA programs are traced
as on a CPU, so attention runs in blocks wherever it does there. Second table: lower bounds on the time in
milliseconds, from the FLOPs of the textbook form at the vendor's bfloat16 peak (float32 takes three to six
passes), and from the bytes of arguments and results. `benchmarks.roofline` lists the chips.
"""

from collections.abc import Iterator
from typing import Any

import jax
from absl import flags
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from rich.console import Console
from rich.progress import track

from benchmarks import measuring, operations
from benchmarks.measuring import Key
from benchmarks.operations import OPERATIONS
from benchmarks.roofline import CHIPS, Chip
from benchmarks.workloads import WORKLOADS
from tarq_jax import cli, reporting

TOPOLOGY = flags.DEFINE_list("topology", ["v5e:2x2", "v6e:2x2"], "TPUs to compile for, by libtpu's names.")
WORKLOAD = flags.DEFINE_list(
    "workload", ["paper", "config"], "Workloads of `benchmarks.workloads`.", allow_override=True)
JSON = cli.json_flag()

IMPLEMENTATIONS = ["plain", "xla", "pallas"]
FIRST = ("chip", "operation", "workload", "direction", "implementation", "temporary_mb", "bytes_accessed_mb")
SECOND = ("chip", "operation", "workload", "direction", "flop_bound_ms", "byte_bound_ms", "bound_ms")


def shapes_of(key: Key) -> Any:
    """Shapes of the arguments."""
    return jax.eval_shape(
        lambda: operations.make_arguments(OPERATIONS[key.operation], WORKLOADS[key.workload]))


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


def bounds(chip: Chip, flops: float, moved: float) -> dict[str, float]:
    """Milliseconds by FLOPs and by bytes, and the larger of both.

    Example:
      >>> bounds(Chip(2e12, 16e9, 1e12, 0.0, 1, 0.0), flops=4e9, moved=1e9)
      {'flop_bound_ms': 2.0, 'byte_bound_ms': 1.0, 'bound_ms': 2.0}
    """
    by_flops, by_bytes = 1e3 * flops / chip.flops, 1e3 * moved / chip.memory_bandwidth
    return {"flop_bound_ms": by_flops, "byte_bound_ms": by_bytes, "bound_ms": max(by_flops, by_bytes)}


def rooflines(keys: list[Key]) -> Iterator[dict[str, Any]]:
    """A row per chip and `plain` program, whose operations XLA counts on CPU; nothing is run."""
    for key in keys:
        compiled = jax.jit(measuring.function_of(key)).lower(*shapes_of(key)).compile()
        memory, cost = measuring.memory_of(compiled), measuring.cost_of(compiled)
        for name, chip in CHIPS.items():
            yield {"chip": name} | key._asdict() | bounds(chip, cost["flops"], memory["bytes"])


def main() -> None:
    """Compiles what the flags ask for and prints both tables."""
    jax.config.update("jax_enable_compilation_cache", False)  # it cannot read TPU programs without a TPU
    console = Console()
    keys = measuring.keys(list(OPERATIONS), cli.names(WORKLOAD, WORKLOADS), IMPLEMENTATIONS)
    first = [row for topology in TOPOLOGY.value for row in for_tpu(keys, topology, console)]
    second = list(rooflines([key for key in keys if key.implementation == "plain"]))
    reporting.print_table(first, "compiled for a TPU", FIRST)
    reporting.print_table(second, "bounds", SECOND)
    if JSON.value:
        reporting.write_rows(first + second, JSON.value)


if __name__ == "__main__":
    cli.run(main)
