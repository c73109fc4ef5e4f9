"""Writes an artefact as a model of NVIDIA's Triton Inference Server, for its Python backend.

    python -m tarq_jax.serving.triton --artefact=artefacts/1 --out=models/tarq
    tritonserver --model-repository=models  # its Python needs `pip install 'tarq_jax[triton]'`

A request is one string, the JSON that `/score` of `tarq_jax.serving.server` takes; its answer is one string
of JSON, too. Triton batches requests; an invalid one fails alone. To serve another artefact, write another
model. Triton has to be 25.01 or newer: the Python backends of older versions were built for NumPy 1, and the
model refuses to load in them.
"""

import re
import shutil
from pathlib import Path

from absl import flags

from tarq_jax import cli

ARTEFACT = flags.DEFINE_string("artefact", None, "Folder, as `tarq_jax.serving.export` wrote it.",
                               required=True, allow_override=True)
OUT = flags.DEFINE_string("out", None, "Folder of the model to write, in a model repository; it must not "
                          "exist yet.", required=True, allow_override=True)
BATCH = flags.DEFINE_integer("max_batch_size", 8, "Most requests that are computed together.", lower_bound=1)
DELAY = flags.DEFINE_float("delay_ms", 2.0, "How long a request waits for others to be computed with it.",
                           lower_bound=0.0, allow_override=True)

NAME = re.compile(r"\w[\w.+-]*", re.ASCII)  # of a model; Triton's Python takes no other characters in a path
CONFIG = """name: "{name}"
backend: "python"
max_batch_size: {batch}
input [ {{ name: "request" data_type: TYPE_STRING dims: [ 1 ] }} ]
output [ {{ name: "answer" data_type: TYPE_STRING dims: [ 1 ] }} ]
instance_group [ {{ kind: KIND_CPU count: 1 }} ]  # where JAX computes is left to JAX
dynamic_batching {{ max_queue_delay_microseconds: {delay} }}
"""
MODEL = """# What Triton's Python backend runs: the artefact beside this file, by the installed `tarq_jax`.
from tarq_jax.serving.triton_model import TritonPythonModel
"""


def config(name: str, batch: int, delay: float) -> str:
    """`config.pbtxt` of a model; `delay` in seconds.

    Example:
      >>> print(config("tarq", 4, 0.002).splitlines()[0])
      name: "tarq"
    """
    return CONFIG.format(name=name, batch=batch, delay=round(1e6 * delay))


def write(artefact: Path, out: Path, *, batch: int, delay: float) -> None:
    """Writes the model; `out` appears only when it is complete.

    Raises:
      ValueError: `out` exists or its name is not valid for a model, or the artefact is damaged or missing.
    """
    if not NAME.fullmatch(out.name):
        raise ValueError(f"the model is named {out.name!r}, expected letters of ASCII, digits, and . + - _")
    if out.resolve().is_relative_to(artefact.resolve()):
        raise ValueError(f"the model is {out}, expected a folder outside of the artefact {artefact}")
    from tarq_jax.serving.artefact import new_folder, read_manifest
    from tarq_jax.serving.index import check_fingerprints

    with new_folder(out) as folder:
        check_fingerprints(*(read_manifest(artefact / kind, kind).fingerprint for kind in ("index", "model")))
        (folder / "config.pbtxt").write_text(config(out.name, batch, delay))
        shutil.copytree(artefact, folder / "1" / "artefact")
        (folder / "1" / "model.py").write_text(MODEL)


def main() -> None:
    """Reads the flags and writes the model."""
    out = Path(OUT.value)
    write(Path(ARTEFACT.value), out, batch=BATCH.value, delay=DELAY.value / 1e3)
    print(f"{out}: written")


if __name__ == "__main__":
    cli.run(main)
