"""An artefact's files: written completely or not at all, and refused if they were changed later."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import served

from tarq_jax.serving import Scorer, make_index, model, remove, save_index
from tarq_jax.serving import artefact as files


@pytest.fixture
def copied(artefact, tmp_path):
    """A copy of an artefact, which a test may damage."""
    return shutil.copytree(artefact(), tmp_path / "copy")


def edit(path, **changes):
    """Changes fields of a manifest, and its checksum to match."""
    manifest = json.loads(path.read_text()) | changes
    del manifest["checksum"]
    path.write_text(json.dumps(manifest | {"checksum": files._checksum(manifest)}))


@pytest.mark.parametrize("dtype", [np.float32, np.int8, ml_dtypes.bfloat16])
def test_an_index_comes_back(tmp_path, dtype):
    values = np.arange(-3, 9).reshape(4, 3).astype(dtype)
    codes = np.array([[3], [1], [2], [0]], np.uint8)
    index = make_index([5, 2, 9, 0], {"vector": values, "codes": codes}, "f")
    files.write_index(index, tmp_path)
    found = files.read_index(tmp_path)
    assert found.fingerprint == "f" and found.arrays.keys() == {"vector", "codes"}
    for name in ("ids", "served"):
        np.testing.assert_array_equal(getattr(found, name), getattr(index, name))
    for name, array in index.arrays.items():
        assert found.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(found.arrays[name], array)


def test_a_changed_index_is_saved_beside_its_artefact(artefact, tmp_path):
    changed = remove(files.read_index(artefact() / "index"), [3])
    save_index(changed, tmp_path / "index")
    scorer = Scorer.load(artefact(), index=tmp_path / "index")
    assert scorer.index.num_served == 21 and not (scorer.index.ids[scorer.index.served] == 3).any()
    with pytest.raises(ValueError, match="exists, expected a path that does not"):
        save_index(changed, tmp_path / "index")


FILES = ("index/ids.npy", "index/codes.npy", "index/manifest.json", "model/user_2.jaxexport",
         "model/items.npz", "model/manifest.json")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(copied, name):
    (copied / name).unlink()
    with pytest.raises(ValueError, match=rf"{copied / name} is missing, expected"):
        Scorer.load(copied)


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_short(copied, name):
    path = copied / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=rf"{path} (has \d+ bytes|cannot be read).*expected"):
        Scorer.load(copied)


@pytest.mark.parametrize("name", FILES)
def test_a_changed_byte(copied, name):
    path = copied / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path} .*expected"):
        Scorer.load(copied)


@pytest.mark.parametrize(("module", "reader", "name"), [
    (files, "_read_array", "index/vector.npy"), (model, "read_weights", "model/user.npz"),
], ids=["index", "model"])
def test_a_file_that_changes_while_it_is_read(copied, monkeypatch, module, reader, name):
    """After its checksum was compared, as by a copy in place."""
    real = getattr(module, reader)

    def late(*arguments):
        (copied / name).write_bytes((copied / name).read_bytes())
        return real(*arguments)

    monkeypatch.setattr(module, reader, late)
    with pytest.raises(ValueError, match=f"{name} changed while it was read"):
        Scorer.load(copied)


@pytest.mark.parametrize(("changes", "words"), [
    ({"version": 1}, "is of format 'tarq_jax/model', version 1, expected 'tarq_jax/model', version 3"),
    ({"format": "other"}, "is of format 'other', version 3, expected"),
])
def test_other_formats(copied, changes, words):
    edit(copied / "model" / "manifest.json", **changes)
    with pytest.raises(ValueError, match=words):
        Scorer.load(copied)


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "{}", "\0"])
def test_a_manifest_that_is_none(copied, content):
    (copied / "model" / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json cannot be read .*expected the JSON of an export"):
        Scorer.load(copied)


def test_a_manifest_that_is_a_folder(copied):
    (copied / "model" / "manifest.json").unlink()
    (copied / "model" / "manifest.json").mkdir()
    with pytest.raises(ValueError, match=r"manifest\.json cannot be read .*Is a directory"):
        Scorer.load(copied)


def test_an_encoder_is_that_of_its_model(artefact, copied, tmp_path):
    """Its weights are read only when items are encoded: links and files may be others then."""
    items = {name: values[:2] for name, values in served.world().dataset.items.items()}
    link = tmp_path / "current"
    link.symlink_to(artefact())
    scorer = Scorer.load(link)
    link.unlink()
    link.symlink_to(artefact("tarq_mlp"))
    expected = Scorer.load(artefact()).encode(items)
    for name, values in scorer.encode(items).items():
        np.testing.assert_array_equal(values, expected[name])

    first = Scorer.load(copied)
    again = Scorer.load(artefact(), like=first)
    shutil.rmtree(copied / "index")
    (copied / "model" / "encode.npz").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"encode\.npz has SHA-256 .*: it was changed"):
        first.encode(items)
    np.testing.assert_array_equal(again.encode(items)["codes"], expected["codes"])


def test_an_index_is_not_a_model(copied):
    with pytest.raises(ValueError, match="is of format 'tarq_jax/index', version 3, expected"):
        files.read_manifest(copied / "index", "model")


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(ValueError, match="is missing, expected the manifest of an exported model"):
        Scorer.load(tmp_path / "nowhere")


def test_another_program(copied):
    """A program contains its own name, so a swap is found even if checksums match."""
    shutil.copy(copied / "model" / "score_each.jaxexport", copied / "model" / "score_all.jaxexport")
    with pytest.raises(ValueError, match="holds the program 'score_each', expected 'score_all'"):
        files.read_program(copied / "model", "score_all")


def test_programs_name_no_files(artefact):
    """Otherwise the programs of one model would differ from machine to machine."""
    for path in (artefact() / "model").glob("*.jaxexport"):
        assert b".py" not in path.read_bytes()


def test_another_platform(copied):
    manifest = json.loads((copied / "model" / "manifest.json").read_text())
    edit(copied / "model" / "manifest.json", facts=manifest["facts"] | {"platforms": ["tpu"]})
    with pytest.raises(ValueError, match=r"was exported for \['tpu'\], expected 'cpu' among them"):
        Scorer.load(copied)


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "deep" / "out"
    with pytest.raises(RuntimeError), files.new_folder(out) as folder:
        (folder / "half").write_text("a")
        raise RuntimeError
    assert list(tmp_path.rglob("*")) == [tmp_path / "deep"]
    with files.new_folder(out) as folder:
        (folder / "whole").write_text("a")
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["whole"] and list(out.parent.iterdir()) == [out]
    with pytest.raises(ValueError, match=r"out exists, expected a path that does not"), files.new_folder(out):
        pass
