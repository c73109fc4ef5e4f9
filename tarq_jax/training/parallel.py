"""Two ways to run the same training step on several devices: `jit` over a mesh, and `pmap`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tarq_jax import shards
from tarq_jax.training import sharding
from tarq_jax.training.state import TrainState
from tarq_jax.types import Batch

Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]
CompiledStep = jax.stages.Wrapped  # a compiled step: callable like the step, and has `lower`
AXIS = "shards"  # name of the axis of pmap


class Way(NamedTuple):
    """A way to run a step on several devices.

    Attributes:
      axis_name: axis name that the objective and the step must be built for.
      put: (batch on the host, mesh) -> the batch on devices, in the form that the step needs.
      compile: (step, mesh, shardings of the state) -> compiled step, which reuses the memory of its state.
        In both ways, input and output states are arrays over the mesh.
    """

    axis_name: shards.AxisName
    put: Callable[[Batch, Mesh], Batch]
    compile: Callable[[Step, Mesh, Any], CompiledStep]


def _jit(step: Step, mesh: Mesh, state: Any) -> CompiledStep:
    return jax.jit(step, donate_argnums=0, out_shardings=(state, sharding.replicated(mesh)))


def _pmap(step: Step, mesh: Mesh, state: Any) -> CompiledStep:
    del state  # all devices hold the same state
    return jax.pmap(step, axis_name=AXIS, in_axes=(None, 0), out_axes=None, donate_argnums=0,
                    devices=mesh.devices.ravel().tolist())


def _dealt(batch: Batch, mesh: Mesh) -> Batch:
    """The batch with one shard per device, [n, B / n, ...]."""
    split = NamedSharding(mesh, PartitionSpec(sharding.BATCH))
    return jax.device_put(shards.deal(batch, mesh.size), split)


WAYS = {"mesh": Way(None, sharding.shard_batch, _jit), "pmap": Way(AXIS, _dealt, _pmap)}
