"""Functions of your own that a configuration names as MODULE:FUNCTION: a model, a data set."""

import hashlib
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any


def is_there(name: str) -> bool:
    """Whether it is MODULE:FUNCTION of a module that Python finds; nothing but its packages is imported."""
    module, _, function = name.partition(":")
    try:
        return function.isidentifier() and (
            module in sys.modules or importlib.util.find_spec(module) is not None)
    except (ImportError, ValueError):  # its package is not there, or it is no name of a module
        return False


def call(setting: str, name: str, returns: type, /, *arguments: Any, **options: Any) -> Any:
    """What the function that a setting names makes of the arguments; errors of its own code are left alone.

    Raises:
      ValueError: names the setting, if there is no such module, no such function in it, it does not take the
        arguments, or gives something else than `returns`.
    """
    if not is_there(name):
        raise ValueError(f"{setting} is {name!r}, expected MODULE:FUNCTION of a module that Python finds")
    module, _, function = name.partition(":")
    found = getattr(importlib.import_module(module), function, None)
    if not callable(found):
        raise ValueError(f"{setting} is {name!r}, expected a function of {module}, which has no {function!r}")
    try:
        inspect.signature(found).bind(*arguments, **options)
    except (TypeError, ValueError) as error:  # the latter of functions that are not of Python
        raise ValueError(f"{setting} is {name!r}, expected a function of {len(arguments)} arguments and of "
                         f"options {sorted(options)}: {error}") from error
    made = found(*arguments, **options)
    if not isinstance(made, returns):
        raise ValueError(f"{setting} is {name!r}, which gives a {type(made).__name__}, expected a "
                         f"{returns.__module__}.{returns.__qualname__}")
    return made


def source_of(name: str) -> str:
    """16 hexadecimal digits of the file that MODULE:FUNCTION is in; empty if it is in none."""
    module = importlib.import_module(name.partition(":")[0]) if is_there(name) else None
    file = Path(getattr(module, "__file__", None) or "")
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else ""
