"""Benchmarks: ``python -m benchmarks SUITE``. Suites stand on ``harness``; see README.md."""
