"""The package as users import it."""

import subprocess
import sys
from pathlib import Path

import tarq_jax


def test_every_public_name_is_there_and_documented():
    assert tarq_jax.__all__ == sorted(tarq_jax.__all__)
    for name in tarq_jax.__all__:
        assert getattr(tarq_jax, name).__doc__, name


def test_the_public_interface():
    """Names are removed from this list only by the policy in CONTRIBUTING.md, with a line in CHANGELOG.md."""
    assert tarq_jax.__all__ == [
        "Batch", "Codebook", "Field", "FirstOrderTarq", "QuantizerOutput", "Schema", "Scorer",
        "TargetAttention", "Tarq", "TwoTower", "beam_encode", "codebook_alignment", "decode",
        "ema_codewords", "encode", "expand", "fit_codebook", "kmeans_codebook", "look_up",
        "look_up_expansion", "multi_head_attention", "personalized_codebook", "revive", "rotate",
        "straight_through", "update_statistics"]


def test_the_version_is_the_same_everywhere():
    root = Path(__file__).resolve().parents[1]
    version = tarq_jax.__version__
    for name, line in (("setup.cfg", f"version = {version}"), ("CITATION.cff", f"version: {version}"),
                       ("CHANGELOG.md", f"## {version}")):
        assert line in (root / name).read_text().splitlines(), name


def test_import_is_light():
    code = "import sys, tarq_jax; sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_imports_point_one_way():
    """Each layer imports only the layers below it, as listed in CONTRIBUTING."""
    below = {
        "types": set(),
        "schema": set(),
        "data": {"types", "schema", "own"},
        "kernels": {"blockwise"},
        "quantization": {"types", "blockwise", "kernels"},
        "blockwise": set(),
        "attention": {"blockwise", "kernels"},
        "approximate_attention": {"attention"},
        "expansion": {"types", "attention", "kernels"},
        "corrections": {"attention", "expansion"},
        "conversion": {"quantization", "attention", "expansion", "corrections"},
        "shards": set(),
        "losses": {"quantization", "shards", "blockwise", "kernels"},
        "metrics": {"types", "checks"},
        "checks": set(),
        "models": {"types", "schema", "quantization", "attention", "approximate_attention", "expansion",
                   "corrections", "shards"},
        "training": {"types", "schema", "data", "quantization", "attention", "conversion", "losses",
                     "metrics", "models", "shards", "config", "own", "cli", "reporting", "signals"},
        "serving": {"types", "schema", "data", "quantization", "attention", "expansion", "corrections",
                    "conversion", "models", "training", "cli", "memory", "reporting", "signals"},
        "statistics": {"metrics", "checks"},
        "experiments": {"training", "data", "conversion", "metrics", "statistics", "models", "config", "cli",
                        "reporting"},
        "config": {"own"},
        "cli": {"config", "memory"},
        "memory": set(),
        "own": set(),
        "reporting": set(),
        "signals": set(),
    }
    root = Path(tarq_jax.__file__).parent
    for path in root.rglob("*.py"):
        part = path.relative_to(root).with_suffix("").parts[0]
        if part == "__init__":
            continue
        for line in path.read_text().splitlines():
            words = line.split()
            if words[:1] == ["from"] and words[1].startswith("tarq_jax"):
                names = [words[1].removeprefix("tarq_jax").strip(".").split(".")[0]]
                if names == [""]:
                    names = [name.strip(",()") for name in words[3:]]
                for name in names:
                    assert name == part or name in below[part], f"{path.relative_to(root)}: {line}"
