"""What the examples share: an experiment that takes seconds, and training several models on it.

The settings are `configs/synthetic.py:smoke` with enough data and steps to distinguish target attention from
a two-tower. One seed is too little to judge small differences: for those, use `configs/synthetic.py` in
`get_config`.
"""

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import ml_collections
from rich.console import Console

from configs import synthetic
from tarq_jax import cli, reporting
from tarq_jax.data import Dataset
from tarq_jax.training import loop

Compare = Callable[[ml_collections.ConfigDict, Dataset], list[loop.Row]]


def get_config() -> ml_collections.ConfigDict:
    """The settings from which all examples start."""
    config = synthetic.get_config("smoke")
    config.steps = config.checkpoint_every = 600
    config.batch_size, config.codebook.start, config.codebook.revive_every = 32, 100, 20
    config.data.train_requests, config.data.test_requests = 6000, 1000
    return config


def train_each(
    config: ml_collections.ConfigDict, dataset: Dataset, models: Iterable[str]
) -> dict[str, loop.Result]:
    """Trains and tests models; results by the part of each model's name after the colon, or the name."""
    with tempfile.TemporaryDirectory() as folder:
        return {(own := name.rpartition(":")[2]): loop.train(
                    loop.with_model(config, name), dataset, Path(folder) / own, Console(quiet=True))
                for name in models}


def table(config: ml_collections.ConfigDict, dataset: Dataset, models: Iterable[str]) -> list[loop.Row]:
    """A row per model that `train_each` trains; for TARQ, the student's row."""
    return [result.rows[0] | {"model": name} for name, result in train_each(config, dataset, models).items()]


def run(compare: Compare, load: Callable[[ml_collections.ConfigDict], Dataset] = loop.load_data) -> None:
    """The command of an example: prints the rows that `compare` returns for the settings and the data."""
    def main():
        rows = compare(get_config(), load(get_config()))
        reporting.print_table(rows, "test split, one short run", reporting.PREDICTOR)

    cli.run(main)
