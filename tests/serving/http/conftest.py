"""Services that tests share, and folders that they can serve."""

import dataclasses
import shutil

import pytest


@pytest.fixture(scope="session")
def artefacts(artefact, tmp_path_factory):
    """A folder of artefacts: 1, 2 (of another model), damaged, and index-1, an index of 1 without item 1."""
    from tarq_jax.serving import Scorer, remove, save_index

    root = tmp_path_factory.mktemp("artefacts")
    for name, method in (("1", "tarq_scalar"), ("2", "two_tower"), ("damaged", "two_tower")):
        shutil.copytree(artefact(method), root / name)
    with (root / "damaged" / "index" / "ids.npy").open("ab") as file:
        file.write(b"more")
    save_index(remove(Scorer.load(root / "1").index, [1]), root / "index-1")
    return root


@pytest.fixture(scope="session")
def service(artefacts):
    """A service that tests leave as it is."""
    import services

    with services.running(artefacts / "1") as running:
        yield running


@pytest.fixture(scope="session")
def guarded(artefacts):
    """A service with a token."""
    import services

    options = dataclasses.replace(services.PATIENT, token=services.TOKEN)
    with services.running(artefacts / "1", options) as running:
        yield running
