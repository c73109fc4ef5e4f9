"""TARQ on MovieLens-100K: will the user rate this film 4 or better?

Each user's ratings are in order of time: the first 70% train, the next 10% validate, the last 20% test.
The history holds the films that the user rated strictly earlier, each with whether the user liked it.

    python train.py --config=configs/movielens_100k.py --workdir=runs/movielens_100k \
        --config.data.source=DIR

DIR is the folder of the data set as GroupLens ships it, or in `.inter/.item/.user` files.

Expected: a test AUC of 0.78 for every model; 100,000 ratings are too few to separate them. About a minute on
2 CPU cores.
"""

import ml_collections

from tarq_jax.config import default_config, is_smoke, smoke


def get_config(mode: str = "") -> ml_collections.ConfigDict:
    """The experiment; mode `smoke` shrinks it."""
    config = default_config()
    config.baselines = ("two_tower", "target_attention")
    config.steps = 900
    config.codebook.start = 150
    config.optimizer.weight_decay = 0.3
    config.data.name = "movielens"
    config.data.source = "data/ml-100k"
    config.data.history_length = 50
    return smoke(config, num_candidates=4, history_length=8) if is_smoke(mode) else config
