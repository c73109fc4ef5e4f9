# %% [markdown]
# # From nothing to the frontier, in five minutes
#
# Trains a two-tower, target attention and TARQ on generated data, exports each, asks each for the
# best of 10,000 items, and plots quality against latency. This is a notebook as text: open it with
# Jupytext (`jupytext --to ipynb examples/notebook.py`) or in an editor that supports cells, or run
# it with `python -m examples.notebook`.

# %%
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console

from configs import synthetic
from tarq_jax import reporting
from tarq_jax.experiments import plots, study
from tarq_jax.serving import Scorer, build
from tarq_jax.training import loop, restore

FOLDER = Path(tempfile.mkdtemp())

# %% [markdown]
# ## The data
#
# Labels are drawn from a softmax attention over the history, which a two-tower model cannot
# express. There are 10,000 items and histories of 200.

# %%
config = synthetic.get_config()
config.data.num_items, config.data.history_length = 10_000, 200
config.data.data_dir, config.steps, config.baselines = str(FOLDER / "data"), 400, ()
config.codebook.start = 100
dataset = loop.load_data(config)
loop.describe_data(dataset, Console())

# %% [markdown]
# ## Three models on the same data and budget

# %%
MODELS = ("two_tower", "target_attention", "tarq")
rows = []
for name in MODELS:
    result = loop.train(loop.with_model(config, name), dataset, FOLDER / name, Console())
    rows.append(result.rows[0])
rows = loop.add_gap_recovered(rows)
reporting.print_table(
    rows, "test split", ("model", "auc", "gauc", "log_loss", "gap_recovered", "utilisation"))

# %% [markdown]
# ## Export and query
#
# An artefact holds an index of all items and exported programs. The measured time is that of a
# complete request: the user side, 10,000 candidates, the best 500.

# %%
def milliseconds(method, name: str) -> float:
    """Median time of requests with random histories."""
    artefact = FOLDER / f"{name}.artefact"
    artefact.mkdir()
    build.write(method, dataset, artefact, histories=[200])
    scorer = Scorer.load(artefact)
    rng = np.random.default_rng(0)
    spent = []
    for _ in range(25):
        request = {"history": {"item_id": rng.integers(1, 10_000, 200).tolist()}}
        start = time.perf_counter()
        scorer.score(request, top_k=500)
        spent.append(1e3 * (time.perf_counter() - start))
    return float(np.median(spent[5:]))


runs = {name: restore.load_run(FOLDER / name) for name in MODELS}
points = {row["model"]: (milliseconds(build.method_of(runs[row["model"]]), row["model"]), row["auc"])
          for row in rows}

# %% [markdown]
# ## No student needed
#
# This converts the target attention that was just trained: its queries are quantized, and look-ups
# are corrected by their first derivative. Its AUC equals that of the TARQ run or is better; here
# only its latency is measured.

# %%
converted = build.method_of(runs["target_attention"], codewords=64, order=1)
print(f"converted: {milliseconds(converted, 'converted'):.1f} ms")

# %%
best = study.on_frontier(points)
figure = plots.frontier(points, best, "AUC")
figure.savefig(FOLDER / "frontier.png", dpi=120)
print(f"{FOLDER / 'frontier.png'}: on the frontier are {', '.join(best)}")
