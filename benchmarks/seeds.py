"""The cost of training seeds together in one compiled program, compared with single runs.

    python -m benchmarks.seeds --json=benchmarks/results/seeds.json

Trains TARQ of `configs/synthetic.py` with one seed by `tarq_jax.training.loop`, then with several by
`tarq_jax.training.seeds`, each in its own process without a compilation cache. Seconds include everything:
compilation, steps, codebooks, checkpoints, test. `ratio` is the time divided by that of one run, `share` the
time divided by that of as many single runs one after the other.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console

from benchmarks.processes import in_own_process
from tarq_jax import cli, memory, reporting

STEPS = flags.DEFINE_integer("steps", 1500, "Steps of each run.", lower_bound=100, allow_override=True)
COUNTS = flags.DEFINE_list("counts", ["8"], "Numbers of seeds to train together; one row each.")
MODEL = flags.DEFINE_string("model", "tarq", "Model to train.", allow_override=True)
DATA_DIR = flags.DEFINE_string("data_dir", "runs/data", "Folder of prepared data.")
JSON = cli.json_flag()


def measure(count: int, steps: int, model: str, data_dir: str) -> dict[str, Any]:
    """Trains `count` seeds together; 0 trains one seed on its own."""
    import jax

    from configs import synthetic
    from tarq_jax.training import loop, seeds

    jax.config.update("jax_enable_compilation_cache", False)
    config = synthetic.get_config()
    config.steps, config.codebook.start, config.data.data_dir = steps, min(300, steps // 5), data_dir
    config = loop.with_model(config, model)
    dataset = loop.load_data(config)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        if count:
            folders = {seed: Path(folder) / str(seed) for seed in range(count)}
            rows = seeds.train(config, dataset, folders, Console(stderr=True))[0]
        else:
            rows = loop.train(config, dataset, Path(folder), Console(stderr=True)).rows
        seconds = time.perf_counter() - start
    row = rows[0]
    return {"model": model, "seeds": count, "device": jax.devices()[0].device_kind, "steps": steps,
            "auc_of_first": row["auc"], "seconds": seconds,
            "step_seconds": row["train_seconds"] * max(count, 1), "input_wait_share": row["input_wait_share"]}


def main() -> None:
    """Measures each number of seeds and prints the table."""
    counts = cli.whole_numbers(COUNTS, "numbers of seeds like 2,8")
    rows = [in_own_process(measure, count, STEPS.value, MODEL.value, DATA_DIR.value, first=memory.keep_freed)
            for count in (0, *counts)]
    alone = rows[0]["seconds"]
    rows = [row | {"ratio": row["seconds"] / alone, "share": row["seconds"] / alone / max(row["seeds"], 1)}
            for row in rows]
    reporting.print_table(rows, "seeds trained together; 0 is one on its own")
    if JSON.value:
        reporting.write_rows(rows, JSON.value)


if __name__ == "__main__":
    cli.run(main)
