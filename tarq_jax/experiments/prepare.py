"""Prepares the data of an experiment, on this machine or by any Apache Beam runner.

    pip install 'tarq_jax[beam]'
    python -m tarq_jax.experiments.prepare --config=configs/taobao_userbehavior.py \
        --config.data.source=DIR/UserBehavior.csv

Each `--beam` is an argument of the runner. On all cores of this machine:

    ... --beam=--direct_num_workers=0 --beam=--direct_running_mode=multi_processing

On other runners `data_dir` has to be a folder that this machine and all workers see under the same name, such
as a mounted bucket, since records are written as files. The source may be anywhere that Beam can read.
Dataflow, with this package built by `python -m build --sdist`:

    ... --beam=--runner=DataflowRunner --beam=--project=PROJECT --beam=--region=REGION \
        --beam=--temp_location=gs://BUCKET/tmp --beam=--extra_package=dist/tarq_jax-0.1.0.tar.gz

Flink and Spark, with the package installed on the workers:

    ... --beam=--runner=FlinkRunner --beam=--flink_master=HOST:8081 --beam=--environment_type=LOOPBACK
    ... --beam=--runner=SparkRunner --beam=--spark_master_url=spark://HOST:7077 \
        --beam=--environment_type=LOOPBACK

The command prints the prepared directory. `--config.data.prepared=DIRECTORY` trains from it on a machine
without the source files. A data set that is already prepared is left unchanged.
"""

from absl import flags

from tarq_jax import cli

CONFIG = cli.config_flag()
BEAM = flags.DEFINE_multi_string("beam", [], "Argument of the Beam runner, such as --runner=FlinkRunner.")


def main() -> None:
    """Reads the flags, prepares the data and prints their directory."""
    config = cli.settings(CONFIG.value)
    # After the flags: importing JAX takes seconds.
    from tarq_jax import data
    from tarq_jax.config import data_options

    options = data_options(config)
    del options["prepared"], options["stream"]  # options of reading
    print(data.prepare(config.data.name, data_dir=config.data.data_dir, beam_arguments=BEAM.value, **options))


if __name__ == "__main__":
    cli.run(main)
