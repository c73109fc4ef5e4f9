"""Serving: exports a trained model as an index of items and programs, which a scorer runs.

    python -m tarq_jax.serving.export --run=runs/synthetic --out=artefacts/1

    scorer = Scorer.load("artefacts/1").warm_up()
    scorer.score({"history": {"item_id": [17, 4, 256]}}, top_k=500)
"""

import importlib
from typing import Any

_HOME = {
    "Index": "index",
    "Ranking": "scorer",
    "Scorer": "scorer",
    "Users": "scorer",
    "add": "index",
    "change": "index",
    "grow": "index",
    "make_index": "index",
    "remove": "index",
    "save_index": "artefact",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Imports a public name on first use, so that commands can report a wrong call before importing JAX."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
