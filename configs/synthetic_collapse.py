"""The synthetic task with random codebooks, no alignment and no revival, to show collapse.

All other settings are those of `configs/synthetic_order_0.py`. Most codewords of the first level end up
unused, and the student's attention output is further from the teacher's.

    python train.py --config=configs/synthetic_collapse.py --workdir=runs/collapse

Expected: `utilisation` far below 1 in the final table; about a minute on 2 CPU cores.
"""

import ml_collections

from configs import synthetic_order_0


def get_config(mode: str = "") -> ml_collections.ConfigDict:
    """The experiment; mode `smoke` shrinks it."""
    config = synthetic_order_0.get_config(mode)
    config.codebook.init = "random"
    config.codebook.start = 0
    config.codebook.revive_every = 0
    config.loss_weights.alignment = 0.0
    return config
