"""Functions of your own that a configuration names as MODULE:FUNCTION: a model, a data set."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any


def is_there(name: str) -> bool:
    """Whether it is MODULE:FUNCTION of a module that Python finds; nothing but its packages is imported."""
    module, _, function = name.partition(":")
    try:
        return function.isidentifier() and (
            module in sys.modules or importlib.util.find_spec(module) is not None)
    except (ImportError, ValueError):  # its package is not there, or it is no name of a module
        return False


def find(setting: str, name: str) -> Callable[..., Any]:
    """The function that a setting names, imported.

    Raises:
      ValueError: names the setting, if there is no such module, or no such function in it.
    """
    if not is_there(name):
        raise ValueError(f"{setting} is {name!r}, expected MODULE:FUNCTION of a module that Python finds")
    module, _, function = name.partition(":")
    found = getattr(importlib.import_module(module), function, None)
    if not callable(found):
        raise ValueError(f"{setting} is {name!r}, expected a function of {module}, which has no {function!r}")
    return found
