"""TARQ on the data set of its authors, converted to files with named columns: see
`tarq_jax.data.impressions`.

The format of the published data was not available, so the column names are the defaults of the options. Set
`--config.data.item_column` and the similar options to the names in the files.

    python train.py --config=configs/tarq_dataset.py --workdir=runs/tarq_dataset \
        --config.data.source='DIR/impressions*.csv' --config.data.behaviors='DIR/behaviors*.csv' \
        --config.data.validation_start=SECONDS --config.data.test_start=SECONDS

Expected: the paper reports an AUC of 0.799, 0.014 above the two-tower. This configuration was not run on the
published data, only on small files with the default column names.
"""

import ml_collections

from tarq_jax.config import default_config, is_smoke, smoke


def get_config(mode: str = "") -> ml_collections.ConfigDict:
    """The experiment; mode `smoke` shrinks it."""
    config = default_config()
    config.baselines = ("two_tower", "target_attention")
    config.steps = 50_000
    config.batch_size = 256
    config.model.width = 64
    config.model.num_codewords = 256
    config.codebook.start = 2500
    config.data.name = "impressions"
    config.data.source = "data/tarq/impressions*.csv"
    config.data.behaviors = "data/tarq/behaviors*.csv"
    config.data.history_length = 50
    config.data.validation_start = 0
    config.data.test_start = 0
    config.data.item_features = ""
    config.data.stream = True
    config.data.readers = 2
    return smoke(config, history_length=8) if is_smoke(mode) else config
