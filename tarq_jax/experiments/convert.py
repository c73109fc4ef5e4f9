"""Converts a trained target-attention model to TARQ without retraining, and measures what accuracy it loses.

    python -m tarq_jax.experiments.convert --checkpoint=runs/compare/target_attention-0 --codewords=64

`--codewords`, `--order` and `--levels` take lists; the table has one row per combination. Order 1 corrects
each look-up by a first derivative. Its corrections are stored exactly (`--levels=0`) or in further levels of
256 codewords, each of which takes one byte per item. `--fine_tune=300` then trains codewords and head for 300
steps.
"""

import functools
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags
from rich.console import Console
from rich.progress import track

from tarq_jax import cli, reporting
from tarq_jax.experiments import run_table

if TYPE_CHECKING:
    from tarq_jax.training.restore import Run

CHECKPOINTS = flags.DEFINE_multi_string(
    "checkpoint", None, "Working directory of a finished run of target attention; repeat for more seeds.",
    required=True)
CODEWORDS = flags.DEFINE_list("codewords", ["64"], "Numbers of codewords of level 1.")
ORDER = flags.DEFINE_list("order", ["1"], "0 looks attention up, 1 corrects it by its first derivative.")
LEVELS = flags.DEFINE_list("levels", ["0"], "Numbers of further levels of 256 codewords, which store "
                           "corrections; 0 stores them exactly.")
CORRECTION = cli.correction_flag()
CALIBRATION = cli.calibration_flag()
FINE_TUNE = flags.DEFINE_integer(
    "fine_tune", 0, "Steps for which codewords and head are then trained; 0 for none.", lower_bound=0,
    allow_override=True)
SEED = cli.seed_flag("Seed of k-means and of the order of the data.")
TWO_TOWERS = flags.DEFINE_multi_string(
    "two_tower", [], "Two-tower run, for gap recovered; one for each checkpoint, in the same order.")
PLOT = flags.DEFINE_string("plot", None, "PNG file for a figure of attention error by codewords and order.")
JSON = cli.json_flag()


class Setting(NamedTuple):
    """One row of the table."""

    codewords: int  # K of level 1
    order: int
    levels: int  # further levels; 0 stores corrections exactly


def settings() -> list[Setting]:
    """All combinations that the flags ask for; order 0 has no further levels."""
    parsed = [cli.whole_numbers(flag, f"whole numbers of at least {least}", least=least)
              for flag, least in ((CODEWORDS, 2), (ORDER, 0), (LEVELS, 0))]
    if not set(parsed[1]) <= {0, 1}:
        cli.wrong_call(f"--order is {','.join(ORDER.value)!r}, expected 0, 1 or 0,1")
    found = [Setting(k, order, levels if order else 0) for k, order, levels in itertools.product(*parsed)]
    return list(dict.fromkeys(found))


def convert(
    checkpoint: Path, floor: float | None, wanted: Sequence[Setting], console: Console
) -> list[dict[str, Any]]:
    """A row for the model without conversion, then one for each setting, and one more if it is fine-tuned.

    Args:
      checkpoint: folder of the run.
      floor: AUC of the two-tower, for gap recovered; None without one.
      wanted: settings.
      console: console for the progress bar.
    """
    from tarq_jax.metrics import gap_recovered  # after the flags: importing JAX takes seconds
    from tarq_jax.training import conversion as training

    model, run = load_model(checkpoint)
    config = run.config
    training.check_codewords(model, max(setting.codewords for setting in wanted))
    evaluate = functools.partial(
        training.evaluate_index, model, recall_k=config.recall_k, batch_size=config.eval_batch_size)
    rows: list[dict[str, Any]] = []
    for setting in track(wanted, "converting", console=console):
        index, facts = make_index(model, setting)
        converted, exact = evaluate(index)
        rows = rows or [exact | {"model": "target attention"}]
        rows.append(_described(converted, exact, setting, facts))
        if FINE_TUNE.value:
            tuned, index = training.fine_tune(model, index, steps=FINE_TUNE.value, seed=SEED.value)
            converted, exact = evaluate(index, tuned)
            row = _described(converted, exact, setting, facts) | {"fine_tuned": FINE_TUNE.value}
            rows.append(row | {"model": f"{row['model']}, fine-tuned"})
    if floor is not None:
        rows = [row | {"gap_recovered": gap_recovered(row["auc"], floor, rows[0]["auc"])} for row in rows]
    return [{"seed": config.seed} | row for row in rows]


def load_model(checkpoint: Path) -> tuple[Any, "Run"]:
    """The trained model of a finished run of target attention, and the run.

    Raises:
      ValueError: it is not such a run, or its model computes something else than its parts.
    """
    from tarq_jax.models import TargetAttention
    from tarq_jax.models.parts import target_attention_parts
    from tarq_jax.training import conversion as training
    from tarq_jax.training.restore import load_run

    run = load_run(checkpoint)
    module = run.objective.module
    if not isinstance(module, TargetAttention):
        name = run.config.model.name
        raise ValueError(f"{checkpoint}: a run of {name!r}, expected one of target attention")
    if run.steps < run.config.steps:
        raise ValueError(f"{checkpoint}: a run that stopped at step {run.steps} of {run.config.steps}, "
                         f"expected a finished one")
    model = training.trained_model(target_attention_parts(module), run.state.params, run.dataset)
    training.check_logits(model, module)
    return model, run


def check_runs(checkpoints: Sequence[Path], two_towers: Sequence[Path]) -> None:
    """Raises ValueError unless the runs can be compared, before any of them is converted.

    All of them must have the same data and settings, but different seeds; and each two-tower the same data,
    seed and number of steps as its run.
    """
    from tarq_jax.training import checkpoint, provenance, restore

    def data_of(workdir: Path) -> str:
        return next((entry["data"] for entry in reversed(provenance.read(workdir))), "")

    def compare(flag: str, workdir: Path, saved: Mapping[str, Any], like: Path, held: Callable[[str], bool]
                ) -> None:
        if found := checkpoint.difference(saved, configs[like], held):
            raise ValueError(f"{flag}: {workdir} was {found}, that is {like}; expected the same in both")
        if data_of(workdir) != data_of(like):
            raise ValueError(f"{flag}: {workdir} was trained on the data {data_of(workdir)}, {like} on "
                             f"{data_of(like)}; expected the same in both")

    def of_two_tower(name: str) -> bool:
        return name in ("seed", "steps") or (name.startswith("data.") and run_table.has_effect(name))

    configs = {}
    for path in checkpoints:
        if (saved := checkpoint.saved_settings(path)) is None:
            raise FileNotFoundError(f"{path}: no checkpoints in it, expected the --workdir of a training run")
        configs[path] = restore.config_of(saved)
        if configs[path].seed in {configs[other].seed for other in configs if other != path}:
            raise ValueError(f"--checkpoint: {path} is another run of seed {configs[path].seed}, expected "
                             f"runs of different seeds")
        compare("--checkpoint", path, saved, checkpoints[0], run_table.has_effect)
    for path, two_tower in zip(checkpoints, two_towers, strict=False):  # there may be none
        if (saved := checkpoint.saved_settings(two_tower)) is not None:
            compare("--two_tower", two_tower, saved, path, of_two_tower)


def make_index(model: Any, setting: Setting) -> tuple[Any, dict[str, float]]:
    """The index of a setting, and the relative error with which its further levels store corrections."""
    from tarq_jax import conversion
    from tarq_jax.training import conversion as training

    index = training.fit_index(
        model, num_codewords=setting.codewords, order=setting.order, correction=CORRECTION.value,
        requests=CALIBRATION.value, seed=SEED.value)
    if not setting.order:
        return index, {}
    if not setting.levels:
        return index, {"correction_error": 0.0}
    quantized = training.quantize_corrections(index, num_levels=setting.levels, seed=SEED.value)
    return quantized, {"correction_error": conversion.relative_error(quantized, index.levels[1])}


def _described(converted: dict, exact: dict, setting: Setting, facts: dict) -> dict[str, Any]:
    name = f"order {setting.order}, K={setting.codewords}"
    if setting.order:
        name += f", {setting.levels} further levels" if setting.levels else ", exact corrections"
    difference = {"auc_difference": converted["auc"] - exact["auc"]}
    return converted | {"model": name} | setting._asdict() | difference | facts


def _auc_of(two_tower: Path) -> float:
    path = two_tower / "results.json"
    if not path.is_file():
        raise FileNotFoundError(f"--two_tower: {path} does not exist, expected a finished two-tower run")
    try:
        rows = [dict(row) for row in json.loads(path.read_text())]
    except (TypeError, ValueError) as error:
        raise ValueError(f"--two_tower: {path} cannot be read as a table of results: {error}") from error
    found = [row for row in rows if row.get("model") == "two_tower"]
    if not found or found[0].get("auc") is None:
        raise ValueError(f"--two_tower: {path} has the models {[row.get('model') for row in rows]}, expected "
                         f"the AUC of 'two_tower' among them")
    return found[0]["auc"]


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plots attention error by codewords of level 1, one line per order and number of further levels."""
    from tarq_jax.experiments import plots

    lines: dict[str, dict[int, float]] = {}
    for row in rows:
        if "order" in row and "fine_tuned" not in row:
            name = row["model"].replace(f"K={row['codewords']:.0f}", "").replace(", , ", ", ").strip(", ")
            lines.setdefault(name, {})[int(row["codewords"])] = row["attention_error"]
    with reporting.replacing(path) as written:
        written.write_bytes(plots.png(plots.errors_by_size(lines)))


def main() -> None:
    """Reads the flags, converts and prints the table."""
    if TWO_TOWERS.value and len(TWO_TOWERS.value) != len(CHECKPOINTS.value):
        cli.wrong_call(f"--two_tower is given {len(TWO_TOWERS.value)} times, expected once for each of "
                       f"{len(CHECKPOINTS.value)} --checkpoint")
    if len({Path(path).resolve() for path in CHECKPOINTS.value}) < len(CHECKPOINTS.value):
        cli.wrong_call(f"--checkpoint is {', '.join(CHECKPOINTS.value)}, expected different runs")
    wanted, console = settings(), Console()
    rows: list[dict[str, Any]] = []
    checkpoints = [Path(path) for path in CHECKPOINTS.value]
    two_towers = [Path(path) for path in TWO_TOWERS.value]
    floors = [_auc_of(path) for path in two_towers]
    check_runs(checkpoints, two_towers)
    for checkpoint, floor in itertools.zip_longest(checkpoints, floors):
        rows += convert(checkpoint, floor, wanted, console)
    summary = reporting.summarise(rows) if len(CHECKPOINTS.value) > 1 else []
    reporting.print_table(summary or rows, f"test split, {len(CHECKPOINTS.value)} converted",
                          reporting.PREDICTOR)
    if JSON.value:
        reporting.write_rows(rows + summary, JSON.value)
    if PLOT.value:
        plot(summary or rows, Path(PLOT.value))


if __name__ == "__main__":
    cli.run(main)
