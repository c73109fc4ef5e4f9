"""Trains the experiment of a configuration: `python train.py --config=configs/synthetic.py --workdir=DIR`."""

from pathlib import Path

from absl import flags

from tarq_jax import cli, reporting

CONFIG = cli.config_flag()
WORKDIR = cli.workdir_flag("Folder for checkpoints and metrics; an unfinished run in it is resumed.")
RESUME = flags.DEFINE_bool("resume", True, "Resume the run in the workdir; --noresume refuses to.")
JSON = cli.json_flag()


def main() -> None:
    """Reads the configuration from the flags and runs the training loop."""
    config = cli.settings(CONFIG.value)
    from tarq_jax.training import distributed, loop  # after the flags: importing JAX takes seconds

    distributed.initialize()
    rows = loop.run(config, Path(WORKDIR.value), resume=RESUME.value)
    reporting.print_table(rows, f"test split, {WORKDIR.value}", reporting.PREDICTOR)
    if JSON.value:
        reporting.write_rows(rows, JSON.value)


if __name__ == "__main__":
    cli.run(main)
