"""Benchmarks that anyone can run: `python -m benchmarks.NAME --help`; figures stand in docs/benchmarks.md."""
