"""The synthetic task with the paper's weight of codebook alignment, 1.0 on all requests.

The rest is `configs/synthetic.py`, which weighs alignment by 0.03: summed over levels its value is
some twenty times that of the other losses, and at full weight it moves the codebooks away from
what the student needs.

    python train.py --config=configs/synthetic_paper.py --workdir=runs/paper

Expected: a fifth to a third of the gap recovered, against more than nine tenths; two minutes on 2
CPU cores.
"""

import ml_collections

from configs import synthetic


def get_config(mode: str = "") -> ml_collections.ConfigDict:
    """The experiment; mode `smoke` shrinks it."""
    config = synthetic.get_config(mode)
    config.baselines = ()
    config.model.aligned_share = 1.0
    config.loss_weights.alignment = 1.0
    return config
