"""The command that converts a run: its rows, and calls that are wrong or cannot be done."""

import json

import pytest

CONVERT = ("-m", "tarq_jax.experiments.convert")


@pytest.fixture(scope="module")
def runs(command, tmp_path_factory):
    """Runs of target attention and of two towers, at smoke size."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("target_attention", "two_tower"):
        done = command("train.py", "--config=configs/synthetic.py:smoke", f"--config.model.name={name}",
                       f"--config.data.data_dir={folder}/data", f"--workdir={folder}/{name}")
        assert done.returncode == 0, done.stderr
    return folder


def test_rows(command, runs):
    done = command(
        *CONVERT, f"--checkpoint={runs}/target_attention", f"--two_tower={runs}/two_tower", "--codewords=4,8",
        "--order=0,1", "--levels=0", "--calibration=16", "--fine_tune=2", f"--json={runs}/rows.json",
        f"--plot={runs}/errors.png")
    assert done.returncode == 0, done.stderr
    exact, *rows = json.loads((runs / "rows.json").read_text())
    assert exact["model"] == "target attention" and exact["gap_recovered"] in (None, 1.0)
    assert [(row["codewords"], row["order"], row.get("fine_tuned", 0)) for row in rows] == [
        (k, order, steps) for k in (4, 8) for order in (0, 1) for steps in (0, 2)]
    assert (runs / "errors.png").read_bytes().startswith(b"\x89PNG")
    for row in rows:
        assert row["auc_difference"] == pytest.approx(row["auc"] - exact["auc"])
    plain = {(row["codewords"], row["order"]): row["attention_error"]
             for row in rows if "fine_tuned" not in row}
    assert plain[4, 1] < plain[4, 0]
    assert plain[8, 1] < plain[8, 0]


@pytest.mark.parametrize(("flags", "words"), [
    (("--codewords=1",), "--codewords is '1', expected whole numbers of at least 2"),
    (("--codewords=many",), "--codewords is 'many'"),
    (("--order=2",), "--order is '2', expected 0, 1 or 0,1"),
    (("--levels=-1",), "--levels is '-1'"),
    (("--correction=best",), "correction"),
])
def test_wrong_calls(command, flags, words):
    done = command(*CONVERT, "--checkpoint=runs/none", *flags)
    assert done.returncode == 2 and words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_what_cannot_be_done(command, runs):
    done = command(*CONVERT, f"--checkpoint={runs}/two_tower")
    assert done.returncode == 1 and "a run of 'two_tower', expected 'target_attention'" in done.stderr
    done = command(*CONVERT, f"--checkpoint={runs}/target_attention", "--codewords=9999", "--order=0")
    assert done.returncode == 1 and "expected at least num_codewords=9999" in done.stderr
    done = command(*CONVERT, f"--checkpoint={runs}/target_attention", f"--two_tower={runs}/none",
                   "--codewords=4", "--order=0")
    assert done.returncode == 1 and "does not exist, expected a finished two-tower run" in done.stderr
