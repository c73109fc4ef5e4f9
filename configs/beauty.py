"""TARQ on Amazon Beauty (5-core): which product came next, ranked against 15 drawn by popularity?

    python train.py --config=configs/beauty.py --workdir=runs/beauty \
        --config.data.source=DIR/Beauty.txt --config.data.attributes=DIR/Beauty_item2attributes.json

Expected: a test AUC of 0.811 for the two-tower, 0.831 for target attention and 0.830 for TARQ, 98% of
the gap, with every codeword in use; about 5 minutes on 2 CPU cores.
"""

import ml_collections

from tarq_jax.config import default_config, is_smoke, smoke


def get_config(mode: str = "") -> ml_collections.ConfigDict:
    """The experiment; mode `smoke` shrinks it."""
    config = default_config()
    config.baselines = ("two_tower", "target_attention")
    config.steps = 6000
    config.model.width = 64
    config.model.num_codewords = 256
    config.codebook.start = 150
    config.optimizer.learning_rate = 4e-3
    config.optimizer.weight_decay = 0.3
    config.data.name = "sequences"
    config.data.source = "data/Beauty.txt"
    config.data.attributes = "data/Beauty_item2attributes.json"
    config.data.history_length = 20
    return smoke(config, num_negatives=3, history_length=8) if is_smoke(mode) else config
