"""Prepares the data of an experiment, on this machine or by any Apache Beam runner.

    pip install 'tarq_jax[beam]'
    python -m tarq_jax.experiments.prepare --config=configs/taobao_userbehavior.py \
        --config.data.source=DIR/UserBehavior.csv

Each `--beam` is an argument of the runner. On all cores of this machine:

    ... --beam=--direct_num_workers=0 --beam=--direct_running_mode=multi_processing

On Google Cloud Dataflow, with source and prepared data in buckets, and this package on the workers:

    ... --config.data.data_dir=gs://BUCKET/data --beam=--runner=DataflowRunner --beam=--project=PROJECT \
        --beam=--region=REGION --beam=--temp_location=gs://BUCKET/tmp --beam=--setup_file=./setup.py

On Flink or Spark, with a file system that all workers see:

    ... --beam=--runner=FlinkRunner --beam=--flink_master=HOST:8081 --beam=--environment_type=LOOPBACK
    ... --beam=--runner=SparkRunner --beam=--spark_master_url=spark://HOST:7077

It prints the prepared directory; `--config.data.prepared=DIRECTORY` trains from it where the source files are
not at hand. A data set that is prepared already is left as it is.
"""

from absl import flags

from tarq_jax import cli, data
from tarq_jax.config import data_options

CONFIG = cli.config_flag()
BEAM = flags.DEFINE_multi_string("beam", [], "Argument of the Beam runner, such as --runner=FlinkRunner.")


def main() -> None:
    """Flags to directory."""
    config = cli.settings(CONFIG.value)
    options = data_options(config)
    del options["prepared"], options["stream"]  # of reading
    print(data.prepare(config.data.name, data_dir=config.data.data_dir, beam_arguments=BEAM.value, **options))


if __name__ == "__main__":
    cli.run(main)
