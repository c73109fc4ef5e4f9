"""Benchmarks: one file per operation or system, each with its own command (`python -m benchmarks.NAME`)."""
