"""TARQ on the built-in synthetic task, whose labels come from a softmax attention over the history.

Shows that a student with L=3 levels of K=64 codewords and look-ups of order 1 recovers most of the gap
between a two-tower model and full target attention. `synthetic_order_0.py` uses look-ups of order 0,
`synthetic_paper.py` the paper's settings; `synthetic_collapse.py` shows collapsed codebooks.

    python train.py --config=configs/synthetic.py --workdir=runs/synthetic

Expected: test AUC of about 0.704 for the two-tower, 0.768 for target attention and 0.765 for TARQ,
95% of the gap, with every codeword in use; about 2 minutes on 2 CPU cores.
`configs/synthetic.py:smoke` ends in seconds.
"""

import ml_collections

from tarq_jax.config import default_config, is_smoke, smoke


def get_config(mode: str = "") -> ml_collections.ConfigDict:
    """The experiment; mode `smoke` shrinks it."""
    config = default_config()
    config.baselines = ("two_tower", "target_attention")
    config.optimizer.weight_decay = 0.3
    config.data.name = "synthetic"
    config.data.num_items = 4000
    config.data.history_length = 50
    config.data.sharpness = 8.0
    config.data.seed = 0
    if is_smoke(mode):
        return smoke(config, num_items=120, num_clusters=12, history_length=8, num_candidates=4,
                     train_requests=64, validation_requests=32, test_requests=32)
    return config
