"""The same systems in other frameworks, written as one would there: what benchmarks compare with."""
