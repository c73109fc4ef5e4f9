"""Bytes that a training step moves between devices, and its estimated cost on 8 to 4,096 devices.

    python -m benchmarks.scaling --json=benchmarks/results/scaling.json

First table: the step of TARQ is compiled for several mesh shapes of 8 virtual CPU devices with a table of a
million rows. The bytes of the collectives in its HLO (`tarq_jax.training.hlo`) are compared with the formula
for look-ups and gradients. Second table: estimates for real chips and a table of 100 million rows, from that
formula and a roofline (`benchmarks.roofline` lists every assumption). Only operations and bytes per request
are measured.
"""

import functools
import os
from collections.abc import Iterator
from typing import Any

# XLA takes the last of equal flags, and JAX looks for no GPU.
os.environ["XLA_FLAGS"] = " ".join([
    *os.environ.get("XLA_FLAGS", "").split(), "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0"])
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import ml_collections
from absl import flags
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import roofline
from tarq_jax import cli, data, reporting
from tarq_jax.config import default_config
from tarq_jax.training import hlo, setup, sharding
from tarq_jax.training.objectives import build
from tarq_jax.training.optimizers import make_optimizer

ROWS = flags.DEFINE_integer("rows", 100_000_000, "Rows of the table in the roofline.")
REQUESTS = flags.DEFINE_integer("requests", 256, "Requests per device and step in the roofline.")
TABLE = flags.DEFINE_enum("table", "rowwise_adagrad", sorted(roofline.TABLE_PASSES), "Optimizer of tables.")
JSON = cli.json_flag()

COMPILED_ROWS = 2**20
OVER_MODEL = (("embedding$", ("model",)),)
OVER_ALL = (("embedding$", (("data", "model"),)),)
MESHES = (((8, 1), ()), ((8, 1), OVER_MODEL), ((4, 2), OVER_MODEL), ((2, 4), OVER_MODEL),
          ((1, 8), OVER_MODEL), ((8, 1), OVER_ALL))
DEVICES = (8, 64, 512, 4096)
MODEL_AXIS = 8  # size of the roofline's `model` axis


def experiment(shape: tuple[int, int], rules: tuple, rows: int) -> ml_collections.ConfigDict:
    """TARQ with 64 requests per step; the table's rows are rounded up to a multiple of `rows`."""
    config = default_config()
    config.model.width, config.model.num_heads, config.model.hidden = 64, 4, (256, 128)
    config.model.table_multiple, config.optimizer.table = rows, TABLE.value
    config.mesh.data, config.mesh.model = shape
    config.mesh.rules = rules
    return config


@functools.cache
def dataset() -> data.Dataset:
    """The built-in task; its requests have 50 events and 16 candidates."""
    return data.synthetic.generate(data.SyntheticOptions(
        train_requests=64, validation_requests=1, test_requests=1))


def compiled(config: ml_collections.ConfigDict, devices: list[jax.Device]) -> tuple[Any, Any]:
    """The compiled step, and the shapes of its state; no array is created."""
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.model, devices)
    requests = dataset()
    objective = build(config.model, config.loss_weights, requests.schema, sharding.make_tables(config, mesh))
    optimizer = make_optimizer(config)
    state = jax.eval_shape(lambda: setup.init_state(config, objective, optimizer, requests))
    places = sharding.state_shardings(state, mesh, sharding.parse_rules(config.mesh.rules))
    state = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state, places)
    split = NamedSharding(mesh, PartitionSpec(sharding.BATCH))
    batch = next(data.train_batches(
        requests, "train", batch_size=config.batch_size, seed=0, **setup.batch_shapes(requests)))
    batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=split), batch)
    return setup.compile_step(config, objective, optimizer, mesh, state).lower(state, batch).compile(), state


def workload(rows: int) -> roofline.Workload:
    """Operations and bytes per request, as XLA counts them for one device and a small table."""
    config = experiment((1, 1), (), 1)
    step, state = compiled(config, jax.devices()[:1])
    cost = step.cost_analysis()
    sizes = {leaf.shape: leaf.size for leaf in jax.tree.leaves(state.params)}
    table = sizes[dataset().schema.num_items, config.model.width]
    shapes = setup.batch_shapes(dataset())
    return roofline.Workload(
        flops=cost["flops"] / config.batch_size, activation_bytes=cost["bytes accessed"] / config.batch_size,
        ids=shapes["history_length"] + shapes["num_candidates"], width=config.model.width, rows=rows,
        dense_parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params)) - table,
        table_optimizer=TABLE.value)


def moved_on_eight(work: roofline.Workload) -> Iterator[dict[str, Any]]:
    """A row per mesh of 8 devices: bytes that each device sends in a step, by kind of collective."""
    for shape, rules in MESHES:
        config = experiment(shape, rules, COMPILED_ROWS)
        step, _ = compiled(config, jax.devices())
        found = hlo.collectives(step.as_text())
        parts = 8 if rules is OVER_ALL else shape[1]
        split = roofline.Split(*shape, table=parts)
        formula = roofline.network_bytes(work._replace(rows=COMPILED_ROWS), split, config.batch_size // 8)
        by_kind, memory = hlo.bytes_by_kind(found), step.memory_analysis()
        yield {
            "mesh": f"{shape[0]}x{shape[1]}", "table_over": _name(rules),
            "table_mb": COMPILED_ROWS * work.width * 4 / 1e6,
            **{f"{kind.replace('-', '_')}_mb": by_kind.get(kind, 0) / 1e6 for kind in hlo.KINDS[:5]},
            "network_mb": sum(by_kind.values()) / 1e6,
            "formula_mb": sum(sent for sent, _ in formula.values()) / 1e6 if rules else None,
            "largest_mb": max(array.num_bytes for each in found for array in each.arrays) / 1e6,
            "state_mb": memory.argument_size_in_bytes / 1e6,
        }


def _name(rules: tuple) -> str:
    return {(): "nothing", OVER_MODEL: "model", OVER_ALL: "data, model"}[rules]


def estimates(work: roofline.Workload) -> Iterator[dict[str, Any]]:
    """A row per chip, number of devices and way to split the table."""
    for name, chip in roofline.CHIPS.items():
        for devices in DEVICES:
            for over, parts in (("model", MODEL_AXIS), ("data, model", devices)):
                split = roofline.Split(devices // MODEL_AXIS, MODEL_AXIS, parts)
                yield {"chip": name, "devices": devices, "mesh": f"{split.data}x{split.model}",
                       "table_over": over} | roofline.roofline(chip, work, split, REQUESTS.value)


def main() -> None:
    """Computes and prints both tables."""
    work = workload(ROWS.value)
    measured, estimated = list(moved_on_eight(work)), list(estimates(work))
    reporting.print_table(measured, (
        f"MB that each of 8 devices sends in a step of {default_config().batch_size} requests, as compiled"))
    reporting.print_table(estimated, (
        f"Roofline: {work.rows:,} rows of {work.width}, {REQUESTS.value} requests a device, "
        f"{work.flops / 1e6:,.0f} MFLOP, {work.activation_bytes / 1e6:,.1f} MB a request, {TABLE.value}"))
    if JSON.value:
        reporting.write_rows(measured + estimated, JSON.value)


if __name__ == "__main__":
    cli.run(main)
