"""What Triton's Python backend runs: the `model.py` that `tarq_jax.serving.triton` writes imports it.

Requests and answers are text; the module `triton_python_backend_utils` exists only inside Triton.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from tarq_jax.serving.artefact import version_name
from tarq_jax.serving.http.options import Limits
from tarq_jax.serving.http.queries import Query, answer, described, read_query
from tarq_jax.serving.scorer import Scorer


def batch_sizes(largest: int) -> list[int]:
    """Powers of two below the largest batch size, and that size.

    Example:
      >>> batch_sizes(6), batch_sizes(1)
      ([1, 2, 4, 6], [1])
    """
    return sorted({min(2**power, largest) for power in range(largest.bit_length() + 1)})


def answers(scorer: Scorer, version: str, bodies: Sequence[bytes]) -> list[bytes | Exception]:
    """What /score would answer to each body, or the error of an invalid one; all are computed together."""
    found = [_query(scorer, body) for body in bodies]
    queries = [query for query in found if isinstance(query, Query)]
    rankings = iter(answer(scorer, queries) if queries else [])
    results = [next(rankings) if isinstance(query, Query) else query for query in found]
    return [result if isinstance(result, Exception) else orjson.dumps(
        described(version, result), option=orjson.OPT_SERIALIZE_NUMPY) for result in results]


def _query(scorer: Scorer, body: bytes) -> Query | ValueError:
    try:
        return read_query(body, scorer.schema, Limits())
    except ValueError as error:
        return error


class TritonPythonModel:
    """A scorer behind Triton's interface."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the artefact beside `model.py` and warms it up; a ValueError keeps Triton from serving it."""
        import triton_python_backend_utils as triton

        _check_backend(triton)
        artefact = Path(args["model_repository"]) / args["model_version"] / "artefact"
        largest = json.loads(args["model_config"])["max_batch_size"]
        self._version = version_name(artefact, artefact / "index")
        self._scorer = Scorer.load(artefact, batch_sizes=batch_sizes(largest)).warm_up()

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """A response to each request. A request holds one or more texts; all texts are computed together."""
        import triton_python_backend_utils as triton

        texts = [triton.get_input_tensor_by_name(request, "request").as_numpy() for request in requests]
        found = iter(answers(self._scorer, self._version, [body for text in texts for body in text.ravel()]))
        return [_response(triton, text.shape, [next(found) for _ in range(text.size)]) for text in texts]


def _response(triton: Any, shape: tuple[int, ...], found: Sequence[bytes | Exception]) -> Any:
    """A request's answers in one tensor, or the first error among them, as one that the client made."""
    for row, answered in enumerate(found):
        if isinstance(answered, Exception):
            error = triton.TritonError(f"text {row}: {answered}", triton.TritonError.INVALID_ARG)
            return triton.InferenceResponse(output_tensors=[], error=error)
    return triton.InferenceResponse([triton.Tensor("answer", np.array(found, object).reshape(shape))])


def _check_backend(triton: Any) -> None:
    """Raises ValueError if arrays arrive changed, as in backends that were built for NumPy 1."""
    sent = np.arange(3)
    found = triton.Tensor.from_dlpack("found", triton.Tensor("sent", sent).to_dlpack()).as_numpy()
    if not np.array_equal(found, sent):
        raise ValueError(f"the Python backend takes the array {sent} for {found}: it was built for NumPy 1, "
                         "expected that of Triton 25.01 or newer")
