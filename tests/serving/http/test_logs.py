"""Logs as lines of JSON, of a process of its own: they take over all logs."""

import datetime
import json

LOGGED = """
import logging, pathlib
from tarq_jax.serving.http import logs

logs.start()
logs.log("serves version", artefact=pathlib.Path("a/1"), seconds=0.5, text="two\\nlines")
try:
    1 / 0
except ZeroDivisionError as error:
    logs.log("error", logging.ERROR, exc_info=error, request="r1")
logging.getLogger("other").info("of no interest")
logging.getLogger("other").warning("%s of another library", "a warning")
"""


def now():
    return datetime.datetime.now(datetime.UTC)


def test_every_record_is_a_line_of_json(command):
    before = now().replace(microsecond=0)
    done = command("-c", LOGGED)
    assert (done.returncode, done.stderr) == (0, "")
    served, failed, other = map(json.loads, done.stdout.splitlines())
    for line in (served, failed, other):
        assert before <= datetime.datetime.fromisoformat(line.pop("time")) <= now()
    assert served == {"level": "info", "event": "serves version", "artefact": "a/1", "seconds": 0.5,
                      "text": "two\nlines"}
    assert failed.pop("traceback").splitlines()[-1] == "ZeroDivisionError: division by zero"
    assert failed == {"level": "error", "event": "error", "request": "r1"}
    assert other == {"level": "warning", "event": "a warning of another library"}
