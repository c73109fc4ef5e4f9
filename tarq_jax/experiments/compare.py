"""Compares models on the same data, budget and seeds, in one table.

    python -m tarq_jax.experiments.compare --config=configs/synthetic.py --seeds=0,1,2 --workdir=runs/compare

Trains two-tower, a two-tower of TARQ's size, target attention and TARQ, or the models that `--model` names.
Each run is kept under `WORKDIR/<model>-<seed>`: calling again continues where the last call stopped and
trains nothing twice.
"""

from collections.abc import Sequence
from pathlib import Path

import ml_collections
from absl import flags
from rich.console import Console

from tarq_jax import cli, reporting
from tarq_jax.config import COMPARED, MODEL_NAME, is_model

CONFIG = cli.config_flag()
WORKDIR = cli.workdir_flag("Where all runs are kept.", "runs/compare")
SEEDS = cli.seeds_flag("0,1,2")
TRAINED = flags.DEFINE_multi_string("model", list(COMPARED), "A model to train; repeat for more.")
flags.register_validator(TRAINED, lambda names: all(map(is_model, names)), f"each has to be {MODEL_NAME}")
JSON = cli.json_flag()


def compare(config: ml_collections.ConfigDict, models: Sequence[str], seeds: Sequence[int], workdir: Path,
            console: Console | None = None) -> list[dict]:
    """Trains every model with every seed.

    Args:
      config: a validated configuration; its model's name and its seed are replaced.
      models: names of models, as in `config.model.name`.
      seeds: seeds of initialisation and order of the data; the data set itself stays the same.
      workdir: where the runs are kept.
      console: where progress is shown.

    Returns:
      One row per predictor and seed, with `seed`, and with `gap_recovered` among the runs of that seed.
    """
    from tarq_jax.training import checkpoint, loop  # after the flags: importing JAX takes seconds

    console = console or Console()
    dataset = loop.load_data(config)
    loop.describe_data(dataset, console)
    rows = []
    for seed in seeds:
        of_seed = []
        for model in models:
            run = loop.with_model(config, model)
            run.seed = seed
            checkpoint.check_steps(workdir / f"{model}-{seed}", run)
            rows_of_run = loop.train(run, dataset, workdir / f"{model}-{seed}", console).rows
            of_seed += loop.named(model, rows_of_run)
        rows += [{"seed": seed} | row for row in loop.add_gap_recovered(of_seed)]
    return rows


def main() -> None:
    """Reads the flags, trains and prints the table."""
    if len(set(TRAINED.value)) < len(TRAINED.value):
        cli.wrong_call(f"--model is {', '.join(TRAINED.value)}, expected different models")
    seeds = cli.seeds(SEEDS)
    rows = compare(cli.settings(CONFIG.value), TRAINED.value, seeds, Path(WORKDIR.value))
    if len(seeds) > 1:
        reporting.print_table(rows, "each seed, test split", reporting.PREDICTOR)
    summary = reporting.summarise(rows)
    title = f"mean over seeds {', '.join(map(str, seeds))}, test split"
    reporting.print_table(summary, title, reporting.PREDICTOR)
    reporting.write_rows(rows + summary, Path(WORKDIR.value) / "results.json")
    if JSON.value:
        reporting.write_rows(rows + summary, JSON.value)


if __name__ == "__main__":
    cli.run(main)
