"""The benchmark's PyTorch peer is the same model: the losses are equal at every step."""

import pytest
import tiny

pytest.importorskip("torch")

from benchmarks import training_step


@pytest.mark.parametrize("order", [0, 1])
def test_the_peer_takes_the_same_steps(order):
    config = tiny.make_config()
    config.model.order, config.codebook.revive_every = order, 0
    config.codebook.learning = "ema" if order else "gradient"
    config.optimizer.weight_decay = 0.3
    config.data.update({"num_items": 60, "num_clusters": 8, "history_length": 5, "num_candidates": 3,
                        "max_interests": 5, "sharpness": 8.0, "seed": 0})
    workload = training_step.make_workload(config)
    peer = training_step.pytorch(workload, compiled=False, threads=1)
    assert training_step.check_same(training_step.ours(workload), peer) < training_step.TOLERANCE["cpu"]
    with pytest.raises(ValueError, match=r"PyTorch, 1 thread: losses of step 0 are"):  # it is ahead now
        training_step.check_same(training_step.ours(workload), peer)
