"""Target attention at a cost that suits pre-ranking, by residual quantization (TARQ, arXiv 2509.16931).

The names below are the library's core. Each is imported when it is first used, so that importing
the package itself is cheap. Models, data and training are in the subpackages.
"""

import importlib
from typing import Any

_HOME = {
    "Batch": "types",
    "Codebook": "types",
    "Field": "schema",
    "FirstOrderTarq": "models",
    "QuantizerOutput": "types",
    "Schema": "schema",
    "Scorer": "serving",
    "Tarq": "models",
    "TargetAttention": "models",
    "TwoTower": "models",
    "beam_encode": "quantization",
    "codebook_alignment": "losses",
    "decode": "quantization",
    "ema_codewords": "quantization",
    "encode": "quantization",
    "expand": "expansion",
    "fit_codebook": "quantization",
    "kmeans_codebook": "quantization",
    "look_up": "attention",
    "look_up_expansion": "expansion",
    "multi_head_attention": "attention",
    "personalized_codebook": "attention",
    "revive": "quantization",
    "rotate": "quantization",
    "straight_through": "quantization",
    "update_statistics": "quantization",
}

__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Imports a public name from its module."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    """The public names, for completion."""
    return [*__all__, "__version__"]
