"""Functions of the user's own that a configuration names as MODULE:FUNCTION: a model, a data set."""

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from pathlib import Path
from typing import Any

_files: set[str] = set()  # of the modules whose functions were called


def is_there(name: str) -> bool:
    """Whether `name` is MODULE:FUNCTION and Python finds the module; imports only its parent packages."""
    module, _, function = name.partition(":")
    try:
        return function.isidentifier() and (
            module in sys.modules or importlib.util.find_spec(module) is not None)
    except (ImportError, ValueError):  # its package does not exist, or the module name is invalid
        return False


def call(setting: str, name: str, returns: type, /, *arguments: Any, **options: Any) -> Any:
    """Calls the function that a setting names and returns its result; the function's own errors pass through.

    Args:
      setting: the setting, for error messages.
      name: MODULE:FUNCTION.
      returns: the type that the function must return.
      *arguments: positional arguments of the function.
      **options: keyword arguments of the function.

    Raises:
      ValueError: the module or the function does not exist, or the function does not accept the arguments or
        returns another type than `returns`; names the setting.
    """
    if not is_there(name):
        raise ValueError(f"{setting} is {name!r}, expected MODULE:FUNCTION of a module that Python finds")
    module, _, function = name.partition(":")
    imported = importlib.import_module(module)
    _files.add(str(getattr(imported, "__file__", None)))
    found = getattr(imported, function, None)
    if not callable(found):
        raise ValueError(f"{setting} is {name!r}, expected a function of {module}, which has no {function!r}")
    try:
        inspect.signature(found).bind(*arguments, **options)
    except (TypeError, ValueError) as error:  # ValueError: a function without a Python signature
        raise ValueError(f"{setting} is {name!r}, expected a function of {len(arguments)} arguments and of "
                         f"options {sorted(options)}: {error}") from error
    made = found(*arguments, **options)
    if not isinstance(made, returns):
        raise ValueError(f"{setting} is {name!r}, which gives a {type(made).__name__}, expected a "
                         f"{returns.__module__}.{returns.__qualname__}")
    return made


def place_of(error: BaseException) -> str:
    """Where in a file of the user's own the error arose, as ` (FILE:LINE, in FUNCTION)`; empty if in none."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in _files]
    return f" ({frames[-1].filename}:{frames[-1].lineno}, in {frames[-1].name})" if frames else ""


def source_of(name: str) -> str:
    """16 hexadecimal digits of the SHA-256 of the file that holds MODULE:FUNCTION; empty if there is none."""
    module = importlib.import_module(name.partition(":")[0]) if is_there(name) else None
    file = Path(getattr(module, "__file__", None) or "")
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else ""
