"""The command that converts a run: its rows, wrong calls, and conversions that are impossible."""

import dataclasses
import json

import pytest

from tarq_jax.experiments import convert

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
    _, run = convert.load_model(trained)
    convert.check_comparable(smoke_run("two_tower"), run)
    run.config.seed = 5
    with pytest.raises(ValueError, match=r"--two_tower: .* saved with config.seed=0, this run has 5;"):
        convert.check_comparable(smoke_run("two_tower"), run)
    run.config.seed = 0
    other = run._replace(dataset=dataclasses.replace(run.dataset, fingerprint="other"))
    with pytest.raises(ValueError, match=r"was trained on the data .* now give other"):
        convert.check_comparable(smoke_run("two_tower"), other)


@pytest.mark.parametrize(("text", "words"), [
    ("[{", "cannot be read as a table of results"), ('[{"auc": 1}]', "expected the AUC of 'two_tower'")])
def test_a_table_of_two_towers_that_is_none(tmp_path, text, words):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        convert._auc_of(tmp_path)
