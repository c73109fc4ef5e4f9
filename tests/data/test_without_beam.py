"""Data sets that Beam prepares, where Beam is not installed."""

import sys

import logs
import pytest

from tarq_jax.data import prepare


def test_it_says_what_to_do(monkeypatch, tmp_path):
    for name in ["apache_beam", *sys.modules]:
        if name.startswith("apache_beam"):
            monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"prepared by Apache Beam, which is not installed: pip install .*"
                                         r"--config.data.prepared=DIR"):
        prepare("taobao_userbehavior", data_dir=tmp_path / "data", **logs.write_userbehavior(tmp_path))


def test_unknown_names(tmp_path):
    with pytest.raises(ValueError, match="data set is 'taobao', expected one of"):
        prepare("taobao", data_dir=tmp_path)
    with pytest.raises(ValueError, match="needs option 'source'"):
        prepare("taobao_ads", data_dir=tmp_path)
