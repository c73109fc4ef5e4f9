"""Preparation of data too large for one machine: Apache Beam pipelines that end in block records.

This package is imported only to prepare data, because Beam is an extra: `pip install 'tarq_jax[beam]'`.
Reading prepared data does not need Beam.

A source provides the elements of `forms.Parts`; `plan.plan` turns them into the records that a tfds builder
writes. No step holds more in memory than the kept events of one user, one block of records, one share of a
vocabulary, or a few numbers per block.
"""
