"""Provenance: what a run records about the origin of its numbers."""

import copy
import dataclasses
import subprocess

import jax
import pytest

from tarq_jax.experiments import run_table
from tarq_jax.training import provenance


@pytest.fixture(autouse=True)
def asked_anew():
    provenance.revision.cache_clear()
    yield
    provenance.revision.cache_clear()


@pytest.fixture
def package(tmp_path):
    """A package in a git repository with one commit: (folder, commit)."""
    def git(*arguments):
        return subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=tmp_path,
                              check=True, capture_output=True, text=True).stdout.strip()

    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    return folder, git("rev-parse", "HEAD")


def test_revision(package):
    folder, commit = package
    assert provenance.revision(folder) == commit
    provenance.revision.cache_clear()
    (folder.parent / "notes").write_text("outside of the package")
    assert provenance.revision(folder) == commit
    provenance.revision.cache_clear()
    (folder / "__init__.py").write_text("changed = True")
    assert provenance.revision(folder) == f"{commit}-changed"


def test_a_copy_has_no_revision(package, tmp_path):
    """Neither a copy outside any repository, nor one in another repository that does not track it."""
    folder, _ = package
    installed = folder / "environment" / "tarq_jax"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert provenance.revision(installed) is None
    assert provenance.revision(tmp_path / "nowhere") is None


def test_what_is_said(tiny_config, tiny_dataset):
    found = provenance.provenance(tiny_config, tiny_dataset)
    assert found["config"]["steps"] == tiny_config.steps
    assert found["data"] == tiny_dataset.fingerprint
    assert found["packages"]["jax"] == jax.__version__
    assert found["device"].startswith(f"{jax.device_count()} x ")
    assert "device_count" in found["compiled"]["XLA_FLAGS"] and not found["compiled"]["jax_enable_x64"]
    with jax.default_matmul_precision("highest"):
        again = provenance.provenance(tiny_config, tiny_dataset)
    assert [each["compiled"]["jax_default_matmul_precision"] for each in (found, again)] == [None, "highest"]


def test_other_data_are_refused(tiny_config, tiny_dataset, tmp_path):
    named = [dataclasses.replace(tiny_dataset, fingerprint=name) for name in ("first", "second")]
    provenance.check_data(tmp_path, named[0])
    provenance.record(tmp_path, tiny_config, named[0])
    for same in (named[0], dataclasses.replace(tiny_dataset, fingerprint="")):
        provenance.check_data(tmp_path, same)
    with pytest.raises(ValueError, match=r"was trained on the data first, .* give second; expected"):
        provenance.check_data(tmp_path, named[1])


def test_changed_code_of_ones_own_is_refused(tiny_config, tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "changing_model.py").write_text("def model(): ...")
    config = copy.deepcopy(tiny_config)
    config.model.name = "changing_model:model"
    provenance.record(tmp_path, config, tiny_dataset)
    provenance.check_code(tmp_path, config)
    provenance.check_code(tmp_path, tiny_config)
    settings = run_table.settings_hash(config)
    (tmp_path / "changing_model.py").write_text("def model(): return 1")
    with pytest.raises(ValueError, match=r"with the file of changing_model:model as .*, which is"):
        provenance.check_code(tmp_path, config)
    assert run_table.settings_hash(config) != settings


def test_a_change_is_added(tiny_config, tiny_dataset, tmp_path):
    provenance.record(tmp_path, tiny_config, tiny_dataset)
    provenance.record(tmp_path, tiny_config, tiny_dataset)
    assert len(provenance.read(tmp_path)) == 1
    tiny_config.steps += 1
    provenance.record(tmp_path, tiny_config, tiny_dataset)
    first, second = provenance.read(tmp_path)
    assert second["config"]["steps"] == first["config"]["steps"] + 1


@pytest.mark.parametrize("text", ["", "[{", "\x00"])
def test_what_is_damaged_is_begun_anew(text, tiny_config, tiny_dataset, tmp_path):
    (tmp_path / provenance.FILE).write_text(text)
    assert provenance.read(tmp_path) == []
    provenance.record(tmp_path, tiny_config, tiny_dataset)
    assert len(provenance.read(tmp_path)) == 1
