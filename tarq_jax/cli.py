"""How commands start and end: flags that they share, errors of one line, and exit codes.

Exit codes: 0 done, 1 the task could not be done, 2 a wrong call, 75 interrupted after saving.
"""

import functools
import math
import os
import shlex
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from tarq_jax import memory, user_code

DONE, FAILED, WRONG_CALL, INTERRUPTED = 0, 1, 2, 75


class Interrupted(Exception):
    """Raised after a signal, when everything is saved; calling the command again continues."""


def config_flag() -> flags.Flag:
    """Defines `--config=FILE[:MODE]`, whose settings `--config.KEY=VALUE` overrides.

    Like the other functions here it may be called again, as a process can import several commands.
    """
    if "config" not in flags.FLAGS:
        config_flags.DEFINE_config_file("config", help_string="Experiment, a file in configs/.",
                                        accept_new_attributes=True, lock_config=False)
        flags.mark_flag_as_required("config")
    return flags.FLAGS["config"]


def workdir_flag(text: str, default: str | None = None) -> flags.FlagHolder:
    """Defines `--workdir=DIR`, required without a default; of a URL a local folder would be made."""
    flag = flags.DEFINE_string("workdir", default, text, required=default is None, allow_override=True)
    flags.register_validator("workdir", lambda value: "://" not in (value or ""), flag_values=flags.FLAGS,
                             message="expected a path of a file system that all hosts have mounted, no URL")
    return flag


def run_flag() -> flags.FlagHolder:
    """Defines `--run=DIR`, the working directory of a run to read."""
    return flags.DEFINE_string("run", None, "Working directory of a run.", required=True, allow_override=True)


def json_flag() -> flags.FlagHolder:
    """Defines `--json=FILE`, which the rows of a command's table are written to."""
    return flags.DEFINE_string("json", None, "File to write the rows of the table to.", allow_override=True)


def whole_numbers(flag: flags.FlagHolder, expected: str, *, least: int = 1) -> list[int]:
    """The whole numbers of a list flag, in their order; other values, or any below `least`, are a wrong call.

    `expected` says in the error message what was expected.
    """
    if not flag.value or not all(text.isdecimal() and int(text) >= least for text in flag.value):
        wrong_call(f"--{flag.name} is {','.join(flag.value)!r}, expected {expected}")
    if any(int(text) >= 2**31 for text in flag.value):
        wrong_call(f"--{flag.name} is {','.join(flag.value)!r}, expected numbers below 2**31")
    return [int(text) for text in flag.value]


def names(flag: flags.FlagHolder, known: Collection[str]) -> list[str]:
    """The names of a list flag, each once, in order; none, or any that is not known, are a wrong call."""
    if not flag.value or not set(flag.value) <= set(known):
        wrong_call(f"--{flag.name} is {','.join(flag.value)!r}, expected some of {', '.join(sorted(known))}")
    return list(dict.fromkeys(flag.value))


def seed_flag(text: str) -> flags.FlagHolder:
    """Defines `--seed`, a whole number below 2**32; its help is `text`."""
    from tarq_jax.config import NUM_SEEDS

    return flags.DEFINE_integer(
        "seed", 0, text, lower_bound=0, upper_bound=NUM_SEEDS - 1, allow_override=True)


def seeds_flag(default: str) -> flags.FlagHolder:
    """Defines `--seeds=LIST`, the seeds of initialisation and of the order of the data."""
    return flags.DEFINE_list(
        "seeds", default.split(","), "Seeds of initialisation and order of the data; one run each.",
        allow_override=True)


def seeds(flag: flags.FlagHolder) -> list[int]:
    """The numbers of `seeds_flag`; a wrong call unless they are different whole numbers below 2**32."""
    from tarq_jax.config import NUM_SEEDS

    values: Any = flag.value
    found = [int(value) for value in values if value.isdecimal()]
    if not found or len(found) < len(values) or len(set(found)) < len(found):
        wrong_call(f"--seeds is {','.join(values)!r}, expected different whole numbers like 0,1,2")
    if max(found) >= NUM_SEEDS:
        wrong_call(f"--seeds is {','.join(values)!r}, expected numbers in [0, 2**32)")
    return found


def level_flag() -> flags.FlagHolder:
    """Defines `--level=SHARE`, the confidence level of intervals."""
    return flags.DEFINE_float("level", 0.95, "Confidence level of intervals.", lower_bound=0.5,
                              upper_bound=0.9999, allow_override=True)


def correction_flag() -> flags.FlagHolder:
    """Defines `--correction`, a key of `tarq_jax.conversion.CORRECTIONS`."""
    return flags.DEFINE_enum("correction", "fitted", ["plain", "damped", "fitted"],
                             "How an item's correction of order 1 is found.", allow_override=True)


def calibration_flag() -> flags.FlagHolder:
    """Defines `--calibration`, the number of training requests that corrections are fitted to."""
    return flags.DEFINE_integer(
        "calibration", 512, "Training requests that fitted corrections of order 1 are fitted to.",
        lower_bound=1, allow_override=True)


def url_flag() -> flags.FlagHolder:
    """Defines `--url=URL`, the URL of a service to ask."""
    return flags.DEFINE_string("url", "http://localhost:8000", "URL of the service.", allow_override=True)


def url(flag: flags.FlagHolder) -> str:
    """The URL of `url_flag`; a wrong call unless it is an HTTP or HTTPS URL."""
    found = str(flag.value)
    expected = "expected http://HOST:PORT or https://HOST:PORT"
    try:
        parts = urlsplit(found)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError as error:  # brackets or port are wrong
        wrong_call(f"--url is {found!r}, {expected}: {error}")
    if not valid:
        wrong_call(f"--url is {found!r}, {expected}")
    return found


def token_flag(name: str = "token_file", text: str = "File with the token that the service requires."
               ) -> flags.FlagHolder:
    """Defines `--token_file=FILE`, with the token of a service, or a flag with another name and text."""
    return flags.DEFINE_string(name, None, text, allow_override=True)


def read_token(flag: flags.FlagHolder) -> str | None:
    """The token in the file of `token_flag`; a wrong call if the file cannot be read or holds no token."""
    if flag.value is None:
        return None
    try:
        return token_in(Path(str(flag.value)))
    except ValueError as error:
        wrong_call(f"--{flag.name} {error}")


def token_in(path: Path) -> str:
    """The token in a file; ValueError if the file cannot be read or holds no token."""
    try:
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot be read: {error}") from None
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(f"{path} has {len(token)} characters, expected some of ASCII, and no spaces")
    return token


def run(main: Callable[..., None], *, words: bool = False) -> None:
    """Parses flags, runs `main` and exits with the code of its outcome.

    With `words`, `main` takes a list of the arguments that are not flags; without it, there must be none.
    """
    logging.set_verbosity(logging.WARNING)  # Orbax and JAX log every step they take
    memory.keep_freed()
    for flag in flags.FLAGS.flags_by_module_dict().get(__name__, ()):  # --help shows shared flags, too
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    if os.getcwd() not in sys.path:  # settings may name functions there; `python -m` has already added it
        sys.path.append(os.getcwd())

    def call(argv):
        sys.exit(_exit_code(functools.partial(main, argv[1:]) if words else main))

    app.run(call, flags_parser=functools.partial(_parse, words=words))


def _parse(argv: Sequence[str], words: bool = False) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
        if len(rest) > 1 and not words:
            raise ValueError(f"unexpected argument {rest[1]!r}, expected only flags")
        for name in flags.FLAGS:  # absl's own bounds accept infinity and NaN
            value = flags.FLAGS[name].value
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"--{name} is {value}, expected a finite number")
        return rest
    except (AttributeError, KeyError) as error:  # a `--config.KEY` that does not exist
        found = error.args[0]
        name = found.args[0] if isinstance(found, KeyError) else found
        wrong_call(f"unknown setting of the configuration: {name}")
    except (flags.Error, OSError, TypeError, ValueError) as error:
        wrong_call(_without_traceback(str(error)))


def _without_traceback(message: str) -> str:
    """An error of a configuration file, as absl words it, with the place and the error for its traceback."""
    about, found, trace = message.partition("Traceback (most recent call last):")
    lines = trace.strip().splitlines()
    if not found or not lines:
        return message
    place = next((line.strip() for line in reversed(lines) if line.lstrip().startswith('File "')), "")
    return f"{about.strip()} {lines[-1]} ({place})"


def _exit_code(main: Callable[[], None]) -> int:
    try:
        main()
        return DONE
    except Interrupted as interrupted:
        _complain(interrupted)
        return INTERRUPTED
    except KeyboardInterrupt:  # outside of `signals.interruptible`: no step is lost
        _complain("interrupted; run it again to resume")
        return INTERRUPTED
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        _complain(error, user_code.place_of(error))
        return FAILED


def command_line(module: str) -> str:
    """The command that runs a module with the arguments of this process."""
    return shlex.join(["python", "-m", module, *sys.argv[1:]])


def wrong_call(message: object) -> NoReturn:
    """Ends the command with one line on stderr and the exit code of a wrong call."""
    _complain(message)
    sys.exit(WRONG_CALL)


def _complain(error: object, place: str = "") -> None:
    text = str(error) or f"a {type(error).__name__} without a message"
    print(f"error: {' '.join(text.split())}{place}", file=sys.stderr)


def settings(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Checks and returns the configuration; a missing file or an invalid setting is a wrong call."""
    from tarq_jax.config import validate

    try:
        validate(config)
    except (OSError, ValueError) as error:  # absl loads the file lazily: only here a missing one is noticed
        wrong_call(error)
    return config


def study(
    config: ml_collections.ConfigDict, chosen: Sequence[str] = ()
) -> dict[str, ml_collections.ConfigDict]:
    """The configurations of a study's variants, or of the chosen ones; an invalid study is a wrong call."""
    from tarq_jax.config import variants_of

    try:
        variants = variants_of(config)
    except (OSError, ValueError) as error:
        wrong_call(error)
    for name in chosen:
        if name not in variants:
            wrong_call(f"--variant is {name!r}, expected one of {sorted(variants)}")
    return {name: variants[name] for name in chosen} if chosen else variants
