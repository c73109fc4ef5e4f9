"""TARQ on Taobao display ads: will the user click the ad, given earlier views and purchases?

Six days of ads train, the seventh validates, the eighth tests. Histories have up to 50 behaviors, each with a
category and a brand. Apache Beam prepares the data on this machine (`tarq_jax.experiments.prepare` can use
other runners), and training reads them from disk.

    python train.py --config=configs/taobao_ads.py --workdir=runs/taobao_ads --config.data.source=DIR

DIR is the folder with raw_sample.csv, ad_feature.csv, user_profile.csv and behavior_log.csv.

Expected: not known yet; the configuration was run only on small files of the same form.
"""

import ml_collections

from tarq_jax.config import default_config, is_smoke, smoke


def get_config(mode: str = "") -> ml_collections.ConfigDict:
    """The experiment; mode `smoke` shrinks it."""
    config = default_config()
    config.baselines = ("two_tower", "target_attention")
    config.steps = 50_000
    config.batch_size = 1024  # requests of one to three ads
    config.model.width = 64
    config.model.num_codewords = 256
    config.codebook.start = 2500
    config.data.name = "taobao_ads"
    config.data.source = "data/taobao_ads"
    config.data.history_length = 50
    config.data.min_history = 0
    config.data.stream = True
    config.data.buckets = (16,)
    config.data.readers = 2
    if is_smoke(mode):
        config.data.buckets = (4,)
        return smoke(config, history_length=8)
    return config
