"""Dense item features from lists of attributes: a truncated SVD of the item x attribute counts."""

import json
from pathlib import Path

import numpy as np
from scipy import sparse


def _read(path: Path) -> dict[int, list]:
    try:
        lists = {int(item): values for item, values in json.loads(path.read_text(encoding="utf-8")).items()}
    except (AttributeError, ValueError) as error:
        raise ValueError(f"{path}: {error}, expected a JSON object, item id -> list") from None
    for item, values in lists.items():
        if not isinstance(values, list) or not all(isinstance(value, int | str) for value in values):
            raise ValueError(f"{path}: item {item} has {values!r}, expected a list of attribute ids")
    return lists


def _counts(lists: dict[int, list], item_ids: np.ndarray) -> sparse.csr_matrix:
    """[items, attributes]: how often each item has each attribute; zeros for items without a list."""
    per_item = [[str(value) for value in lists.get(int(item), ())] for item in item_ids]
    rows = np.repeat(np.arange(len(item_ids)), [len(values) for values in per_item])
    names, columns = np.unique([value for values in per_item for value in values], return_inverse=True)
    return sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(item_ids), len(names)))


def svd_features(counts: sparse.csr_matrix, dims: int) -> np.ndarray:
    """`U S` of a truncated SVD, largest singular value first, scaled to a mean square of 1 over all entries.

    The result is deterministic: the start vector is fixed, and signs are chosen so that the entry of largest
    magnitude in each right singular vector is positive.

    Args:
      counts: [M, A] float64.
      dims: number of features; those beyond the rank are 0.

    Returns:
      [M, dims] float32.
    """
    small = min(counts.shape)
    features = np.zeros((counts.shape[0], dims), np.float32)
    if not counts.nnz:
        return features
    if small <= dims + 1:
        left, values, right = np.linalg.svd(counts.toarray(), full_matrices=False)
    else:
        from scipy.sparse import linalg  # imported here because it takes a quarter of a second

        left, values, right = linalg.svds(counts, k=dims, v0=np.ones(small) / np.sqrt(small))
    order = np.argsort(-values, kind="stable")[:dims]
    left, values, right = left[:, order], values[order], right[order]
    peaks = np.take_along_axis(right, np.abs(right).argmax(1)[:, None], axis=1)[:, 0]
    features[:, :len(order)] = left * values * np.sign(peaks)
    return features / np.sqrt(np.mean(np.square(features), dtype=np.float64)).astype(np.float32)


def attribute_features(path: Path, item_ids: np.ndarray, dims: int) -> np.ndarray:
    """`svd_features` of the attribute lists in a JSON file.

    Args:
      path: JSON object, item id -> list of attribute ids; repeated attributes are counted.
      item_ids: [V - 1] original ids of the items; item i is at position i - 1.
      dims: number of features.

    Returns:
      [V, dims] float32; zeros in the padding row 0 and for items without attributes.
    """
    features = svd_features(_counts(_read(path), item_ids), dims)
    return np.concatenate([np.zeros_like(features[:1]), features])
