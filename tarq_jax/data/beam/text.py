"""Text files as rows: the malformed ones counted, sampled into a report, and left out."""

from collections.abc import Callable
from typing import Any

import apache_beam as beam

from tarq_jax.data.rows import NUM_SAMPLES, TEXT_LENGTH, BadRow

BAD = "bad"


class ParseRow(beam.DoFn):
    """Gives the value of each row; a malformed one goes to the output `BAD` as (reason, text).

    Counters `rows/read` and `rows/bad: REASON` are shown by the runner while the job runs.
    """

    def __init__(self, parse: Callable[[str], Any]):
        self.parse = parse
        self.read = beam.metrics.Metrics.counter("rows", "read")

    def process(self, line: bytes):
        """The value, or what is wrong."""
        self.read.inc()
        text = line.decode("utf-8", "replace").rstrip("\r\n")
        try:
            if not text.strip():
                raise BadRow("empty row")
            yield self.parse(text)
        except BadRow as error:
            beam.metrics.Metrics.counter("rows", f"bad: {error}").inc()
            yield beam.pvalue.TaggedOutput(BAD, (str(error), text[:TEXT_LENGTH]))


def read_rows(root: beam.Pipeline, pattern: str, parse: Callable[[str], Any], *, role: str,
              header: bool = False) -> tuple[beam.PCollection, beam.PCollection]:
    """Reads all files of a pattern, wherever Beam finds them.

    Args:
      root: the pipeline.
      pattern: a path or glob.
      parse: gives the value of a row or raises `BadRow`; never sees an empty row.
      role: names the files in the report.
      header: the first line of each file is no row.

    Returns:
      The values of good rows, and one report as `rows.RowReport.to_json` gives it; Beam does not tell the
      numbers of lines, so samples are the first ones by reason and text.
    """
    lines = root | f"Read {role}" >> beam.io.ReadFromText(
        pattern, coder=beam.coders.BytesCoder(), skip_header_lines=int(header))
    rows = lines | f"Parse {role}" >> beam.ParDo(ParseRow(parse)).with_outputs(BAD, main="good")
    read = lines | f"Count {role}" >> beam.combiners.Count.Globally()
    reasons = (rows[BAD] | f"Reasons of {role}" >> beam.Keys()
               | f"Count reasons of {role}" >> beam.combiners.Count.PerElement()
               | f"Gather reasons of {role}" >> beam.combiners.ToDict())
    samples = rows[BAD] | f"Sample {role}" >> beam.combiners.Top.Smallest(NUM_SAMPLES)
    report = read | f"Report {role}" >> beam.Map(
        _report, beam.pvalue.AsSingleton(reasons), beam.pvalue.AsSingleton(samples), role=role)
    return rows["good"], report


def _report(read: int, reasons: dict[str, int], samples: list[tuple[str, str]], role: str) -> dict[str, Any]:
    return {"read": read, "reasons": reasons,
            "samples": [{"file": role, "line": 0, "reason": reason, "text": text}
                        for reason, text in samples]}
