"""How commands start and end: exit codes, and a one-line message about what is wrong."""

import types

import pytest

from tarq_jax import cli

SYNTHETIC = "--config=configs/synthetic.py:smoke"


@pytest.mark.parametrize(("arguments", "named"), [
    ([SYNTHETIC, "--config.foo=1"], ["foo"]),
    ([SYNTHETIC, "--config.optimiser.learning_rate=1"], ["optimiser", 'Did you mean "optimizer"']),
    ([SYNTHETIC, "--config.model.widht=1"], ["widht", "width"]),
    ([SYNTHETIC, "--config.steps=many"], ["config.steps", "many"]),
    ([SYNTHETIC, "--config.steps=1.5"], ["config.steps", "1.5"]),
    ([SYNTHETIC, "--config.optimizer.learning_rate=fast"], ["config.optimizer.learning_rate", "fast"]),
    ([SYNTHETIC, "--config.batch_size=0"], ["config.batch_size is 0", "at least 1"]),
    ([SYNTHETIC, "--config.model.hidden=wide"], ["config.model.hidden", "wide", "positive widths"]),
    ([SYNTHETIC, "--config.model.head=mpl"], ["config.model.head", "mpl", "scalar"]),
    ([SYNTHETIC, "extra"], ["extra"]),
    ([SYNTHETIC, "--bogus=1"], ["bogus"]),
    (["--config=configs/nowhere.py"], ["configs/nowhere.py", "No such file"]),
    (["--config=configs/synthetic.py:smok"],
     ["config file: ValueError: mode is 'smok', expected 'smoke' or none (File", "configs/"]),
    ([], ["--config"]),
], ids=lambda value: value[-1] if value and value[0].startswith("--config=") else None)
def test_wrong_calls_of_train(wrong_call, tmp_path, arguments, named):
    line = wrong_call("train.py", f"--workdir={tmp_path / 'run'}", *arguments)
    assert all(part in line for part in named), line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("option", "message"), [
    ("item_column=iid", "no file nowhere.csv: expected impressions"),
    ("time_column=12", "config.data.time_column is 12, expected text, for example by"),
    ("item_colunm=iid", "data set 'impressions' has no option 'item_colunm', expected one of ['source', "),
])
def test_options_of_the_data_need_not_be_in_the_configuration(option, message, command, tmp_path):
    done = command("train.py", "--config=configs/tarq_dataset.py", f"--workdir={tmp_path / 'run'}",
                   "--config.data.source=nowhere.csv", f"--config.data.{option}")
    assert done.returncode == cli.FAILED and message in done.stderr


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_numbers_of_flags_are_finite(wrong_call, tmp_path, value):
    """The bounds of flags also refuse NaN, for which every comparison is false."""
    line = wrong_call("-m", "tarq_jax.serving.server", f"--artefact={tmp_path}", f"--delay_ms={value}")
    assert "--delay_ms" in line and value in line


@pytest.mark.parametrize("seeds", ["4294967296", "0,9223372036854775808"])
def test_seeds_are_those_of_jax(seeds, capsys):
    flag = types.SimpleNamespace(value=seeds.split(","))
    with pytest.raises(SystemExit) as ended:
        cli.seeds(flag)
    assert ended.value.code == cli.WRONG_CALL
    assert f"--seeds is {seeds!r}, expected numbers in [0, 2**32)" in capsys.readouterr().err
    assert cli.seeds(types.SimpleNamespace(value=["4294967295", "0"])) == [4294967295, 0]


@pytest.mark.parametrize("names", ["", "a,c"])
def test_names_are_known_ones(names, capsys):
    flag = types.SimpleNamespace(name="letters", value=names.split(",") if names else [])
    with pytest.raises(SystemExit) as ended:
        cli.names(flag, {"b": 1, "a": 2})
    assert ended.value.code == cli.WRONG_CALL
    assert f"--letters is {names!r}, expected some of a, b" in capsys.readouterr().err
    assert cli.names(types.SimpleNamespace(value=["b", "a"]), "ab") == ["b", "a"]


def test_workdir_is_required(wrong_call):
    assert "--workdir" in wrong_call("train.py", SYNTHETIC)


def test_workdir_is_no_url(wrong_call):
    line = wrong_call("train.py", SYNTHETIC, "--workdir=gs://bucket/run")
    assert "--workdir=gs://bucket/run: expected a path of a file system that all hosts have mounted" in line


def test_a_config_file_with_a_mistake(wrong_call, tmp_path):
    """A wrong setting in the file is reported like one on the command line."""
    file = tmp_path / "experiment.py"
    file.write_text("from tarq_jax.config import default_config\n\n\ndef get_config(mode=''):\n"
                    "    config = default_config()\n    config.stepz = 3\n    return config\n")
    line = wrong_call("train.py", f"--config={file}", f"--workdir={tmp_path}")
    assert 'Did you mean "steps" instead of "stepz"' in line


ENDINGS = {
    "pass": (cli.DONE, ""),
    "raise ValueError('a\\n b')": (cli.FAILED, "error: a b\n"),
    "raise FileNotFoundError('no folder x')": (cli.FAILED, "error: no folder x\n"),
    "raise FloatingPointError('step 3')": (cli.FAILED, "error: step 3\n"),
    "raise cli.Interrupted('saved step 3')": (cli.INTERRUPTED, "error: saved step 3\n"),
    "raise MemoryError": (cli.FAILED, "error: a MemoryError without a message\n"),
    "raise KeyboardInterrupt": (cli.INTERRUPTED, "error: interrupted; run it again to resume\n"),
    "cli.wrong_call('--seeds is x')": (cli.WRONG_CALL, "error: --seeds is x\n"),
}


@pytest.mark.parametrize("body", ENDINGS)
def test_endings(command, body):
    done = command("-c", f"from tarq_jax import cli\ndef main(): {body}\ncli.run(main)")
    assert (done.returncode, done.stdout, done.stderr) == (ENDINGS[body][0], "", ENDINGS[body][1])


@pytest.mark.parametrize(("call", "shown"), [
    (["train.py"], ["--config:", "--json:", "--workdir:", "--[no]resume:"]),
    (["-m", "tarq_jax.experiments.convert"], ["--checkpoint:", "--correction:", "--seed:"]),
])
def test_help_shows_shared_flags(command, call, shown):
    said = command(*call, "--help").stdout
    assert all(flag in said for flag in shown), said


def test_an_error_in_a_file_of_ones_own_names_its_line(command, tmp_path):
    (tmp_path / "own_data.py").write_text("def read(data_dir):\n    return int('n/a')\n")
    done = command("-c", f"""
import sys; sys.path.append({str(tmp_path)!r})
from tarq_jax import cli, user_code
cli.run(lambda: user_code.call("config.data.name", "own_data:read", int, "runs"))""")
    assert done.returncode == cli.FAILED
    assert done.stderr == (f"error: invalid literal for int() with base 10: 'n/a' "
                           f"({tmp_path / 'own_data.py'}:2, in read)\n")


def test_a_bug_keeps_its_traceback(command):
    done = command("-c", "from tarq_jax import cli\ndef main(): {}['lost']\ncli.run(main)")
    assert done.returncode == 1 and "Traceback" in done.stderr and "KeyError: 'lost'" in done.stderr


def test_exit_codes_are_those_of_the_conventions():
    assert (cli.DONE, cli.FAILED, cli.WRONG_CALL, cli.INTERRUPTED) == (0, 1, 2, 75)


def test_missing_data_is_told_with_its_path_and_flag(command, tmp_path):
    file, source = tmp_path / "experiment.py", tmp_path / "no" / "ml-100k"
    file.write_text("from tarq_jax.config import default_config, smoke\n\n\ndef get_config(mode=''):\n"
                    f"    return smoke(default_config(), source={str(source)!r})\n")
    done = command("train.py", f"--config={file}", f"--workdir={tmp_path / 'run'}",
                   "--config.data.name=movielens", f"--config.data.data_dir={tmp_path / 'data'}")
    assert done.returncode == 1
    line, = done.stderr.splitlines()
    assert line.startswith("error: ") and str(source) in line and "--config.data.source=" in line
