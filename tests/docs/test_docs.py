"""The commands of the documentation run as written, and its pages name only what exists."""

import itertools
import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
IN_ORDER = ("tutorial.md", "how_to/serve.md")  # pages that run; each uses what the earlier ones wrote
ON_THEIR_OWN = ("how_to/install.md", "how_to/convert.md", "how_to/studies.md", "how_to/ab_test.md",
                "how_to/own_data.md", "how_to/own_quantizer.md", "how_to/own_head.md",
                "how_to/own_teacher.md")
FENCE = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def steps(page: Path) -> list[tuple[str, str]]:
    """The blocks of a page to run: language and text. Blocks of `console` need hosts, files or minutes."""
    return FENCE.findall(page.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder to run commands in, with links to the repository's files, so that nothing is written there."""
    made = tmp_path_factory.mktemp("docs")
    for name in ("train.py", "configs", "tarq_jax", "benchmarks", "examples", "setup.cfg", "pyproject.toml"):
        if (ROOT / name).exists():
            (made / name).symlink_to(ROOT / name)
    return made


def file_of(block: str) -> str:
    """The file that a block is part of, from its first line `# name.py`; empty if it is part of none."""
    found = re.match(r"# (\w+\.py)\n", block)
    return found[1] if found else ""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def run_page(page: Path, folder: Path) -> None:
    """Runs a page from top to bottom in one shell; consecutive Python blocks are one session, or one file."""
    script = ["set -e"]
    for (language, file), blocks in itertools.groupby(steps(page), lambda step: (step[0], file_of(step[1]))):
        text = "\n".join(text for _, text in blocks)
        if file:
            (folder / file).write_text(text)
            continue
        script.append(f"python - <<'END_OF_PYTHON'\n{text}END_OF_PYTHON" if language == "python" else text)
    port, text = free_port(), "\n".join(script)
    for usual, other in (("--port=8000", f"--port={port}"), ("localhost:8000", f"localhost:{port}"),
                         ("serving.request --", f"serving.request --url=http://localhost:{port} --")):
        text = text.replace(usual, other)
    text = re.sub(r"^pip install.*$", "", text, flags=re.MULTILINE)  # the tests already have what it installs
    environment = os.environ | {"PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu", "PATH": os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ["PATH"]])}
    done = subprocess.run(["bash", "-c", text], cwd=folder, env=environment, capture_output=True, text=True,
                          timeout=600, check=False)
    assert done.returncode == 0, f"{page.name}: {done.stdout[-2000:]} {done.stderr[-4000:]}"


@pytest.mark.slow
def test_the_tutorial_and_what_builds_on_it(folder):
    """The pages run in this order, as serving uses what the tutorial exported."""
    for page in IN_ORDER:
        run_page(DOCS / page, folder)
    assert (folder / "runs/tutorial/health").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("page", ON_THEIR_OWN)
def test_how_to_pages(folder, page):
    run_page(DOCS / page, folder)


def test_every_page_that_runs_is_run():
    assert {str(page.relative_to(DOCS)) for page in PAGES if steps(page)} == {*IN_ORDER, *ON_THEIR_OWN}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_paths_and_modules_exist(page):
    """The modules, files and pages that commands and links name exist."""
    text = page.read_text()
    for module in re.findall(r"python -m ((?:tarq_jax|benchmarks|examples)[\w.]*)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    for path in re.findall(r"(?:--config=|`)((?:configs|examples|tests|benchmarks)/[\w/]+\.\w+)", text):
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\(([^):#]+)(?:#[^)]*)?\)", text):
        where = page.parent / link
        assert where.exists() or link.startswith("pictures/"), link


def test_references_name_what_exists():
    for page in PAGES:
        for name in re.findall(r"\{py:\w+\}`([\w.]+)`", page.read_text()):
            module, _, attribute = name.rpartition(".")
            __import__(module)
            assert hasattr(sys.modules[module], attribute), name


@pytest.mark.slow
def test_pictures_are_drawn(tmp_path):
    pictures = runpy.run_path(str(DOCS / "pictures.py"))
    pictures["draw_all"](tmp_path)
    shown = set(re.findall(r"\(pictures/(\w+)\.svg\)", (DOCS / "index.md").read_text()))
    assert shown == set(pictures["PICTURES"]) == {path.stem for path in tmp_path.iterdir()}
