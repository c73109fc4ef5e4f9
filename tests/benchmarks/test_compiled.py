"""Costs of programs for chips that this machine does not have."""

import jax
import pytest

from benchmarks import compiled, measuring, operations
from benchmarks.measuring import Key
from benchmarks.operations import OPERATIONS
from benchmarks.workloads import WORKLOADS


@pytest.mark.parametrize("workload", ["paper", "config", "many", "long"])
@pytest.mark.parametrize("name", [name for name, operation in OPERATIONS.items()
                                  if "xla_whole" in operation.implementations])
def test_an_accelerator_takes_everything_together_at_these_sizes(monkeypatch, name, workload):
    """So the programs that are compiled for a TPU are those that run there."""
    specs = operations.specs(OPERATIONS[name], WORKLOADS[workload])
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    chosen, whole = (str(jax.make_jaxpr(OPERATIONS[name].implementations[way])(*specs))
                     for way in ("xla", "xla_whole"))
    assert chosen == whole


@pytest.mark.parametrize("name", compiled.GROWING)
def test_the_largest_size_is_accepted_and_the_next_one_is_not(name):
    sizes, axis = compiled.largest(name), compiled.GROWING[name]
    assert getattr(sizes, axis) >= getattr(WORKLOADS["paper"], axis)

    def trace(sizes):
        jax.eval_shape(OPERATIONS[name].implementations["pallas"], *operations.specs(OPERATIONS[name], sizes))

    trace(sizes)
    with pytest.raises(NotImplementedError, match="of VMEM, expected at most"):
        trace(sizes._replace(**{axis: getattr(sizes, axis) + compiled.STEP}))


def test_each_form_is_compiled_once():
    keys = compiled.compiled_keys(["odd"])
    forms = {key.implementation for key in keys if key.operation == "encode"}
    assert forms == {"plain", "xla_whole", "pallas"} and Key("look_up", "odd", "xla", "forward") in keys


def test_rooflines_count_flops_bytes_and_exponentials():
    """Of 2 requests, 37 queries, 3 heads 8 wide and 45 positions, in bfloat16 but for the mask."""
    rows = {row["chip"]: row for row in compiled.rooflines([Key("attend", "odd", "plain", "forward")])}
    logits = 2 * 3 * 37 * 45
    moved = 2 * 2 * 3 * 8 * (37 + 45 + 45 + 37) + 2 * 45
    assert rows["H100"]["exp_bound_ms"] == pytest.approx(1e3 * logits / (132 * 16 * 1.83e9))
    assert rows["H100"]["byte_bound_ms"] == pytest.approx(1e3 * moved / 3350e9)
    assert rows["H100"]["flop_bound_ms"] == pytest.approx(1e3 * 2 * 2 * 8 * logits / 989e12, rel=0.5)
    assert rows["H100"]["bound"] == "byte" and rows["H100"]["bound_ms"] == rows["H100"]["byte_bound_ms"]
    assert rows["TPU v5e"]["exp_bound_ms"] == 0.0  # the vendor publishes no rate


def test_a_cost_that_xla_does_not_know_is_left_out():
    class Unknown:
        def cost_analysis(self):
            return {"flops": -1.0, "bytes accessed": 8.0}

    assert measuring.cost_of(Unknown()) == {"exponentials": 0.0, "bytes_accessed": 8.0}
