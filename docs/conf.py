"""Sphinx: `pip install -e '.[docs]' && python -m sphinx -W docs build/docs` writes build/docs/index.html."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import pictures  # noqa: E402

import tarq_jax  # noqa: E402

pictures.draw_all(HERE / "pictures")

project, author, release = "tarq_jax", "the tarq_jax authors", tarq_jax.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing"]  # links from pages to files of the repository
html_theme = "furo"
autodoc_member_order = "bysource"
napoleon_use_ivar = True  # fields that a docstring describes are not listed twice
autodoc_typehints = "signature"
autodoc_mock_imports = ["ray", "pydantic", "triton_python_backend_utils", "apache_beam"]
exclude_patterns = ["pictures"]
