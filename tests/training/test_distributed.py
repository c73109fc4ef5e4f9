"""Several processes on loopback give the results of one process, and stop together on a signal to one."""

import json
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import pytest
import tiny

from tarq_jax import data
from tarq_jax.training import checkpoint, distributed

TRAIN = """
import json, os, pathlib, signal, sys, time
import tiny
from rich.console import Console
import orbax.checkpoint as ocp
from tarq_jax import cli
from tarq_jax.training import distributed, loop

assert distributed.initialize() == "JAX_COORDINATOR_ADDRESS"
stopped, workdir = sys.argv[1:]
write = loop.MetricsWriter.write

def write_and_signal(self, step, scalars):
    write(self, step, scalars)
    if step == 2 and os.environ["JAX_PROCESS_ID"] == stopped:
        os.kill(os.getpid(), signal.SIGTERM)

restore = ocp.Checkpointer.restore

def restore_or_fail(self, directory, **arguments):
    if directory.name == "6" and (stopped, os.environ["JAX_PROCESS_ID"]) == ("unreadable", "1"):
        raise OSError("this host does not see it")
    return restore(self, directory, **arguments)

loop.MetricsWriter.write, ocp.Checkpointer.restore = write_and_signal, restore_or_fail
config = tiny.make_config()
config.steps = 2000 if stopped.isdecimal() else 6
if stopped == "different":
    config.seed = int(os.environ["JAX_PROCESS_ID"])
if stopped == "apart":
    workdir = os.path.join(workdir, os.environ["JAX_PROCESS_ID"])
try:
    if stopped == "between":
        loop.train(config, tiny.make_dataset(), pathlib.Path(workdir) / "first", Console(file=sys.stderr))
        if os.environ["JAX_PROCESS_ID"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(15)  # JAX looks for signals every few seconds
    result = loop.train(config, tiny.make_dataset(), pathlib.Path(workdir), Console(file=sys.stderr))
except cli.Interrupted as interrupted:
    print(interrupted, file=sys.stderr)
    sys.exit(cli.INTERRUPTED)
except ValueError as error:
    print(error, file=sys.stderr)
    sys.exit(cli.FAILED)
print(json.dumps(result.rows))
"""


@pytest.fixture
def run_processes(command):
    """Runs the script above in `num` processes, which have eight devices in total."""

    def run(num, *arguments):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        variables = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(num)}

        def start(index):
            return command("-c", TRAIN, *arguments, devices=8 // num,
                           environment=variables | {"JAX_PROCESS_ID": str(index)})

        with ThreadPoolExecutor(num) as pool:
            return list(pool.map(start, range(num)))

    return run


@pytest.mark.parametrize("num", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_are_like_one(num, run_processes, tmp_path, finished, untimed):
    done = run_processes(num, "none", tmp_path)
    assert [process.returncode for process in done] == [0] * num, done[0].stderr[-3000:]
    assert ["auc" in process.stdout for process in done] == [True] + [False] * (num - 1)
    assert tiny.losses(tmp_path) == pytest.approx(tiny.losses(finished[0]), rel=1e-4)
    rows, expected = untimed(json.loads(done[0].stdout.splitlines()[-1])), untimed(finished[1].rows)
    assert rows[0]["auc"] == pytest.approx(expected[0]["auc"], abs=0.02)
    assert json.loads((tmp_path / "results.json").read_text())[0]["auc"] == rows[0]["auc"]
    with checkpoint.manager(tmp_path) as checkpoints:
        assert list(checkpoints.all_steps()) == [4, 6]


@pytest.mark.slow
def test_processes_with_other_settings_are_refused(run_processes, tmp_path):
    done = run_processes(2, "different", tmp_path)
    assert [process.returncode for process in done] == [1, 1], done[0].stderr[-3000:]
    for process in done:
        assert "the configuration of processes [1] is not that of process 0, expected" in process.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_processes_with_folders_of_their_own_are_refused(run_processes, tmp_path):
    done = run_processes(2, "apart", tmp_path)
    assert [process.returncode for process in done] == [1, 1], done[0].stderr[-3000:]
    for process in done:
        assert "must be the same folder on all hosts, of processes [1] is not that" in process.stderr
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*")] == [Path("0")]


@pytest.mark.slow
def test_all_stop_at_the_step_that_one_is_told_to(run_processes, tmp_path):
    done = run_processes(2, "1", tmp_path)
    assert [process.returncode for process in done] == [75, 75], done[0].stderr[-3000:]
    step, = {process.stderr.split("saved step ")[1].split()[0] for process in done}
    with checkpoint.manager(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == int(step) > 2


@pytest.mark.slow
def test_a_signal_between_two_models_stops_the_second(run_processes, tmp_path):
    done = run_processes(2, "between", tmp_path)
    assert [process.returncode for process in done] == [75, 75], done[0].stderr[-3000:]
    with checkpoint.manager(tmp_path) as checkpoints:
        assert list(checkpoints.all_steps()) == [1]


@pytest.mark.slow
def test_what_one_process_cannot_read_is_damaged_for_all(run_processes, tmp_path, untimed):
    """It ends as it did before, from the checkpoint before."""
    first, again = (run_processes(2, stopped, tmp_path) for stopped in ("none", "unreadable"))
    for process in (*first, *again):
        assert process.returncode == 0, process.stderr[-3000:]
    assert "Checkpoint 6 is damaged (OSError: this host does not see it). Going on" in again[0].stderr
    assert (tmp_path / "damaged" / "6").is_dir()
    before, after = (untimed(json.loads(done[0].stdout.splitlines()[-1])) for done in (first, again))
    assert after == before


@pytest.mark.parametrize(("environment", "launcher"), [
    ({"SLURM_NTASKS": "4", "SLURM_PROCID": "1"}, "SLURM"),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
    ({"TPU_WORKER_HOSTNAMES": "host-0,host-1"}, "GKE"),
    ({"MEGASCALE_NUM_SLICES": "2"}, "TPU slices"),
    ({"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
     "JAX_COORDINATOR_ADDRESS"),
])
def test_launchers_are_told_by_their_variables(environment, launcher, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: calls.append(arguments))
    assert distributed.initialize(environment) == launcher
    explicit = {"coordinator_address": "host:1", "num_processes": 2, "process_id": 1}
    assert calls == [explicit if launcher == "JAX_COORDINATOR_ADDRESS" else {}]


@pytest.mark.parametrize("environment", [
    {}, {"SLURM_NTASKS": "1"}, {"OMPI_COMM_WORLD_SIZE": "1"}, {"TPU_WORKER_HOSTNAMES": "localhost"}])
def test_a_process_on_its_own_joins_nothing(environment, monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: pytest.fail("joined"))
    assert distributed.initialize(environment) is None
    assert distributed.is_first() and distributed.data_shard() == data.Shard(0, 1)


@pytest.mark.parametrize(("environment", "message"), [
    ({"JAX_NUM_PROCESSES": "2"}, "JAX_PROCESS_ID is ''"),
    ({"JAX_PROCESS_ID": "0", "JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two'"),
    ({"JAX_PROCESS_ID": "2", "JAX_NUM_PROCESSES": "2"}, "JAX_PROCESS_ID is 2, expected less than"),
])
def test_bad_variables_are_named(environment, message):
    with pytest.raises(ValueError, match=message):
        distributed.initialize({"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1"} | environment)


@pytest.mark.parametrize("name", ["SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES"])
@pytest.mark.parametrize("value", ["four", "2(x2)", "-1", "1.5"])
def test_counts_of_launchers_are_whole_numbers(name, value):
    with pytest.raises(ValueError, match=re.escape(f"{name} is {value!r}, expected a whole number")):
        distributed.initialize({name: value})
