"""Failures that stop a run: exact steps, culprits by path, the batch that is kept, and its replay."""

import dataclasses
import errno
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tarq_jax import data, reporting
from tarq_jax.experiments import replay
from tarq_jax.training import checkpoint, failure, loop, setup

pytestmark = pytest.mark.usefixtures("compiled_once")

PATHS = ["params/a", "params/b", "codewords"]


def metrics_of(gradients=(3.0, 4.0, 0.0), parameters=(1.0, 1.0, 1.0), **scalars):
    """Metrics in the form that `train_step` returns."""
    gradients, parameters = np.array(gradients, np.float32), np.array(parameters, np.float32)
    return {"loss": np.float32(0.5), "gradient_norms": gradients, "parameter_norms": parameters,
            "gradient_norm": np.linalg.norm(gradients), "parameter_norm": np.linalg.norm(parameters),
            **{name.replace("_", "/", 1): np.float32(value) for name, value in scalars.items()}}


def batches_of(dataset, start_step=0):
    return data.train_batches(
        dataset, "train", batch_size=8, seed=0, start_step=start_step, **setup.batch_shapes(dataset))


@pytest.fixture(scope="module")
def poisoned(tiny_dataset):
    """The data with one NaN label, in the batch of step 5."""
    train = tiny_dataset.splits["train"]
    for index in range(0, len(train.labels), 3):
        labels = train.labels.copy()
        labels[index] = np.nan
        splits = {**tiny_dataset.splits, "train": dataclasses.replace(train, labels=labels)}
        dataset = dataclasses.replace(tiny_dataset, splits=splits)
        if np.isnan(next(batches_of(dataset, start_step=4)).labels).any():
            return dataset
    raise AssertionError("no label is in that batch")


def fails(config, dataset, workdir, silent) -> str:
    with pytest.raises(FloatingPointError) as caught:
        loop.train(config, dataset, workdir, silent)
    message = str(caught.value)
    assert "\n" not in message and f"{failure.REPLAY}={workdir}" in message
    assert "config.optimizer.learning_rate" in message
    return message


# Culprits


def test_nothing_is_wrong_with_finite_metrics():
    assert failure.culprit(metrics_of(loss_student=1e30), PATHS) is None
    assert failure.culprit(metrics_of(), PATHS, limit=5.01) is None


@pytest.mark.parametrize(("metrics", "expected"), [
    (metrics_of(loss_student=np.nan, loss_teacher=1.0), "{'loss/student': nan} not finite"),
    (metrics_of(gradients=(1.0, np.nan, np.inf)),
     "{'gradient_norm': nan} not finite; gradient of 'params/b' not finite, the first of 2"),
    (metrics_of(parameters=(1.0, 2.0, np.inf)),
     "{'parameter_norm': inf} not finite; parameter of 'codewords' not finite, the first of 1"),
])
def test_culprits_come_in_the_order_in_which_they_arise(metrics, expected):
    assert failure.culprit(metrics, PATHS, limit=1.0) == expected


def test_an_exploding_gradient_is_told_by_its_longest_part():
    found = failure.culprit(metrics_of(), PATHS, limit=4.9)
    assert found == ("gradient of norm 5 exceeds config.optimizer.max_gradient_norm, 4.9; longest, 4, at "
                     "'params/b'")


def test_paths_are_those_of_the_leaves():
    tree = {"params": {"b": jnp.zeros(1), "a": [jnp.zeros(1), None]}, "codewords": None}
    assert failure.paths_of(tree) == ["params/a/0", "params/b"]


def test_the_watch_finds_the_first_of_many_steps():
    watch = failure.Watch(PATHS, limit=0.0)
    for step in range(1, 4):
        watch.add(step, metrics_of())
    assert watch.check() == {"loss": 0.5, "gradient_norm": 5.0, "parameter_norm": pytest.approx(3**0.5)}
    assert watch.check()["loss"] == 0.5  # checked before
    for step in range(4, 9):
        watch.add(step, metrics_of(loss_student=np.nan if step >= 6 else 0.0))
    with pytest.raises(failure.StepFailed, match=r"^step 6: \{'loss/student': nan\} not finite$"):
        watch.check()


def test_the_watch_does_not_wait_for_ever():
    watch = failure.Watch(PATHS, limit=0.0)
    watch.add(1, metrics_of(gradients=(np.inf, 0.0, 0.0)))
    with pytest.raises(failure.StepFailed, match="step 1: "):
        for step in range(2, failure.LONGEST + 1):
            watch.add(step, metrics_of())


# Runs


def test_a_poisoned_batch(poisoned, tiny_config, tmp_path, silent):
    """Step 5 of 6 fails; only the last step is logged and every second one is saved."""
    tiny_config.log_every = 6
    message = fails(tiny_config, poisoned, tmp_path, silent)
    assert message.startswith("step 5: {") and "'loss/student': nan" in message
    assert "not finite in the batch: ['labels']" in message
    assert "gradient of 'params/params/log_radius' not finite, the first of 58;" in message
    with checkpoint.manager(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 4
    kept = failure.load_batch([tmp_path / "failed_step_5.npz"])
    assert kept.step == 5 and json.dumps(kept.settings) == json.dumps(tiny_config.to_dict())
    expected = next(batches_of(poisoned, start_step=4))
    assert failure.paths_of(kept.batch) == failure.paths_of(expected)
    for found, values in zip(failure._columns(kept.batch).values(), failure._columns(expected).values(),
                             strict=True):
        np.testing.assert_array_equal(found, values)


def test_a_batch_that_cannot_be_kept_does_not_hide_the_failure(poisoned, tiny_config, tmp_path, monkeypatch):
    def full(file, **arrays):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    message = r"step 3: wrong.*the batch could not be saved in .*No space left"
    with (pytest.raises(failure.StepFailed, match=message),
          failure.batch_kept(tmp_path, tiny_config, lambda step: next(batches_of(poisoned, start_step=2)))):
        raise failure.StepFailed(3, "wrong")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_names_the_run(tmp_path):
    with (pytest.raises(OSError, match=f"no space left for {tmp_path}; what was saved before is kept"),
          failure.full_disk_named(tmp_path)):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_the_same_step_fails_again_and_is_replayed(poisoned, tiny_config, tmp_path, silent, monkeypatch):
    """The replay starts from the last checkpoint, starts the codebook, and repeats a healthy step."""
    tiny_config.log_every, tiny_config.checkpoint_every = 6, 3
    first = fails(tiny_config, poisoned, tmp_path, silent)
    assert fails(tiny_config, poisoned, tmp_path, silent) == first
    monkeypatch.setattr(loop, "load_data", lambda config: poisoned)
    rows = replay.replay(tmp_path, replay.failed_step(tmp_path))
    values = {(row["kind"], row["name"]): row["value"] for row in rows}
    assert np.isnan(values["loss", "loss/student"]) and np.isfinite(values["loss", "loss/reconstruction"])
    assert not np.isfinite(rows[0]["value"]) and np.isfinite(rows[-1]["value"])
    assert {kind for kind, _ in values} == {"loss", "gradient", "parameter"}
    healthy = replay.failed_step(tmp_path)
    healthy = healthy._replace(batch=healthy.batch.replace(labels=np.zeros_like(healthy.batch.labels)))
    assert all(np.isfinite(row["value"]) for row in replay.replay(tmp_path, healthy))


def test_what_several_processes_kept_is_one_batch(tiny_dataset, tiny_config, tmp_path, monkeypatch):
    """Eleven processes; their numbers are not in the order of their files' names."""
    batch = next(data.train_batches(
        tiny_dataset, "train", batch_size=11, seed=0, **setup.batch_shapes(tiny_dataset)))
    monkeypatch.setattr(jax, "process_count", lambda: 11)
    for index in range(11):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        failure.save_batch(tmp_path, 5, jax.tree.map(lambda rows, index=index: rows[index:index + 1], batch),
                           tiny_config)
    failed = replay.failed_step(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, failed.batch, batch)
    assert (failed.step, failed.processes) == (5, 11)
    (tmp_path / "failed_step_5_10of11.npz").unlink()
    with pytest.raises(FileNotFoundError, match="11 processes failed, expected a file of each, found"):
        replay.failed_step(tmp_path)


def test_the_newest_of_two_failures_at_a_step_is_replayed(tiny_dataset, tiny_config, tmp_path, monkeypatch):
    """A run may fail with two processes and, resumed with one, again; and the other way round."""
    batch = next(batches_of(tiny_dataset))
    for count, time in ((2, 1), (1, 2), (2, 3)):
        monkeypatch.setattr(jax, "process_count", lambda count=count: count)
        for index in range(count):
            monkeypatch.setattr(jax, "process_index", lambda index=index: index)
            os.utime(failure.save_batch(tmp_path, 5, batch, tiny_config), (time, time))
        assert replay.failed_step(tmp_path).processes == count


@pytest.mark.parametrize("processes", [1, 2])
def test_a_replay_has_the_batches_of_training(
        processes, short_histories, tiny_config, tmp_path, monkeypatch):
    """Of all processes, from the same buckets; at the failed step it uses the batch that was kept."""
    tiny_config.data.buckets, tiny_config.codebook.start = (2,), 5
    batches = data.train_batches(short_histories, "train", batch_size=8, seed=0, buckets=(2,),
                                 **setup.batch_shapes(short_histories))
    expected, seen = [next(batches) for _ in range(5)], []
    assert {batch.history_mask.shape for batch in expected} == {(8, 2), (8, 5)}

    def take_step(state, batch):
        seen.append(jax.device_get(batch))
        return state, {}

    monkeypatch.setattr(loop, "load_data", lambda config: short_histories)
    monkeypatch.setattr(setup, "compile_step", lambda *_: take_step)
    monkeypatch.setattr(replay, "_rows", lambda *_: iter(()))
    replay.replay(tmp_path, failure.FailedStep(5, expected[4], tiny_config.to_dict(), processes))
    for found, batch in zip(seen, expected, strict=True):
        jax.tree.map(np.testing.assert_array_equal, found, batch)


@pytest.mark.slow
def test_a_learning_rate_far_too_high(tiny_config, tiny_dataset, tmp_path, silent):
    tiny_config.optimizer.learning_rate, tiny_config.log_every = 1e25, 6
    message = fails(tiny_config, tiny_dataset, tmp_path, silent)
    assert message.startswith("step 1: {'parameter_norm': inf} not finite; parameter of 'params/params/")
    assert (tmp_path / "failed_step_1.npz").exists() and "not finite in the batch" not in message


@pytest.mark.slow
def test_a_gradient_beyond_its_limit(tiny_config, tiny_dataset, tmp_path, silent, finished):
    lines = reporting.read_metrics(finished[0])
    norms = [line["gradient_norm"] for line in lines if "gradient_norm" in line]
    tiny_config.optimizer.max_gradient_norm, tiny_config.log_every = float(max(norms)) * 0.99, 6
    step = 1 + int(np.argmax(norms))
    message = fails(tiny_config, tiny_dataset, tmp_path, silent)
    assert message.startswith(f"step {step}: gradient of norm ")
    tiny_config.optimizer.max_gradient_norm = float(max(norms)) * 1.01  # and resumes with another limit
    loop.train(tiny_config, tiny_dataset, tmp_path, silent)
    assert (tmp_path / "results.json").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and then nothing", b"no archive"])
def test_a_damaged_batch_is_named(content, tmp_path):
    (tmp_path / "failed_step_12.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"failed_step_12\.npz cannot be read as a failed step"):
        replay.failed_step(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"failed steps are \[12\], expected 3"):
        replay.failed_step(tmp_path, 3)


def test_replay_needs_a_failure(tmp_path, finished):
    with pytest.raises(FileNotFoundError, match=r"failed steps are \[\], expected at least one"):
        replay.failed_step(tmp_path)
