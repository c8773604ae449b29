"""Scripts that make every number of the docs; run them with `python -m benchmarks.NAME`."""
