"""Data sets that Beam prepares, if Beam is not installed; and the parts that work without Beam."""

import sys

import logs
import pytest

from tarq_jax.data import prepare
from tarq_jax.data.impressions import read_header


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


@pytest.mark.parametrize("header", ["who,what,when", "who,when,what,more", "u1,5,i1"])
def test_every_file_has_the_columns_of_the_first(tmp_path, header):
    for name, text in (("a", "who,when, what\n"), ("b", "who,when,what\nu1,5,i1\n"), ("c", "")):
        (tmp_path / f"{name}.csv").write_text(text)
    pattern = str(tmp_path / "*.csv")
    assert read_header(pattern, "source", ",", ["what"]) == {"who": 0, "when": 1, "what": 2}
    (tmp_path / "d.csv").write_text(f"{header}\n")
    with pytest.raises(ValueError, match=r"d\.csv: the columns .* expected those of a\.csv, \['who', 'when'"):
        read_header(pattern, "source", ",", ["what"])
