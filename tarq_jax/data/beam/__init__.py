"""Preparation of data too large for one machine: Apache Beam pipelines that end in block records.

Only imported where something is prepared, since Beam is an extra: `pip install 'tarq_jax[beam]'`. What is
prepared is read without it.

A source gives the elements of `forms.Parts`; `plan.plan` makes of them what a tfds builder writes. No step
holds more in memory than the kept events of one user, one block of records, a share of a vocabulary, or a
few numbers for each block.
"""
