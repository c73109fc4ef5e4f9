"""Logs as lines of JSON on stdout."""

import datetime
import json
import logging
import sys

LOGGER = logging.getLogger("tarq_jax.serving")


class JsonLines(logging.Formatter):
    """Formats a record as one line: time, level, event, and the fields that `log` was given."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        fields = {"time": time.isoformat(timespec="milliseconds"), "level": record.levelname.lower(),
                  "event": record.getMessage()} | getattr(record, "fields", {})
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)


def log(event: str, level: int = logging.INFO, *, exc_info: BaseException | None = None,
        **fields: object) -> None:
    """Logs an event with its fields."""
    LOGGER.log(level, event, exc_info=exc_info, extra={"fields": fields})


def start() -> None:
    """Sends all logs of the process to stdout."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonLines())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    LOGGER.setLevel(logging.INFO)
