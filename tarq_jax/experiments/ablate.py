"""Ablations: trains every variant of a study with every seed, all seeds of a variant in one program.

    python -m tarq_jax.experiments.ablate --config=configs/ablation.py --workdir=runs/ablation

WORKDIR/runs.parquet has one row per run, WORKDIR/<variant>-<seed> the files of the run. A run that is in the
table is not run again, even if it has another variant's name or was run elsewhere. Calling again thus
continues where the last call stopped. For intervals, figures and a page see `tarq_jax.experiments.report`,
which reads only the table.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from rich.console import Console

from tarq_jax import cli, reporting
from tarq_jax.experiments import run_table

CONFIG = cli.config_flag()
WORKDIR = cli.workdir_flag("Where the runs and their table are kept.", "runs/ablation")
SEEDS = cli.seeds_flag("0,1,2,3,4")
VARIANT = flags.DEFINE_multi_string("variant", [], "A variant to train; repeat for more. All if not given.")
JSON = cli.json_flag()

COLUMNS = ("variant", "seeds", "auc", "auc_std", "gauc", "log_loss", "teacher_auc", "utilisation",
           "attention_error", "parameters", "train_seconds")


def ablate(variants: Mapping[str, ml_collections.ConfigDict], seeds: Sequence[int], workdir: Path,
           console: Console, *, command: str = "") -> list[dict[str, Any]]:
    """Trains the runs that are missing in the table of `workdir`.

    If a variant diverges, its missing runs get no rows, and training continues with the other variants.

    Args:
      variants: name -> configuration, see `tarq_jax.config.variants_of`.
      seeds: seeds of initialisation, order of the data and k-means; the data themselves stay the same.
      workdir: where the table and the runs are kept.
      console: where progress is shown.
      command: the command line, which the rows keep.

    Returns:
      The rows of these variants and seeds, in their order.

    Raises:
      FloatingPointError: variants diverged; names each with its seed and step.
      Interrupted: after SIGINT or SIGTERM, when all states are saved.
      ValueError: a setting does not fit the data, or the saved state of a run.
    """
    from tarq_jax.experiments import study  # after the flags: importing JAX takes seconds
    from tarq_jax.training import checkpoint, loop
    from tarq_jax.training import seeds as together

    path, datasets, failures, rows = workdir / run_table.FILE, {}, [], []
    for number, (name, config) in enumerate(variants.items(), start=1):
        options = str(sorted(config.data.to_dict().items()))
        if options not in datasets:
            datasets[options] = loop.load_data(config)
            loop.describe_data(datasets[options], console)
        dataset = datasets[options]
        wanted = [identity(config, dataset.fingerprint, seed) | {"variant": name} for seed in seeds]
        known = run_table.read(path)
        missing = [row["seed"] for row in wanted if run_table.find(known, row) is None]
        console.print(f"variant {number} of {len(variants)}, {name}: {len(missing)} of {len(seeds)} seeds to "
                      f"train")
        found = {}
        if missing:
            config = copy.deepcopy(config)
            config.save_scores = True
            folders = {seed: workdir / f"{name}-{seed}" for seed in missing}
            for folder in folders.values():
                checkpoint.check_settings(folder, config, run_table.has_effect)
            try:
                trained = together.train(config, dataset, folders, console)
            except FloatingPointError as error:
                failures.append(f"{name}: {error}")
                continue
            settings = run_table.described(config)
            found = {seed: study.row_of_run(rows, settings, folders[seed]) | _origin(folders[seed])
                     | {"command": command} for seed, rows in trained.items()}
        added = [{**(run_table.find(known, row) or found[row["seed"]]), **row} for row in wanted]
        run_table.add(path, added)
        rows += added
    if failures:
        raise FloatingPointError(
            f"{len(failures)} of {len(variants)} variants diverged; {'; '.join(failures)}")
    return rows


def identity(config: ml_collections.ConfigDict, data: str, seed: int) -> dict[str, Any]:
    """The columns that identify a run."""
    return {"seed": seed, "settings": run_table.settings_hash(config), "data": data}


def _origin(folder: Path) -> dict[str, str]:
    """Revision, device and package versions of a run; several each if it was resumed under others."""
    from tarq_jax.training import provenance

    now = {"revision": provenance.revision(), "device": provenance.device(),
           "packages": provenance.versions()}
    entries = [{"revision": entry["revision"], "device": entry["device"]}
               | {f"version_{name}": version for name, version in entry["packages"].items()}
               for entry in provenance.read(folder) or [now]]  # a damaged record does not lose the run
    values = {key: dict.fromkeys(str(entry[key]) for entry in entries if entry.get(key))
              for key in entries[-1]}
    return {key: ", ".join(each) for key, each in values.items() if each}


def main() -> None:
    """Reads the flags, trains and prints the table."""
    seeds = cli.seeds(SEEDS)
    variants = cli.study(CONFIG.value, VARIANT.value)
    command = cli.command_line("tarq_jax.experiments.ablate")
    rows = ablate(variants, seeds, Path(WORKDIR.value), Console(), command=command)
    title = f"mean over seeds {', '.join(map(str, seeds))}, test split"
    rows = [scalars(row) for row in rows]
    reporting.print_table(reporting.summarise(rows, by="variant"), title, COLUMNS)
    if JSON.value:
        reporting.write_rows(rows, JSON.value)


def scalars(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without the columns that only a report reads."""
    return {key: value for key, value in row.items() if key not in run_table.MEASURED}


if __name__ == "__main__":
    cli.run(main)
