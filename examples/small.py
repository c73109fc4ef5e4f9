"""What the examples share: an experiment that takes seconds, and runs of the usual loop side by side.

`configs/synthetic.py:smoke` with enough data and steps to tell target attention from two towers, one seed:
too little to judge a small difference by. For that, take `configs/synthetic.py` itself in `get_config`.
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
    """The settings that all examples start from."""
    config = synthetic.get_config("smoke")
    config.steps = config.checkpoint_every = 600
    config.batch_size, config.codebook.start, config.codebook.revive_every = 32, 100, 20
    config.data.train_requests, config.data.test_requests = 6000, 1000
    return config


def train_each(
    config: ml_collections.ConfigDict, dataset: Dataset, models: Iterable[str]
) -> dict[str, loop.Result]:
    """Trains and tests models, by what follows the colon in `config.model.name`, or by all of it."""
    with tempfile.TemporaryDirectory() as folder:
        return {(own := name.rpartition(":")[2]): loop.train(
                    loop.with_model(config, name), dataset, Path(folder) / own, Console(quiet=True))
                for name in models}


def table(config: ml_collections.ConfigDict, dataset: Dataset, models: Iterable[str]) -> list[loop.Row]:
    """A row a model that `train_each` trains; of TARQ, its student's."""
    return [result.rows[0] | {"model": name} for name, result in train_each(config, dataset, models).items()]


def run(compare: Compare, load: Callable[[ml_collections.ConfigDict], Dataset] = loop.load_data) -> None:
    """The command of an example: a table of what `compare` makes of the settings and of the data."""
    def main():
        rows = compare(get_config(), load(get_config()))
        reporting.print_table(rows, "test split, one short run", reporting.PREDICTOR)

    cli.run(main)
