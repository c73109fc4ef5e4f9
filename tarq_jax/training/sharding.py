"""Where arrays live: batches split over the devices of a mesh, state copied to each."""

from typing import TypeVar

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tarq_jax.types import Batch

Tree = TypeVar("Tree")


def data_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of one axis, `data`, over the given devices or all."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raises ValueError unless every device gets an equal share of a batch."""
    if batch_size % mesh.shape["data"]:
        raise ValueError(f"config.batch_size is {batch_size}, expected a multiple of the "
                         f"{mesh.shape['data']} devices of the mesh")


def shard_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Splits every array of a batch by request over the axis `data`."""
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))


def replicate(tree: Tree, mesh: Mesh) -> Tree:
    """Copies a pytree to every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
