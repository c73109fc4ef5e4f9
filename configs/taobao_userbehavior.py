"""TARQ on Taobao UserBehavior: which item does a user open next, ranked against 15 drawn by popularity?

Seven days train, the eighth validates, the ninth tests. Histories have up to 200 events, padded to 16, 50 or
200. Apache Beam prepares the data on this machine (`tarq_jax.experiments.prepare` can use other runners), and
training reads them from disk.

    python train.py --config=configs/taobao_userbehavior.py --workdir=runs/taobao_userbehavior \
        --config.data.source=DIR/UserBehavior.csv

Expected: not known yet; the configuration was run only on small files of the same form.
"""

import ml_collections

from tarq_jax.config import default_config, is_smoke, smoke


def get_config(mode: str = "") -> ml_collections.ConfigDict:
    """The experiment; mode `smoke` shrinks it."""
    config = default_config()
    config.baselines = ("two_tower", "target_attention")
    config.steps = 100_000
    config.batch_size = 256
    config.model.width = 64
    config.model.num_codewords = 256
    config.codebook.start = 5000
    config.data.name = "taobao_userbehavior"
    config.data.source = "data/UserBehavior.csv"
    config.data.history_length = 200
    config.data.num_negatives = 15
    config.data.stream = True
    config.data.buckets = (16, 50)
    config.data.readers = 2
    if is_smoke(mode):
        config.data.buckets = (4,)
        return smoke(config, num_negatives=3, history_length=8)
    return config
