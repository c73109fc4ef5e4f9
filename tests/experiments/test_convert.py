"""The command that converts a run: its rows, wrong calls, and conversions that are impossible."""

import json
import shutil

import pytest

from configs import synthetic
from tarq_jax.experiments import convert
from tarq_jax.models import TargetAttention
from tarq_jax.training import loop, provenance, restore

CONVERT = ("-m", "tarq_jax.experiments.convert")


@pytest.mark.slow
def test_rows(command, smoke_run, tmp_path):
    done = command(
        *CONVERT, f"--checkpoint={smoke_run('target_attention')}", f"--two_tower={smoke_run('two_tower')}",
        "--codewords=4", "--order=0,1", "--levels=0,2", "--calibration=16", "--fine_tune=2",
        f"--json={tmp_path}/rows.json", f"--plot={tmp_path}/errors.png")
    assert done.returncode == 0, done.stderr
    exact, *rows = json.loads((tmp_path / "rows.json").read_text())
    assert exact["model"] == "target attention" and exact["gap_recovered"] in (None, 1.0)
    assert [(row["codewords"], row["order"], row["levels"], row.get("fine_tuned", 0)) for row in rows] == [
        (4, order, levels, steps) for order, levels in ((0, 0), (1, 0), (1, 2)) for steps in (0, 2)]
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")
    for row in rows:
        assert row["auc_difference"] == pytest.approx(row["auc"] - exact["auc"])
    plain = {row["order"]: row["attention_error"] for row in rows if "fine_tuned" not in row}
    assert plain[1] < plain[0]


@pytest.mark.parametrize(("flags", "words"), [
    (("--codewords=1",), "--codewords is '1', expected whole numbers of at least 2"),
    (("--codewords=many",), "--codewords is 'many'"),
    (("--order=2",), "--order is '2', expected 0, 1 or 0,1"),
    (("--levels=-1",), "--levels is '-1'"),
    (("--seed=-1",), "seed"),
    (("--calibration=0",), "calibration"),
    (("--fine_tune=-1",), "fine_tune"),
    (("--correction=best",), "correction"),
])
def test_wrong_calls(wrong_call, flags, words):
    assert words in wrong_call(*CONVERT, "--checkpoint=runs/none", *flags)


@pytest.mark.slow
def test_what_cannot_be_done(command, smoke_run):
    trained = smoke_run("target_attention")
    done = command(*CONVERT, f"--checkpoint={trained}", "--codewords=9999", "--order=0")
    assert done.returncode == 1 and "9999 codewords are asked for, expected at most" in done.stderr
    done = command(*CONVERT, f"--checkpoint={trained}", f"--two_tower={trained}/none")
    assert done.returncode == 1 and "does not exist, expected a finished two-tower run" in done.stderr
    done = command(*CONVERT, f"--checkpoint={trained}", f"--checkpoint={trained}/../{trained.name}")
    assert done.returncode == 2 and "expected different runs" in done.stderr
    with pytest.raises(ValueError, match="a run of 'two_tower', expected one of target attention"):
        convert.load_model(smoke_run("two_tower"))


class AddsToItsLogits(TargetAttention):
    def __call__(self, batch):
        output = super().__call__(batch)
        return output.replace(logits=output.logits + batch.candidates["item_id"])


@pytest.mark.slow
def test_a_model_that_is_not_its_parts_is_refused(smoke_run, monkeypatch):
    run = restore.load_run(smoke_run("target_attention"))
    module = run.objective.module
    forked = AddsToItsLogits(**{name: getattr(module, name) for name in (
        "schema", "width", "num_heads", "hidden", "tables")})
    monkeypatch.setattr(restore, "load_run", lambda _: run)
    convert.load_model("its own run")
    run = run._replace(objective=run.objective._replace(module=forked))
    with pytest.raises(ValueError, match="AddsToItsLogits: the logits of its parts differ by up to"):
        convert.load_model("the run of the fork")


@pytest.mark.slow
def test_only_runs_that_can_be_compared_are(smoke_run, tmp_path, silent):
    """Others are refused before any run is converted."""
    def train(seed, **changes):
        config = synthetic.get_config("smoke")
        config.model.name, config.seed = "target_attention", seed
        config.data.data_dir = str(smoke_run("target_attention").parent / "data")
        config.update_from_flattened_dict(changes)
        folder = tmp_path / f"{seed}-{len(changes)}"
        loop.train(config, loop.load_data(config), folder, silent)
        return folder

    trained, two_tower, other = smoke_run("target_attention"), smoke_run("two_tower"), train(1)
    convert.check_runs([trained, other], [])
    convert.check_runs([trained], [two_tower])
    with pytest.raises(ValueError, match="is another run of seed 0, expected runs of different seeds"):
        convert.check_runs([trained, shutil.copytree(trained, tmp_path / "copy")], [])
    with pytest.raises(ValueError, match=r"--checkpoint: .*2-1 was saved with config.optimizer.weight_d"):
        convert.check_runs([trained, train(2, **{"optimizer.weight_decay": 0.5})], [])
    with pytest.raises(ValueError, match=r"--two_tower: .* was saved with config.seed=0, this run has 1"):
        convert.check_runs([other], [two_tower])
    entry, = provenance.read(other)
    (other / provenance.FILE).write_text(json.dumps([entry | {"data": "others"}]))
    with pytest.raises(ValueError, match="was trained on the data others, "):
        convert.check_runs([trained, other], [])
    with pytest.raises(FileNotFoundError, match="no checkpoints in it"):
        convert.check_runs([tmp_path / "nowhere"], [])


@pytest.mark.parametrize(("text", "words"), [
    ("[{", "cannot be read as a table of results"), ('[{"auc": 1}]', "expected the AUC of 'two_tower'")])
def test_a_table_of_two_towers_that_is_none(tmp_path, text, words):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        convert._auc_of(tmp_path)
