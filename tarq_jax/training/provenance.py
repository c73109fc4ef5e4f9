"""The origin of a run's numbers: settings, data, code, packages and device, kept beside its results."""

import functools
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections

from tarq_jax.config import own_code
from tarq_jax.data import Dataset
from tarq_jax.reporting import replacing

FILE = "provenance.json"
PACKAGES = ("tarq_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "numpy")
COMPILED_BY = ("jax_default_matmul_precision", "jax_enable_x64")  # options of JAX that change numbers
PACKAGE = Path(__file__).resolve().parents[1]


def provenance(config: ml_collections.ConfigDict, dataset: Dataset) -> dict[str, Any]:
    """Everything that must be equal for a run to give the same numbers, as JSON.

    On the same kind of device, numbers are then bitwise equal if the device's sums are deterministic; on GPU,
    set XLA's flag `--xla_gpu_deterministic_ops=true` for this.

    Returns:
      `config`, all settings; `data`, the fingerprint of the data; `revision` of the code, see `revision`;
      `packages`, their versions; `device`, number and kind; `compiled`, how XLA compiles and multiplies;
      `own`, a hash of the file of each function that the configuration names; `python`, its version.
    """
    return {
        "config": json.loads(config.to_json()), "data": dataset.fingerprint, "revision": revision(),
        "packages": dict(versions()), "device": device(),
        "compiled": {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "")}
        | {name: getattr(jax.config, name) for name in COMPILED_BY},
        "own": own_code(config), "python": platform.python_version(),
    }


def device() -> str:
    """Number and kind of the devices."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


@functools.cache
def versions() -> Mapping[str, str | None]:
    """The installed version of each of `PACKAGES`; None if unknown."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # for example a checkout that is not installed
            found[name] = None
    return found


@functools.cache
def revision(package: Path = PACKAGE) -> str | None:
    """The git revision that a package is imported from, ending in `-changed` if its files differ from it.

    None if the package is not under git's control, because it is installed or a copy.
    """
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit, changes = _git(package, "rev-parse", "HEAD"), _git(package, "status", "--porcelain", "--", ".")
    return f"{commit}-changed" if changes else commit


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, no repository, or an untracked file
        return None
    return done.stdout.strip()


def record(workdir: Path, config: ml_collections.ConfigDict, dataset: Dataset) -> None:
    """Appends an entry to the list in `workdir/provenance.json` if it differs from the last entry."""
    entries = read(workdir)
    entry = provenance(config, dataset)
    if entries[-1:] != [entry]:
        with replacing(workdir / FILE) as written:
            written.write_text(json.dumps([*entries, entry], indent=1) + "\n")


def check_code(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Raises ValueError if the file of an own MODULE:FUNCTION changed since the run was last trained."""
    entries, found = read(workdir), own_code(config)
    for name, before in (entries[-1]["own"] if entries else {}).items():
        if name in found and found[name] != before:
            raise ValueError(f"{workdir} was trained with the file of {name} as {before}, which is "
                             f"{found[name]} now; expected the file as it was, or another --workdir")


def check_data(workdir: Path, dataset: Dataset) -> None:
    """Raises ValueError if the run was trained on other data; data without a fingerprint is not checked."""
    entries = read(workdir)
    before = entries[-1]["data"] if entries else ""
    if before and dataset.fingerprint and before != dataset.fingerprint:
        raise ValueError(f"{workdir} was trained on the data {before}, files and options now give "
                         f"{dataset.fingerprint}; expected what it was trained on, or another --workdir")


def read(workdir: Path) -> list[dict[str, Any]]:
    """The entries that `record` wrote, oldest first; empty if the file is missing or damaged."""
    try:
        return json.loads((workdir / FILE).read_text())
    except (FileNotFoundError, ValueError):
        return []
