"""Reads text files row by row; malformed rows are left out, counted, and sampled for a report."""

from collections.abc import Callable
from typing import Any

import apache_beam as beam

from tarq_jax.data.rows import NUM_SAMPLES, TEXT_LENGTH, BadRow

BAD = "bad"


class ParseRow(beam.DoFn):
    """Outputs the value of each row; a malformed row goes to the output `BAD` as (reason, text).

    While the job runs, the runner shows the counters `rows/read` and `rows/bad: REASON`.
    """

    def __init__(self, parse: Callable[[str], Any]):
        self.parse = parse
        self.read = beam.metrics.Metrics.counter("rows", "read")

    def process(self, line: bytes):
        """Outputs the value of a row, or the reason why it is malformed."""
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
    """Reads all files that match a pattern, on any file system that Beam supports.

    Args:
      root: the pipeline.
      pattern: a path or glob.
      parse: returns the value of a row or raises `BadRow`; is never called with an empty row.
      role: name for the files in the report.
      header: whether the first line of each file is a header.

    Returns:
      The values of good rows, and one report in the form that `rows.RowReport.from_json` reads. Beam does not
      provide line numbers, so the samples are the first ones when sorted by reason and text.
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
