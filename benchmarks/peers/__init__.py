"""The same systems in other frameworks, in their usual style, for comparison in benchmarks."""

import importlib.util


def check_installed(*modules: str) -> None:
    """Raises ValueError if one of the peers' modules is missing, before anything is measured."""
    for name in modules:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"{name} is missing, expected `pip install -e '.[bench]'`")
