"""Benchmarks: `python -m benchmarks` for single operations, `python -m benchmarks.NAME` for each system.

README.md in `results/` lists all commands; modules without one are parts of these.
"""
