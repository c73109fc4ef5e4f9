"""The synthetic task with the paper's settings: alignment at weight 1.0 on all requests, items decoded.

The student's gradients reach the backbone. All other settings are those of `configs/synthetic_order_0.py`,
where alignment has weight 0.003 and the decoder reconstructs the teacher's query. Summed over levels,
alignment is some twenty times as large as the other losses; at full weight it moves the codebooks away from
what the student needs.

    python train.py --config=configs/synthetic_paper.py --workdir=runs/paper

Expected: a test AUC of about 0.749, seven tenths of the gap, compared with nine tenths; two minutes on 2 CPU
cores.
"""

import ml_collections

from configs import synthetic_order_0


def get_config(mode: str = "") -> ml_collections.ConfigDict:
    """The experiment; mode `smoke` shrinks it."""
    config = synthetic_order_0.get_config(mode)
    config.model.aligned_share = 1.0
    config.model.decoded = "item"
    config.model.student_gradient = "backbone"
    config.loss_weights.alignment = 1.0
    return config
