"""Services that tests share, and folders that they can serve."""

import dataclasses
import shutil

import numpy as np
import pytest
import served

from tarq_jax.schema import Schema


@pytest.fixture(scope="session")
def artefacts(artefact, tmp_path_factory):
    """A folder of artefacts: 1, 2 (another model), anew (other weights), damaged, narrow (takes fewer event
    types); and of indices for 1: index-1 (no item 1), index-none (no item), index-more (more slots),
    index-infinite (whose last item has no finite score).
    """
    from tarq_jax.serving import Scorer, build, grow, remove, save_index

    root = tmp_path_factory.mktemp("artefacts")
    for name, method in (("1", "tarq_scalar"), ("2", "two_tower"), ("damaged", "two_tower")):
        shutil.copytree(artefact(method), root / name)
    method = served.method_of("tarq_scalar")
    dataset = served.world().dataset
    fewer = Schema(tuple(dataclasses.replace(field, size=3) if field.name == "event_type" else field
                         for field in dataset.schema.fields))
    for name, other in (("anew", served.trained_anew(method)), ("narrow", method._replace(schema=fewer))):
        (root / name).mkdir()
        build.write(other, dataclasses.replace(dataset, schema=other.schema), root / name,
                    histories=(2, 6))  # with fewer slots
    with (root / "damaged" / "index" / "ids.npy").open("ab") as file:
        file.write(b"more")
    index = Scorer.load(root / "1").index
    save_index(remove(index, [1]), root / "index-1")
    save_index(remove(index, index.ids[index.served]), root / "index-none")
    save_index(grow(index, 2 * index.capacity), root / "index-more")
    last = np.arange(index.capacity)[index.served][-1]
    infinite = {name: values.copy() for name, values in index.arrays.items()}
    for values in infinite.values():
        values[last] = np.inf if values.dtype.kind == "f" else values[last]
    save_index(dataclasses.replace(index, arrays=infinite), root / "index-infinite")
    return root


@pytest.fixture(scope="session")
def service(artefacts):
    """A shared service, which tests must not change."""
    import services

    with services.running(artefacts / "1") as running:
        yield running


@pytest.fixture(scope="session")
def guarded(artefacts):
    """A shared service with a token."""
    import services

    options = dataclasses.replace(services.PATIENT, token=services.TOKEN)
    with services.running(artefacts / "1", options) as running:
        yield running
