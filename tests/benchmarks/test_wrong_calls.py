"""Wrong calls of benchmarks end at once, with a line that names the flag, its value and what was expected."""

import sys

import pytest
from absl.flags import FLAGS

from benchmarks import frontier, serving, training_step


@pytest.mark.parametrize("module, wrong, complaint", [
    ("compiled", "--workload=foo", "--workload is 'foo', expected some of blocks, config"),
    ("quantization", "--latents=x", "--latents is 'x', expected whole numbers of at least 256"),
    ("serving_quality", "--codewords=x", "--codewords is 'x', expected whole numbers of at least 2"),
    ("serving_quality", "--order=2", "--order is '2', expected some of 0, 1"),
])
def test_commands(command, module, wrong, complaint):
    needed = ["--attention=nowhere"] if module == "serving_quality" else []
    done = command("-m", f"benchmarks.{module}", wrong, *needed)
    line, = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("error: ") and complaint in line


@pytest.mark.parametrize("module, flags, complaint", [
    (training_step, {"configs": ["foo"]}, "--configs is 'foo', expected some of order 0, order 1"),
    (training_step, {"configs": []}, "--configs is '', expected some of order 0, order 1"),
    (training_step, {"threads": ["x"]}, "--threads is 'x', expected numbers of threads like 2,1"),
    (serving, {"candidates": ["9", "200000"]}, "--candidates has 200000, expected at most 100000, the num"),
    (frontier, {"count": 200_000}, "--count is 200000, expected at most 100000, the number of items"),
])
def test_flags(capsys, module, flags, complaint, with_flags):
    with with_flags(**flags), pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 2 and complaint in capsys.readouterr().err


def test_a_missing_peer_is_told_before_anything_is_measured(monkeypatch, with_flags):
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    with with_flags(), pytest.raises(ValueError, match=r"torch is missing, expected .*\[bench\]"):
        training_step.main()


def test_it_is_said_what_compiles_for_tpus(command):
    done = command("-m", "benchmarks.compiled", "--workload=single", "--topology=nowhere",
                   environment={"TPU_SKIP_MDS_QUERY": "1"})
    line, = done.stderr.splitlines()
    assert done.returncode == 1 and "cannot compile for 'nowhere', expected a topology of libtpu" in line


@pytest.mark.parametrize("name", ["rounds", "steps"])
def test_turns_and_steps_are_counted_from_one(name):
    with pytest.raises(ValueError, match=r"0 is not an? "):
        FLAGS[name].parser.parse("0")
