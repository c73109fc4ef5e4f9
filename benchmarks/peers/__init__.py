"""The same systems in other frameworks, in their usual style, for comparison in benchmarks."""
