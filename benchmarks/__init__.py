"""The benchmarks of efface, run by ``python -m benchmarks SUITE``. The suites use ``harness``; see README.md."""
