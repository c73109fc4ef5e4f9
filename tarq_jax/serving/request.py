"""Asks a service to rank candidates.

    python -m tarq_jax.serving.request --url=http://localhost:8000 --history=17,4,256 --top_k=5

`--request=FILE` reads the whole request from JSON, for artefacts with fields of users, contexts or events;
`--history` and `--candidates` replace those in the file.
"""

import json
from pathlib import Path
from typing import Any

from absl import flags

from tarq_jax import cli, reporting
from tarq_jax.serving.client import Client

URL = cli.url_flag()
REQUEST = flags.DEFINE_string("request", None, "File with a request in JSON.")
HISTORY = flags.DEFINE_list("history", None, "Ids of the items of the history, the oldest first.")
CANDIDATES = flags.DEFINE_list(
    "candidates", None, "Ids to rank; by default all items that are served.", allow_override=True)
TOP_K = flags.DEFINE_integer("top_k", None, "How many to return; by default as --request says, or 10.",
                             lower_bound=1, allow_override=True)
RETRIES = flags.DEFINE_integer("retries", 3, "Further attempts if the service is busy.", lower_bound=0)
WAIT = flags.DEFINE_float("wait", 0.0, "Seconds to wait at most until the service is ready.", lower_bound=0.0)
TOKEN = cli.token_flag()
JSON = cli.json_flag()


def ids_of(flag: flags.FlagHolder) -> list[int] | None:
    """The ids in a flag; a value that is not an integer is a wrong call."""
    if flag.value is None:
        return None
    try:
        return [int(text) for text in flag.value if text]
    except ValueError:
        cli.wrong_call(f"--{flag.name} is {','.join(flag.value)!r}, expected integers")


def read_request() -> dict[str, Any]:
    """The request of `--request` and `--history`."""
    try:
        request = json.loads(Path(REQUEST.value).read_text()) if REQUEST.value else {}
    except ValueError as error:  # not text, or not JSON
        raise ValueError(f"{REQUEST.value} cannot be read: {error}, expected a JSON object") from None
    if not isinstance(request, dict):
        raise ValueError(f"{REQUEST.value} has {str(request)[:60]}, expected a JSON object")
    if (history := ids_of(HISTORY)) is None:
        return request
    given = request.get("history") or {}
    if not isinstance(given, dict):
        raise ValueError(f"{REQUEST.value}: 'history' is {str(given)[:60]}, expected an object")
    return request | {"history": given | {"item_id": history}}


def main() -> None:
    """Reads the flags, asks the service and prints the table."""
    request, candidates, token = read_request(), ids_of(CANDIDATES), cli.read_token(TOKEN)
    with Client(cli.url(URL), token=token, retries=RETRIES.value) as client:
        if WAIT.value:
            client.wait(WAIT.value)
        answer = client.score({"top_k": 10} | request, candidates, top_k=TOP_K.value)
    rows = [{"rank": rank, "id": item, "score": score} for rank, (item, score) in enumerate(
        zip(answer.ids, answer.scores, strict=True), 1)]
    print(f"{answer.version}: {answer.skipped} events skipped, {len(answer.unknown)} candidates unknown")
    reporting.print_table([row | {"score": f"{row['score']:.4f}"} for row in rows], "")
    if JSON.value:
        reporting.write_rows(rows, JSON.value)


if __name__ == "__main__":
    cli.run(main)
