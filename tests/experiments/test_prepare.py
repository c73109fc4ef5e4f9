"""The command that prepares data: it prints the data's folder, and passes arguments to the runner."""

import importlib.util

import logs
import pytest

from tarq_jax.data import load_prepared

PREPARE = ("-m", "tarq_jax.experiments.prepare")


def test_it_prints_the_directory(command, tmp_path):
    arguments = (*PREPARE, "--config=configs/synthetic.py:smoke", f"--config.data.data_dir={tmp_path}")
    first, again = command(*arguments), command(*arguments)
    assert first.returncode == 0, first.stderr
    assert first.stdout == again.stdout and "tarq_synthetic" in first.stdout
    assert len(load_prepared(first.stdout.strip()).splits["train"]) == 64


@pytest.mark.skipif(not importlib.util.find_spec("apache_beam"), reason="Apache Beam is not installed")
def test_it_hands_arguments_to_the_runner(command, tmp_path):
    source = logs.write_userbehavior(tmp_path)["source"]
    arguments = (*PREPARE, "--config=configs/taobao_userbehavior.py:smoke", f"--config.data.source={source}",
                 f"--config.data.data_dir={tmp_path}")
    unknown = command(*arguments, "--beam=--runner=NoRunner")
    assert unknown.returncode == 1 and "NoRunner" in unknown.stderr
    done = command(*arguments, "--beam=--runner=FnApiRunner", "--beam=--direct_num_workers=2")
    assert done.returncode == 0, done.stderr
    assert len(load_prepared(done.stdout.strip()).splits["train"])


def test_a_missing_file_is_told(command, tmp_path):
    done = command(*PREPARE, "--config=configs/taobao_ads.py", f"--config.data.source={tmp_path}")
    assert done.returncode == 1
    line, = done.stderr.splitlines()
    assert line.startswith("error: no file") and "raw_sample.csv" in line


def test_wrong_calls_end_before_jax_is_imported(wrong_call):
    assert "positive" in wrong_call(*PREPARE, "--config=configs/taobao_ads.py", "--config.data.buckets=(8,4)")
