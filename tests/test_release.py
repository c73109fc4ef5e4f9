"""The release, a source archive and a wheel, works without the repository."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RELEASED = ("tarq_jax", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")

CONFIG = '''
from tarq_jax.config import default_config, smoke


def get_config():
    config = default_config()
    config.data.name = "synthetic"
    return smoke(config, num_items=120, num_clusters=12, history_length=8, num_candidates=4,
                 train_requests=64, validation_requests=32, test_requests=32)
'''


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with both; the wheel is made from the source archive."""
    root = tmp_path_factory.mktemp("release")
    (sources := root / "sources").mkdir()
    for name in RELEASED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, sources / name)
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", root / "dist", sources],
                   check=True, capture_output=True)
    return root / "dist"


@pytest.mark.slow
def test_nothing_is_missing_from_either(built):
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tarq_jax").rglob("*")
               if path.suffix in (".py", ".typed", ".html")}
    wheel, = built.glob("*.whl")
    archive, = built.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as opened:
        assert package <= set(opened.namelist())
        assert not any(name.startswith(("tests", "benchmarks", "configs")) for name in opened.namelist())
    with tarfile.open(archive) as opened:
        assert package <= {name.partition("/")[2] for name in opened.getnames()}


@pytest.mark.slow
def test_the_wheel_trains_exports_and_scores_elsewhere(built, tmp_path):
    wheel, = built.glob("*.whl")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path / "site",
                    wheel], check=True, capture_output=True)
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "JAX_PLATFORMS": "cpu"}

    def python(*arguments):
        done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, env=environment, text=True,
                              capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert python("-c", "import tarq_jax; print(tarq_jax.__file__)").startswith(str(tmp_path / "site"))
    (tmp_path / "mine.py").write_text(CONFIG)
    python("-m", "tarq_jax.experiments.compare", "--config=mine.py", "--seeds=0", "--model=tarq",
           "--workdir=runs")
    python("-m", "tarq_jax.serving.export", "--run=runs/tarq-0", "--out=artefact")
    scored = python("-c", "from tarq_jax.serving import Scorer\n"
                          "request = {'history': {'item_id': [3, 5]}}\n"
                          "print(len(Scorer.load('artefact').score(request, top_k=5).ids))")
    assert scored.split()[-1] == "5"
