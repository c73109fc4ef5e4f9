"""Health of a run's codebooks: one page, the figures beside it, and a diagnosis in words.

    python -m tarq_jax.experiments.health --run=runs/synthetic

Writes RUN/health/index.html, which opens without a network, and PNG files.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from absl import flags

from tarq_jax import cli, metrics, reporting

if TYPE_CHECKING:
    from tarq_jax.training.restore import Run

RUN = cli.run_flag()
OUT = flags.DEFINE_string("out", None, "Folder of the page; RUN/health if not given.")
SPLIT = flags.DEFINE_enum("split", "test", ["train", "validation", "test"], "Split to evaluate.")
REQUESTS = flags.DEFINE_integer("requests", 2000, "How many requests of the split to look at.", lower_bound=1)
JSON = cli.json_flag()

CURVES = {"utilisation of a batch": "utilisation", "perplexity": "perplexity", "dead codewords": "dead",
          "quantization error": "quantization_error"}
BUCKETS = 4  # of history lengths
ALL = "all heads"


class Observed(NamedTuple):
    """What a run's student and teacher compute for the real candidates of a split."""

    latents: np.ndarray  # [M, D]
    output: Any  # QuantizerOutput with leading axis M
    codewords: np.ndarray  # [L, K, D]
    items: np.ndarray  # [M], ids
    lengths: np.ndarray  # [M], of the history
    outputs: dict[str, "OutputError"]  # of the attention, for `ALL` and by head or level
    weights: dict[str, np.ndarray]  # by head or level: total variation of the attention weights, [M]


class OutputError(NamedTuple):
    """How far an attention output of the student is from the teacher's."""

    squared_error: np.ndarray  # [M]
    squared_norm: np.ndarray  # [M], of the teacher's


def observe(run: "Run", split: str, requests: int) -> Observed:
    """Evaluates the run on the first `requests` requests of a split."""
    import jax

    from tarq_jax import data
    from tarq_jax.training import setup

    predict, attention = run.objective.predict, run.objective.attention
    if attention is None:
        raise ValueError(f"a run of {run.config.model.name!r} has no codebook, expected one that has")
    if (step := int(run.state.step)) <= run.config.codebook.start:
        raise ValueError(f"the run's state is of step {step}, expected one beyond config.codebook.start, "
                         f"{run.config.codebook.start}: its codebook is not used before")
    codewords, size = run.state.codewords, run.config.eval_batch_size

    @jax.jit
    def look(batch):
        found: Any = predict(run.state.params, codewords, batch).diagnostics
        parts = attention(run.state.params, codewords, batch)
        variation = {name: 0.5 * abs(part.student_weights - part.teacher_weights).sum(axis=-1)
                     for name, part in parts.items()}
        outputs = {name: OutputError(((part.student_output - part.teacher_output) ** 2).sum(axis=-1),
                                     (part.teacher_output**2).sum(axis=-1))
                   for name, part in {ALL: found, **parts}.items()}
        return found.latents, found.quantizer, outputs, variation

    parts = []
    batches = data.eval_batches(run.dataset, split, batch_size=size, **setup.batch_shapes(run.dataset))
    for start, batch in zip(range(0, requests, size), batches, strict=False):
        real = batch.candidate_mask & (np.arange(size) < requests - start)[:, None]
        lengths = np.broadcast_to(batch.history_mask.sum(axis=1)[:, None], real.shape)
        *seen, outputs, variation = look(batch)
        parts.append(jax.tree.map(lambda x, real=real: np.asarray(x)[real],
                                  (*seen, batch.candidates[data.ITEM_ID], lengths, outputs, variation)))
    if not any(len(part[0]) for part in parts):
        raise ValueError(f"split {split!r} has no candidates among its first {requests} requests, expected "
                         "one at least")
    latents, output, *errors = jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
    return Observed(latents, output, np.asarray(codewords), *errors)


def level_rows(run: "Run", observed: Observed) -> list[dict[str, Any]]:
    """One row per level: its health, and a verdict in words."""
    from tarq_jax.metrics import diagnosis

    health = metrics.codebook_health(
        observed.codewords, metrics.usage_counts(observed.output.codes, observed.codewords.shape[1]),
        metrics.unexplained_energy(observed.latents, observed.output))
    counts = (run.dataset.schema.num_items - 1, len(np.unique(observed.items)),  # id 0 is padding
              len(np.unique(np.round(observed.latents, 5), axis=0)))
    config = run.config
    rows: list[dict[str, Any]] = []
    for level in range(1, len(observed.codewords) + 1):
        row = {name: health[f"{name}_{level}"] for name in (
            "utilisation", "perplexity", "dead", "quantization_error", "nearest_distance")}
        before = rows[-1]["quantization_error"] if rows else 1.0
        verdict = diagnosis.diagnose_level(diagnosis.Level(
            level, observed.codewords.shape[1], row["utilisation"], row["perplexity"], int(row["dead"]),
            row["quantization_error"], before, *counts, config.codebook.init, config.codebook.revive_every,
            config.codebook.learning, config.codebook.dead, config.model.assign,
            config.optimizer.weight_decay))
        rows.append({"level": level, **row, "verdict": " ".join(verdict)})
    return rows


class AttentionErrors(NamedTuple):
    """The errors of the attention by head or level, then by the name of a bucket of history lengths."""

    total: float  # relative error of the output of all heads, over all lengths
    outputs: dict[str, dict[str, float]]  # relative error; for `ALL`, too; NaN if all histories are empty
    weights: dict[str, dict[str, float]]  # total variation; NaN if all histories are empty


def attention_errors(observed: Observed) -> AttentionErrors:
    """How far the student's attention is from the teacher's; candidates of empty histories are left out.

    They have nothing to attend to; what remains of their output is the bias of its projection.
    """
    edges = np.unique(np.quantile(observed.lengths, np.linspace(0, 1, BUCKETS + 1)).astype(int))
    lower = edges[:-1] if len(edges) > 1 else edges
    bucket = np.searchsorted(lower, observed.lengths, side="right") - 1
    upper = [*(lower[1:] - 1), edges[-1]]
    names = [f"{low} to {high}" if low < high else str(low) for low, high in zip(lower, upper, strict=True)]
    seen = observed.lengths > 0
    inside = {name: (bucket == index) & seen for index, name in enumerate(names) if (bucket == index).any()}
    return AttentionErrors(
        _relative(observed.outputs[ALL], seen),
        {part: {name: _relative(error, where) for name, where in inside.items()}
         for part, error in observed.outputs.items()},
        {part: {name: float(variation[where].mean()) if where.any() else math.nan
                for name, where in inside.items()}
         for part, variation in observed.weights.items()})


def _relative(error: OutputError, inside: np.ndarray) -> float:
    """Relative error of the attention output for `inside`; NaN if there are none."""
    return metrics.relative_error([error.squared_error[inside].sum(), error.squared_norm[inside].sum()])


def training_curves(
    workdir: Path, num_levels: int, start: int
) -> tuple[list[int], dict[str, dict[str, list[float]]]]:
    """Steps after `start` in `metrics.jsonl`, and values by quantity and level; empty without that file."""
    by_step = {line["step"]: line for line in reporting.read_metrics(workdir)
               if "codebook/perplexity_1" in line and line["step"] > start}
    lines = [by_step[step] for step in sorted(by_step)]  # steps that were repeated after a kill count once
    curves = {
        title: {f"level {level}": [line.get(f"codebook/{name}_{level}", math.nan) for line in lines]
                for level in range(1, num_levels + 1)}
        for title, name in CURVES.items()
    }
    return [line["step"] for line in lines], curves


def sections(run: "Run", observed: Observed, rows: Sequence[dict[str, Any]], workdir: Path) -> dict[str, Any]:
    """The parts of the page, by the names of their figures."""
    from tarq_jax.experiments import plots
    from tarq_jax.experiments.page import Section
    from tarq_jax.metrics import diagnosis
    from tarq_jax.models import FirstOrderTarq

    counts = metrics.usage_counts(observed.output.codes, observed.codewords.shape[1])
    errors = attention_errors(observed)
    verdicts = [row["verdict"] for row in rows]
    if run.steps < run.config.steps:
        verdicts.insert(0, f"The run is not finished: it stopped at step {run.steps} of {run.config.steps}.")
    order = int(isinstance(run.objective.module, FirstOrderTarq))
    verdicts += diagnosis.diagnose_attention(errors.total, errors.outputs[ALL], order)
    table = [{key: value for key, value in row.items() if key != "verdict"} for row in rows]
    shown = np.random.default_rng(0).permutation(len(observed.latents))[:3000]
    parts = {"summary": Section("In words", verdicts, table)}
    steps, curves = training_curves(workdir, len(rows), run.config.codebook.start)
    if steps:
        parts["training"] = Section(
            "Over training", image=plots.png(plots.curves(steps, curves)),
            caption="Utilisation is of one batch; perplexity is of running counts. Here a codeword is dead "
                    "if its running count is below 1% of an even share; in the table above, if it is never "
                    "used. A level that collapses loses perplexity long before it loses utilisation.")
    return parts | {
        "usage": Section("Use of codewords", image=plots.png(plots.usage(counts)),
                         caption="Share of uses on the split, the most used first; dashed is even use."),
        "distances": Section(
            "Distances between codewords",
            image=plots.png(plots.distances(metrics.pairwise_distances(observed.codewords))),
            caption="Pairs near zero are codewords that do the same work."),
        "projection": Section(
            "Codewords among latents",
            image=plots.png(plots.projection(observed.latents[shown], observed.codewords[0], counts[0])),
            caption="Level 1 on the two main axes of the latents; the larger, the more used."),
        "attention": Section(
            "Attention against full attention",
            image=plots.png(plots.bars({
                "output, relative error by history length": errors.outputs,
                "weights, total variation by history length": errors.weights})),
            caption="Zero is full attention; of the weights, one is no overlap at all. The output of a level "
                    "is the sum of the levels up to it; that of a head is not projected yet. Empty histories "
                    "are left out."),
    }


def main() -> None:
    """Reads the flags, writes the page and prints the table."""
    from tarq_jax.experiments import page
    from tarq_jax.training.restore import load_run  # after the flags: importing JAX takes seconds

    workdir = Path(str(RUN.value))
    run = load_run(workdir)
    observed = observe(run, SPLIT.value, REQUESTS.value)
    rows = level_rows(run, observed)
    parts = sections(run, observed, rows, workdir)
    out = Path(OUT.value or workdir / "health")
    page.write(out, f"Codebook health of {workdir}", parts)
    reporting.print_table(rows, f"{SPLIT.value} split, {workdir}")
    for sentence in parts["summary"].sentences:
        print(sentence)
    print(f"page: {out / 'index.html'}")
    if JSON.value:
        reporting.write_rows(rows, JSON.value)


if __name__ == "__main__":
    cli.run(main)
