"""Serving: a trained model exported as an index of items and programs, and a scorer that runs them.

    python -m tarq_jax.serving.export --run=runs/synthetic --out=artefacts/1

    scorer = Scorer.load("artefacts/1").warm_up()
    scorer.score({"history": {"item_id": [17, 4, 256]}}, top_k=500)
"""

from tarq_jax.serving.index import Index, add, change, grow, make_index, remove
from tarq_jax.serving.scorer import Ranking, Scorer, Users

__all__ = ["Index", "Ranking", "Scorer", "Users", "add", "change", "grow", "make_index", "remove"]
