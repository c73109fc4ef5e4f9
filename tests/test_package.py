"""The package as users import it."""

import ast
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
        "data": {"types", "schema", "user_code", "reporting"},
        "distances": set(),
        "kernels": {"blockwise", "distances"},
        "quantization": {"types", "blockwise", "distances", "kernels", "checks"},
        "blockwise": {"checks"},
        "attention": {"blockwise", "kernels"},
        "approximate_attention": {"attention"},
        "expansion": {"types", "attention", "kernels", "checks"},
        "corrections": {"attention", "expansion", "checks"},
        "conversion": {"quantization", "attention", "expansion", "corrections"},
        "shards": set(),
        "losses": {"shards", "blockwise", "distances", "kernels"},
        "metrics": {"types", "checks"},
        "checks": set(),
        "models": {"types", "schema", "quantization", "attention", "approximate_attention", "expansion",
                   "corrections", "shards"},
        "training": {"types", "schema", "data", "quantization", "attention", "conversion", "losses",
                     "metrics", "models", "shards", "checks", "config", "user_code", "cli", "reporting",
                     "signals"},
        "serving": {"types", "schema", "data", "quantization", "attention", "expansion", "corrections",
                    "conversion", "models", "training", "cli", "memory", "reporting", "signals"},
        "statistics": {"metrics", "checks"},
        "experiments": {"training", "data", "conversion", "metrics", "statistics", "models", "config", "cli",
                        "reporting"},
        "config": {"user_code"},
        "cli": {"config", "memory", "user_code"},
        "memory": set(),
        "user_code": set(),
        "reporting": set(),
        "signals": set(),
    }
    seen = set()
    for part, path, node in nodes():
        for name in imported(node):
            package, _, module = name.partition(".")
            assert not getattr(node, "level", 0), f"{path}:{node.lineno} is relative"
            if package == tarq_jax.__name__:
                found = module.partition(".")[0]
                assert found == part or found in below[part], f"{path}:{node.lineno} imports {name}"
                seen.add((part, found))
    assert ("losses", "distances") in seen and ("training", "models") in seen


def test_the_core_never_jits_and_reads_no_configuration():
    """It leaves both to its callers, as CONTRIBUTING says."""
    core = {"types", "schema", "distances", "kernels", "quantization", "blockwise", "attention",
            "approximate_attention", "expansion", "corrections", "shards", "checks", "losses", "metrics",
            "models"}
    seen = set()
    for part, path, node in nodes():
        if part in core:
            for name in {*imported(node), getattr(node, "attr", "")}:
                words = name.split(".")
                refused = {"jit", "pjit", "pmap", "ml_collections", "absl"}.intersection(words)
                assert not refused and words[:2] != ["tarq_jax", "config"], f"{path}:{node.lineno}: {name}"
            seen.add(part)
    assert seen == core


def nodes():
    """(part of the package, path, node) for every node of the syntax of every module."""
    root = Path(tarq_jax.__file__).parent
    for path in sorted(root.rglob("*.py")):
        path = path.relative_to(root)
        if path != Path("__init__.py"):
            for node in ast.walk(ast.parse((root / path).read_text())):
                yield path.with_suffix("").parts[0], path, node


def imported(node):
    """The full names that a node imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []
