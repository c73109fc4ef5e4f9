"""Windows are read one ahead: batches stay the same, errors arrive, and no thread keeps a process alive."""

import itertools
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tarq_jax.data import ITEM_ID, Dataset, Field, Schema, train_batches
from tarq_jax.data.order import Order, locate, window_end
from tarq_jax.data.records import make_requests, offsets_of
from tarq_jax.data.windows import TrainBatches

NUM, SIZE = 24, 4  # blocks, and requests of each
OPTIONS = {"batch_size": 4, "history_length": 3, "num_candidates": 1, "seed": 1, "window": 4}
PER_WINDOW = 4  # batches
PATIENCE = 20  # seconds


class Blocks:
    """A split whose requests carry their number as user; `before_read` runs before blocks are read."""

    sizes, longest_history, most_candidates = (SIZE,) * NUM, 3, 1

    def __init__(self, before_read=lambda blocks: None):
        self.before_read = before_read

    def __len__(self):
        return sum(self.sizes)

    def read(self, blocks):
        self.before_read(blocks)
        offsets = offsets_of(np.array(self.sizes))
        users = np.concatenate([np.arange(offsets[b], offsets[b + 1]) for b in sorted(blocks)])
        ones = np.ones_like(users)
        return make_requests(users, np.ones(2 * len(users), int), 2 * ones, ones, ones, ones)


def dataset_of(split: Blocks) -> Dataset:
    items = {ITEM_ID: np.arange(2, dtype=np.int32)}
    return Dataset(Schema((Field(ITEM_ID, "item", "categorical", 2),)), items, {}, {"train": split})


def batches_of(split: Blocks, **options):
    return train_batches(dataset_of(split), "train", **OPTIONS | options)


def users_of(batches, num):
    return np.array([batch.user_id for batch in itertools.islice(batches, num)])


@pytest.fixture
def plain():
    """The users of 60 steps, made one by one from windows that are read when they are needed."""
    batches = TrainBatches(dataset_of(Blocks()), Blocks(), Order(Blocks.sizes, 4, 1, window=4), (3,), 1)
    return np.array([batches[step].user_id for step in range(60)])


@pytest.mark.parametrize("readers", [0, 3])
@pytest.mark.parametrize("start", [0, 3, 5])
def test_reading_ahead_changes_no_batch(readers, start, plain):
    found = users_of(batches_of(Blocks(), readers=readers, start_step=start), 60 - start)
    np.testing.assert_array_equal(found, plain[start:])


def test_steps_are_read_in_any_order_from_several_threads(plain):
    batches = TrainBatches(dataset_of(Blocks()), Blocks(), Order(Blocks.sizes, 4, 1, window=4), (3,), 1)
    steps = np.random.default_rng(0).permutation(60).tolist()
    with ThreadPoolExecutor(4) as pool:
        ahead = pool.map(batches.read_ahead, steps)
        found = dict(zip(steps, pool.map(lambda step: batches[step].user_id, steps), strict=True))
        list(ahead)
    np.testing.assert_array_equal([found[step] for step in range(60)], plain)
    assert len(batches._windows) <= 2


@pytest.mark.parametrize("readers", [0, 2])
def test_a_window_is_read_while_the_one_before_is_used(readers):
    """Reading the second window waits until all batches of the first one have come."""
    used, reads = threading.Event(), []

    def before_read(blocks):
        reads.append(list(blocks))
        assert len(reads) == 1 or used.wait(PATIENCE)

    batches = batches_of(Blocks(before_read), readers=readers)
    next(batches)
    assert len(reads) == 1 or readers  # whoever needs a single batch reads a single window
    next(batches)
    wait_until(lambda: len(reads) == 2)
    users_of(batches, PER_WINDOW - 2)
    used.set()
    users_of(batches, 3 * PER_WINDOW)
    wait_until(lambda: len(reads) == 5)
    time.sleep(0.05)
    assert [len(blocks) for blocks in reads] == [4] * 5  # each window once, and only one ahead


def test_at_most_two_windows_are_kept_also_while_one_is_read():
    kept = []
    order = Order(Blocks.sizes, 4, 1, window=4)
    split = Blocks(lambda _: kept.append(len(batches._windows)))
    batches = TrainBatches(dataset_of(split), split, order, (3,), 1)
    for step in range(0, 60, PER_WINDOW):
        assert window_end(order, step) == window_end(order, step + 3) == step + PER_WINDOW
        batches.read_ahead(step + PER_WINDOW)
        assert len(batches[step].user_id) == 4
    assert max(kept) == 2


@pytest.mark.parametrize("sizes", [(4,) * 9, (1, 9, 2, 5, 7, 3, 8)])
def test_the_end_of_a_window_is_where_the_position_changes(sizes):
    order = Order(sizes, 3, seed=0, window=2)
    for step in range(80):
        end = window_end(order, step)
        assert locate(order, step)[:2] == locate(order, end - 1)[:2] != locate(order, end)[:2]


@pytest.mark.parametrize("readers", [0, 2])
def test_an_error_of_the_background_is_raised_where_its_window_begins(readers):
    """At the batch whose reader saw it first; the others read the window anew."""
    reads = []

    def before_read(blocks):
        reads.append(threading.current_thread().name)
        if len(reads) == 2:
            raise OSError("block 7 is torn")

    batches = batches_of(Blocks(before_read), readers=readers)
    assert len(users_of(batches, PER_WINDOW)) == PER_WINDOW
    with pytest.raises(OSError, match="block 7 is torn"):
        users_of(batches, max(readers, 1))
    assert readers or reads[1] == "read-ahead"


def test_what_could_not_be_read_is_read_anew_when_it_is_requested_again(plain):
    reads = []

    def before_read(blocks):
        reads.append(blocks)
        if len(reads) == 2:
            raise OSError("torn")

    split = Blocks(before_read)
    batches = TrainBatches(dataset_of(split), split, Order(Blocks.sizes, 4, 1, window=4), (3,), 1)
    assert len(batches[0].user_id) == 4
    batches.read_ahead(PER_WINDOW)
    with pytest.raises(OSError, match="torn"):
        batches[PER_WINDOW + 1]
    np.testing.assert_array_equal(batches[PER_WINDOW + 1].user_id, plain[PER_WINDOW + 1])


def test_a_process_ends_while_a_window_is_read():
    code = ("from test_windows import *\n"
            "reads = []\n"
            "def before_read(blocks):\n"
            "    reads.append(blocks)\n"
            "    if len(reads) > 1: time.sleep(1000)\n"
            "batches = batches_of(Blocks(before_read))\n"
            "users_of(batches, 2)\n"
            "wait_until(lambda: len(reads) == 2)\n"
            "print('reading')")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment,
                          timeout=100, check=False)
    assert (done.returncode, done.stdout) == (0, "reading\n"), done.stderr


def wait_until(holds):
    for _ in range(100 * PATIENCE):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("nothing happened in time")


def test_iterators_that_are_given_up_leave_no_thread():
    before = threading.active_count()
    for _ in range(3):
        batches = batches_of(Blocks())
        users_of(batches, 2)
        del batches
    wait_until(lambda: threading.active_count() <= before)
