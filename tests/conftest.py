"""Fixtures shared by all tests."""

import gc
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEVICES = 8

# This has to run before anything imports JAX. It gives a mesh to test on. It makes compilation fast, as most
# programs run only a few times, and caches programs for all tests and the commands that they start. Without
# XLA's fusion emitters, a training step compiles in a quarter of the time.
XLA_FLAGS = {"xla_force_host_platform_device_count": DEVICES, "xla_backend_optimization_level": 0,
             "xla_cpu_use_fusion_emitters": "false"}
for name, value in XLA_FLAGS.items():
    if name not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{name}={value}".strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

# The objects of traced programs live long, so that collections of garbage walk over many and find little.
gc.set_threshold(20_000)

import io  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Iterator, Mapping  # noqa: E402
from contextlib import AbstractContextManager  # noqa: E402
from types import MappingProxyType  # noqa: E402

import ml_collections  # noqa: E402
import pytest  # noqa: E402
import tiny  # noqa: E402
from absl.flags import FLAGS  # noqa: E402
from absl.testing import flagsaver  # noqa: E402
from rich.console import Console  # noqa: E402

from tarq_jax.data import Dataset  # noqa: E402


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of small real data sets: TARQ_DATA, or `../shared/data` beside the repository."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("TARQ_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}: set TARQ_DATA to the folder of real data sets")
    return folder


Command = Callable[..., subprocess.CompletedProcess]


def _environment(path: tuple[object, ...], devices: int, environment: Mapping[str, str]) -> dict[str, str]:
    return os.environ | environment | {
        "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT, ROOT / "tests"))),
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace(f"device_count={DEVICES}", f"device_count={devices}")}


def _run(*arguments: object, path: tuple[object, ...] = (), devices: int = 1,
         environment: Mapping[str, str] = MappingProxyType({})) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=_environment(path, devices, environment),
        capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="session")
def command() -> Command:
    """Runs Python with the given arguments in the repository: `command("train.py", "--workdir=x")`.

    `path` names folders to import from before all others; `devices` is the number of devices that the
    command sees; `environment` holds further variables.
    """
    return _run


@pytest.fixture
def with_flags() -> Callable[..., AbstractContextManager]:
    """A context in which flags of commands that this process has imported have the values given."""
    FLAGS.mark_as_parsed()
    return flagsaver.flagsaver


@pytest.fixture
def start_command() -> Iterator[Callable[..., subprocess.Popen]]:
    """As `command`, but returns while the process runs; at the end it kills what still runs."""
    started = []

    def start(*arguments: object, devices: int = 1, stdout: io.TextIOBase | int = subprocess.DEVNULL
              ) -> subprocess.Popen:
        started.append(subprocess.Popen(
            [sys.executable, *map(str, arguments)], cwd=ROOT, env=_environment((), devices, {}),
            stdout=stdout, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def wrong_call(tmp_path_factory) -> Callable[..., str]:
    """Runs a wrong call, which must exit with code 2 and one line before JAX is imported; returns it."""
    folder = tmp_path_factory.mktemp("without_jax")
    (folder / "jax.py").write_text("raise ImportError('JAX was imported')")

    def run(*arguments: object) -> str:
        done = _run(*arguments, path=(folder,))
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        line, = done.stderr.splitlines()
        assert line.startswith("error: ")
        return line

    return run


@pytest.fixture(scope="session")
def tiny_dataset() -> Dataset:
    """The data set of `tiny`, made once."""
    return tiny.make_dataset()


@pytest.fixture
def tiny_config() -> ml_collections.ConfigDict:
    """The configuration of `tiny`, which a test may change."""
    return tiny.make_config()


@pytest.fixture(scope="session")
def silent() -> Console:
    """A console whose output is discarded; a test that reads output makes one of its own."""
    return Console(file=io.StringIO(), quiet=True)


@pytest.fixture(scope="module")
def one_device() -> Iterator[None]:
    """Trains on one of the eight devices, for modules where a mesh only costs time."""
    with tiny.one_device():
        yield


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory, silent) -> Callable[[str], Path]:
    """`smoke_run("tarq")` trains that model once with `configs/synthetic.py:smoke` and returns its folder."""
    from configs import synthetic
    from tarq_jax.training import loop

    folder = tmp_path_factory.mktemp("runs")

    def run(model: str) -> Path:
        workdir = folder / model
        if not workdir.exists():
            config = loop.with_model(synthetic.get_config("smoke"), model)
            config.data.data_dir = str(folder / "data")
            with tiny.one_device():
                loop.train(config, loop.load_data(config), workdir, silent)
        return workdir

    return run


MAPS = Path("/proc/self/maps")  # Linux ends a process that has more than about twice MOST_MAPS memory maps
MOST_MAPS = 25_000


@pytest.fixture(scope="module", autouse=True)
def few_programs_in_memory() -> Iterator[None]:
    """Drops compiled programs after a module if there are many, as each takes several memory maps."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def compiled_once() -> Iterator[None]:
    """Runs with equal settings share objectives, optimizers and functions: tracing dominates tiny runs.

    All tests that run after the first that asks for this share them too, until the session ends. A key must
    hold all that the function reads, in particular the optimizer itself: a test may give one of its own.
    """
    from tarq_jax.training import seeds, setup

    keys = {  # the function -> what it reads of its arguments
        (setup, "build"): lambda model, loss_weights, schema, *how: (
            model.to_json(), loss_weights.to_json(), schema, how),
        (setup, "make_optimizer"): lambda config: (config.optimizer.to_json(), config.steps),
        (setup, "initialiser"): lambda config, objective, optimizer: (
            config.model.to_json(), objective, optimizer),
        (setup, "codebook_fit"): lambda config, objective: (config.model.to_json(), config.steps, objective),
        (setup, "compile_step"): lambda config, objective, optimizer, mesh=None, state=None: (
            objective, optimizer, config.codebook.to_json(), config.accumulate, config.parallel,
            config.mesh.to_json(), mesh),  # these also decide the shardings of a fresh state
        (seeds, "compile_step"): lambda config, objective, optimizer, mesh: (
            objective, optimizer, config.codebook.to_json(), config.accumulate, mesh),
    }

    def shared(make, key):
        made = {}

        def make_once(*arguments):
            known = key(*arguments)
            if known not in made:
                made[known] = make(*arguments)
            return made[known]

        return make_once

    with pytest.MonkeyPatch.context() as patch:
        for (module, name), key in keys.items():
            patch.setattr(module, name, shared(getattr(module, name), key))
        yield
