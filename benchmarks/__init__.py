"""Benchmarks: one file an op or a system, each a command of its own (`python -m benchmarks.NAME`)."""
