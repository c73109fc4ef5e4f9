"""Folders of files with a manifest: how an index and a model are stored on disk, checked and identified.

An artefact is a folder that holds two such folders, `index` and `model`. Either can be replaced by another
with the same fingerprint. A manifest is JSON. It holds the kind and version of the format, the versions of
the packages that wrote it, the fingerprint, facts about the index or model, the size and SHA-256 of every
file, and a checksum of itself. If a check fails on reading, a ValueError names the file, what was found and
what was expected.
"""

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import ml_dtypes
import numpy as np
from jax import export

from tarq_jax.serving.index import Index
from tarq_jax.signals import terminable

Kind = Literal["index", "model"]

MANIFEST = "manifest.json"
VERSION = 3  # of the format; other versions are refused
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `out`, and renames it to `out` at the end unless the body raised.

    After a power cut, too, there is either no `out` or a whole one. An existing folder cannot be replaced
    atomically, so it is refused: write versions side by side.

    Raises:
      ValueError: `out` exists.
    """
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out} exists, expected a path that does not: a folder cannot be replaced in one "
                         "step. Write a new version beside it")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        with terminable():
            yield temporary
            for path in (*temporary.rglob("*"), temporary):
                _to_disk(path)
        temporary.rename(out)
        _to_disk(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _to_disk(path: Path) -> None:
    """Returns when the content of a file, or the names in a folder if its system can, is on the disk."""
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_manifest(folder: Path, kind: Kind, fingerprint: str, facts: Mapping[str, Any]) -> None:
    """Writes a manifest of all files that a folder holds now."""
    files = {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _digest(path)}
             for path in sorted(folder.rglob("*")) if path.is_file()}
    versions = {name: metadata.version(name) for name in ("jax", "numpy")}
    manifest = {"format": f"tarq_jax/{kind}", "version": VERSION, "fingerprint": fingerprint,
                "versions": versions, "facts": facts, "files": files}
    text = json.dumps(manifest | {"checksum": _checksum(manifest)}, indent=1)
    (folder / MANIFEST).write_text(text + "\n")


class Manifest(NamedTuple):
    """What a manifest says about its folder."""

    fingerprint: str
    facts: dict[str, Any]
    digests: dict[str, str]  # file -> SHA-256
    stamps: dict[Path, tuple[int, ...]]  # of each file, before it was checked

    def check_unchanged(self) -> None:
        """Raises ValueError if a file was changed after it was checked; call it when all have been read."""
        for path, stamp in self.stamps.items():
            if _stamp(path) != stamp:
                raise ValueError(f"{path} changed while it was read, expected a folder that stays as it is")


def read_manifest(folder: Path, kind: Kind) -> Manifest:
    """Reads the manifest of a folder, and checks that all files match it.

    Raises:
      ValueError: a file is missing, truncated or changed, or the format is of another kind or version.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        found = manifest["format"], manifest["version"]
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path} is missing, expected the manifest of an exported {kind}") from None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error}), expected the JSON of an export") from None
    if found != (f"tarq_jax/{kind}", VERSION):
        raise ValueError(f"{path} is of format {found[0]!r}, version {found[1]!r}, expected "
                         f"'tarq_jax/{kind}', version {VERSION}")
    checksum = manifest.pop("checksum", None)
    if checksum != _checksum(manifest):
        raise ValueError(f"{path} has checksum {checksum}, expected {_checksum(manifest)}: it was changed")
    stamps = {folder / name: _stamp(folder / name) for name in manifest["files"]}
    for name, facts in manifest["files"].items():
        _check_file(folder / name, facts)
    digests = {name: facts["sha256"] for name, facts in manifest["files"].items()}
    return Manifest(manifest["fingerprint"], manifest["facts"], digests, stamps)


def _stamp(path: Path) -> tuple[int, ...]:
    """What changes when a file is written or replaced; empty if there is none."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


def write_index(index: Index, folder: Path) -> None:
    """Writes an index into an empty folder; wrap it in `new_folder` to do so atomically."""
    arrays = {"ids": index.ids, "served": index.served} | dict(index.arrays)
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values.view(np.uint16) if values.dtype == BFLOAT16 else values)
    described = {name: {"dtype": str(values.dtype), "shape": list(values.shape)}
                 for name, values in arrays.items()}
    write_manifest(folder, "index", index.fingerprint, {"arrays": described, "items": index.num_served})


def save_index(index: Index, out: str | Path) -> None:
    """Writes a changed index to a new folder, atomically; `Scorer.load(artefact, index=out)` reads it.

    Raises:
      ValueError: `out` exists.
    """
    with new_folder(Path(out)) as folder:
        write_index(index, folder)


def read_index(folder: Path) -> Index:
    """The inverse of `write_index`; raises ValueError as `read_manifest` does."""
    manifest = read_manifest(folder, "index")
    arrays = {name: _read_array(folder / f"{name}.npy", described)
              for name, described in manifest.facts["arrays"].items()}
    manifest.check_unchanged()
    return Index(ids=arrays.pop("ids"), served=arrays.pop("served"), arrays=arrays,
                 fingerprint=manifest.fingerprint)


def _read_array(path: Path, described: Mapping[str, Any]) -> np.ndarray:
    values = np.load(path, allow_pickle=False)
    if described["dtype"] == "bfloat16":
        values = values.view(BFLOAT16)
    if (str(values.dtype), list(values.shape)) != (described["dtype"], described["shape"]):
        raise ValueError(f"{path} holds {values.dtype} {list(values.shape)}, expected {described['dtype']} "
                         f"{described['shape']}")
    return values


def write_model(
    programs: Mapping[str, bytes], weights: Mapping[str, Mapping[str, np.ndarray]], fingerprint: str,
    facts: Mapping[str, Any], folder: Path,
) -> None:
    """Writes programs and the weights of each part into an empty folder."""
    for name, program in programs.items():
        (folder / f"{name}.jaxexport").write_bytes(program)
    for part, arrays in weights.items():
        np.savez(folder / f"{part}.npz", allow_pickle=False, **arrays)
    write_manifest(folder, "model", fingerprint, dict(facts) | {"programs": sorted(programs)})


def read_weights(folder: Path, part: str) -> dict[str, np.ndarray]:
    """The weights of one part of a model, by name."""
    with np.load(folder / f"{part}.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def read_program(folder: Path, name: str) -> export.Exported:
    """A program of a model; ValueError if JAX cannot read it, or if it is a different program."""
    path = folder / f"{name}.jaxexport"
    try:
        program = export.deserialize(bytearray(path.read_bytes()))
    except Exception as error:  # any: JAX may fail in any way on a program that another version wrote
        raise ValueError(f"{path} cannot be read by JAX {jax.__version__} ({error}), expected a program of "
                         "jax.export") from None
    if program.fun_name != name:
        raise ValueError(f"{path} holds the program {program.fun_name!r}, expected {name!r}")
    return program


def version_name(artefact: Path, index: Path) -> str:
    """The folder's name, with symbolic links resolved, and a digest of its two manifests.

    The digest covers all files, as the manifests hold theirs.

    Raises:
      ValueError: a manifest is missing, or cannot be read.
    """
    digest = hashlib.sha256()
    for folder in (artefact / "model", index):
        try:
            digest.update((folder / MANIFEST).read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(f"{folder / MANIFEST} is missing, expected an artefact of "
                             "`python -m tarq_jax.serving.export`") from None
        except OSError as error:
            raise ValueError(f"{folder / MANIFEST} cannot be read ({error}), expected an artefact of "
                             "`python -m tarq_jax.serving.export`") from None
    return f"{artefact.resolve().name}-{digest.hexdigest()[:8]}"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _check_file(path: Path, facts: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is missing, expected a file of {facts['bytes']} bytes")
    if (size := path.stat().st_size) != facts["bytes"]:
        raise ValueError(f"{path} has {size} bytes, expected {facts['bytes']}: it was cut or changed")
    check_digest(path, facts["sha256"])


def check_digest(path: Path, expected: str) -> None:
    """Raises ValueError if the file is not the one that the manifest lists."""
    if (digest := _digest(path)) != expected:
        raise ValueError(f"{path} has SHA-256 {digest}, expected {expected}: it was changed")
