"""The synthetic task with look-ups of order 0, as in the paper.

The student has its own item encoder and its own attention for each level, and learns from the teacher by
output reconstruction, distillation and alignment. Codewords are learned by gradient. All other settings are
those of `configs/synthetic.py`.

    python train.py --config=configs/synthetic_order_0.py --workdir=runs/order_0

Expected: a test AUC of about 0.762, nine tenths of the gap; a minute on 2 CPU cores.
"""

import ml_collections

from configs import synthetic


def get_config(mode: str = "") -> ml_collections.ConfigDict:
    """The experiment; mode `smoke` shrinks it."""
    config = synthetic.get_config(mode)
    config.baselines = ()
    config.model.order = 0
    config.codebook.learning = "gradient"
    return config
