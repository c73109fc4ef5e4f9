"""Exports a trained run as an artefact for a scorer: an index of its items, and programs.

    python -m tarq_jax.serving.export --run=runs/synthetic --out=artefacts/1

A run of target attention is exported unchanged, or as TARQ if `--codewords` is given. Its items' queries are
then quantized, and `--order=1` corrects look-ups by their first derivative (see `tarq_jax.conversion`).
`--levels=3` stores an item's correction in 3 bytes. `--fine_tune=600` trains codewords, corrections and head
for 600 steps, which adds no cost in serving.
"""

from pathlib import Path
from typing import cast

from absl import flags

from tarq_jax import cli

RUN = cli.run_flag()
# `allow_override`: another command has a flag of the same name, and one process may import both.
OUT = flags.DEFINE_string(
    "out", None, "Folder to write; it must not exist yet.", required=True, allow_override=True)
CODEWORDS = flags.DEFINE_integer(
    "codewords", None, "Number of codewords that quantize the queries of a target-attention run.",
    allow_override=True)
ORDER = flags.DEFINE_enum(
    "order", "1", ["0", "1"], "With --codewords: 1 corrects look-ups, 0 does not.", allow_override=True)
LEVELS = flags.DEFINE_integer(
    "levels", 0, "With --codewords and --order=1: further levels of 256 codewords, each of which takes one "
    "byte of an item's correction. 0 stores the exact correction vector, about a quarter of the index size. "
    "3 levels store it in 3 bytes and lose 0.2 to 0.9 points of gap recovered.",
    lower_bound=0, allow_override=True)
CORRECTION = cli.correction_flag()
CALIBRATION = cli.calibration_flag()
FINE_TUNE = flags.DEFINE_integer(
    "fine_tune", 0, "With --codewords: steps for which codewords, corrections and head are then trained.",
    lower_bound=0, allow_override=True)
VECTORS = flags.DEFINE_enum(
    "vectors", "float32", ["float32", "bfloat16", "int8"], "How the index keeps its vectors.")
PLATFORMS = flags.DEFINE_list("platforms", ["cpu", "cuda", "tpu"], "Platforms that the programs run on.")
HISTORIES = flags.DEFINE_list(
    "histories", None, "Lengths that histories are padded to; by default the longest history of the data, a "
    "quarter and a sixteenth of it. Longer histories keep their newest events.", allow_override=True)
CAPACITY = flags.DEFINE_integer(
    "capacity", None, "Number of slots of the index; by default a tenth more than there are items.")
SEED = cli.seed_flag("Seed of the k-means of --codewords, and of --fine_tune.")

KNOWN_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
SHORTEST = 16  # the default lengths are no shorter, unless the longest history is


def check_flags() -> list[int] | None:
    """Checks all flags and returns the lengths of `--histories`; an invalid value is a wrong call."""
    if not PLATFORMS.value:
        cli.wrong_call(f"--platforms is '', expected some of {','.join(KNOWN_PLATFORMS)}")
    for platform in PLATFORMS.value:
        if platform not in KNOWN_PLATFORMS:
            cli.wrong_call(f"--platforms has {platform!r}, expected some of {','.join(KNOWN_PLATFORMS)}")
    for flag, least in ((CODEWORDS, 2), (CAPACITY, 1)):
        if flag.value is not None and flag.value < least:
            cli.wrong_call(f"--{flag.name} is {flag.value}, expected at least {least}")
    for flag in (ORDER, LEVELS, CORRECTION, CALIBRATION, FINE_TUNE):
        if CODEWORDS.value is None and flag.value != flag.default:
            cli.wrong_call(f"--{flag.name} is {flag.value}, expected --codewords with it, which converts")
    for flag in (LEVELS, CORRECTION, CALIBRATION):
        if ORDER.value == "0" and flag.value != flag.default:
            cli.wrong_call(f"--{flag.name} is {flag.value}, expected {flag.default} with --order=0, "
                           "which has no corrections")
    if HISTORIES.value is None:
        return None
    return sorted(set(cli.whole_numbers(HISTORIES, "positive lengths")))


def default_histories(longest: int) -> list[int]:
    """The longest history, a quarter and a sixteenth of it; the latter two are at least `SHORTEST`.

    Example:
      >>> default_histories(1000), default_histories(50)
      ([63, 250, 1000], [16, 50])
    """
    wanted = {max(-(-longest // part), SHORTEST) for part in (4, 16)}
    return sorted({length for length in wanted if length < longest} | {longest})


def main() -> None:
    """Reads the flags and writes the artefact."""
    lengths = check_flags()
    out = Path(str(OUT.value))
    from tarq_jax.serving.artefact import new_folder

    with new_folder(out) as folder:
        from tarq_jax.serving import build
        from tarq_jax.serving.index import round_up
        from tarq_jax.serving.vectors import Storage
        from tarq_jax.training import restore, setup

        run = restore.load_run(Path(str(RUN.value)))
        capacity, items = CAPACITY.value, run.dataset.schema.num_items - 1
        if capacity is not None and round_up(capacity) < items:
            raise ValueError(f"--capacity is {capacity}, expected at least {items}, the run's items")
        method = build.method_of(
            run, codewords=CODEWORDS.value, order=int(ORDER.value), levels=LEVELS.value,
            correction=CORRECTION.value, requests=CALIBRATION.value, fine_tune=FINE_TUNE.value,
            seed=SEED.value)
        lengths = lengths or default_histories(setup.batch_shapes(run.dataset)["history_length"])
        build.write(method, run.dataset, folder, histories=lengths, vectors=cast(Storage, VECTORS.value),
                    platforms=PLATFORMS.value, capacity=capacity)
    print(f"{out}: written")


if __name__ == "__main__":
    cli.run(main)
