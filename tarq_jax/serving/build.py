"""Builds an artefact from a finished run: makes its method, encodes its items, exports its programs."""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from tarq_jax import data
from tarq_jax.models import TargetAttention
from tarq_jax.models.parts import target_attention_parts
from tarq_jax.serving import methods
from tarq_jax.serving.artefact import write_index, write_model
from tarq_jax.serving.index import Index, make_index
from tarq_jax.serving.method import Method
from tarq_jax.serving.programs import export_method
from tarq_jax.serving.vectors import Storage, store
from tarq_jax.training import conversion
from tarq_jax.training.restore import Run

ITEM_BATCH = 4096  # items encoded at a time


def method_of(
    run: Run, *, codewords: int | None = None, order: int = 1, levels: int = 0,
    correction: str = "fitted", requests: int = 512, fine_tune: int = 0, seed: int = 0,
) -> Method:
    """The method that serves a finished run.

    Args:
      run: a run of any model.
      codewords: K, to convert a run of target attention to TARQ (see `tarq_jax.conversion`); None serves
        the run without conversion.
      order: order of the conversion; 1 corrects look-ups by their first derivative.
      levels: number of further levels, of 256 codewords each, that store the corrections of order 1; 0
        stores them exactly.
      correction: how corrections of order 1 are found, a key of `conversion.CORRECTIONS`.
      requests: number of training requests that fitted corrections are fitted to.
      fine_tune: steps for which codewords, corrections and head are then trained.
      seed: seed of the conversion's k-means and of the order of the data.

    Raises:
      ValueError: `codewords` is given for a run of another model, or the model cannot be served.
    """
    name, module, codebook = run.config.model.name, run.objective.module, run.state.codebook
    if codewords is not None:
        if not isinstance(module, TargetAttention):
            raise ValueError(f"the run is one of {name!r}, expected one of target attention with codewords")
        trained = conversion.trained_model(target_attention_parts(module), run.state.params, run.dataset)
        index = conversion.fit_index(trained, num_codewords=codewords, order=order, correction=correction,
                                     requests=requests, seed=seed)
        if order and levels:
            index = conversion.quantize_corrections(index, num_levels=levels, seed=seed)
        params = trained.params
        if fine_tune:
            params, index = conversion.fine_tune(trained, index, steps=fine_tune, seed=seed)
        return methods.converted(module, params, index)
    learned = None if codebook is None else np.asarray(codebook.codewords)
    if run.objective.to_method is not None:
        made = run.objective.to_method(jax.tree.map(np.asarray, run.state.params), learned)
        if not isinstance(made, Method):
            raise ValueError(f"to_method of {name!r} gives a {type(made).__name__}, expected a Method")
        return made
    if module is None:
        raise ValueError(f"the run is one of {name!r}, whose objective says neither module nor to_method")
    return methods.from_module(module, run.state.params, learned)


def write(
    method: Method, dataset: data.Dataset, folder: Path, *, histories: Sequence[int],
    vectors: Storage = "float32", platforms: Sequence[str] = ("cpu",), capacity: int | None = None,
) -> Index:
    """Writes `index` and `model` into an existing folder; see `tarq_jax.serving.export` for the arguments.

    Items have the ids of `Dataset.item_ids` if these are numbers; otherwise an item's id is its row in the
    data set, 1 to V - 1.

    Raises:
      ValueError: `histories` are none, or a length is below 1.
    """
    histories = sorted(set(histories))
    if not histories or histories[0] < 1:
        raise ValueError(f"histories are {histories}, expected lengths of at least 1")
    exported = export_method(method, histories=histories, vectors=vectors, platforms=platforms)
    arrays = store(encode_items(method, dataset), vectors, method.num_codewords)
    index = make_index(_ids(dataset)[1:], arrays, exported.fingerprint, capacity=capacity)
    facts = {"method": method.name, "schema": dataset.schema.to_json(), "histories": histories,
             "vectors": vectors, "platforms": list(platforms), "num_codewords": method.num_codewords,
             "arrays": {name: {"dtype": str(values.dtype), "row": list(values.shape[1:])}
                        for name, values in index.arrays.items()}}
    for name in ("index", "model"):
        (folder / name).mkdir()
    write_index(index, folder / "index")
    write_model(exported.programs, exported.weights, exported.fingerprint, facts, folder / "model")
    return index


def _ids(dataset: data.Dataset) -> np.ndarray:
    """[V] integers: the items' ids if they are numbers, otherwise their rows."""
    rows = np.arange(dataset.schema.num_items)
    ids = rows if dataset.item_ids is None else np.asarray(dataset.item_ids)
    return ids if ids.dtype.kind in "iu" else rows


def encode_items(method: Method, dataset: data.Dataset) -> dict[str, np.ndarray]:
    """What the index stores for all real items, [V - 1, ...] each."""
    compute = jax.jit(method.encode)
    found = [{name: np.asarray(values)[mask]
              for name, values in compute(method.encode_weights, features).items()}
             for features, mask in data.item_batches(dataset, ITEM_BATCH)]
    encoded = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
    return encoded | {name: values[1:] for name, values in method.known.items()}
